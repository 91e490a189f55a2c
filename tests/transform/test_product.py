"""Which uses of a weight are FP8 products, and what the report says of the others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_checks import (
    BLOCKS,
    assert_close,
    assert_each_runs_as_fp8,
    assert_runs_as_fp8,
    contracting,
    dequantized,
    kernel,
    normal,
)
from jax import lax

import jaxquant as jq
from jaxquant.transform import fp8, fp8_report

CASES = {
    "matmul": lambda w, x: x @ w,
    "vector": lambda w, x: x[0, 0] @ w,
    "weight first": lambda w, x: w.T @ x[0].T,
    "dot_general": lambda w, x: lax.dot_general(x, w, (((2,), (0,)), ((), ()))),
    "weight first, dot_general": lambda w, x: lax.dot_general(w, x, (((0,), (2,)), ((), ()))),
    "einsum": lambda w, x: jnp.einsum("bsk,kn->nsb", x, w),
    "heads": lambda w, x: jnp.einsum("bsk,khd->bhsd", x, w.reshape(64, 6, 8)),
    "heads, transposed": lambda w, x: jnp.einsum("bsk,dhk->bshd", x, w.reshape(64, 6, 8).T),
    "two contracting": lambda w, x: jnp.einsum(
        "bshd,hdn->bsn", x.reshape(2, 3, 4, 16), w.reshape(4, 16, 48)
    ),
    "two contracting, swapped": lambda w, x: jnp.einsum(
        "bsdh,dhn->nbs",
        x.reshape(2, 3, 4, 16).swapaxes(2, 3),
        w.reshape(4, 16, 48).swapaxes(0, 1),
    ),
    "vmap": lambda w, x: jax.vmap(jax.vmap(lambda x: w.T @ x))(x),
    "size 1": lambda w, x: jnp.squeeze(x @ w[None, :, None].swapaxes(1, 2)[0, 0], ()),
    "batch of size 1": lambda w, x: lax.dot_general(x[:1], w[None], (((2,), (1,)), ((0,), (0,)))),
    "copy": lambda w, x: x @ jnp.copy(lax.stop_gradient(lax.optimization_barrier((x, w))[1])),
    "device_put": lambda w, x: x @ jax.device_put(w),
    "integer x": lambda w, x: jnp.round(x * 4).astype(jnp.int32) @ w,
}


def test_products_of_a_matrix():
    assert_each_runs_as_fp8(CASES, kernel(64, 48), normal(2, 3, 64))


@pytest.mark.parametrize("name", CASES)
def test_each_product_of_a_matrix_is_one_matmul(name):
    (leaf,) = fp8_report(CASES[name], kernel(64, 48), normal(2, 3, 64)).leaves
    assert (leaf.matmuls, leaf.notes) == (1, "")


def test_a_conversion_does_not_round_the_weight():
    def fn(w, x):
        return (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32)

    w, x = kernel(64, 48), normal(2, 3, 64)
    assert fp8_report(fn, w, x).leaves[0].matmuls == 1
    assert_close(fp8(fn, weight_only=True)(w, x), fn(w.dequantize(), x), 2e-3)


STACKED = {
    "static index": (lambda w, x: x @ w[2], 1),
    "negative index": (lambda w, x: x @ w[-1], 1),
    "unstack": (lambda w, x: [x @ m for m in jnp.unstack(w)], 4),
    "iterate": (lambda w, x: [x @ m for m in w], 4),
    "slice and slice": (lambda w, x: x @ w[1:][1:3][1], 1),
    "step": (lambda w, x: x @ w[1::2][1], 1),
    "split": (lambda w, x: [x @ m[0] for m in jnp.split(w, 4)], 4),
    "dynamic index": (lambda w, x: x @ w[jnp.argmax(x[0, 0]) % 4], 1),
    "dynamic_index_in_dim": (
        lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.int32(2), keepdims=False),
        1,
    ),
    "take, clipped": (lambda w, x: x @ jnp.take(w, jnp.int32(2), axis=0, mode="clip"), 1),
    "batch": (lambda w, x: jnp.einsum("eck,ekn->ecn", jnp.stack([x[0]] * 4), w), 1),
    "batch last": (lambda w, x: jnp.einsum("cke,ekn->nec", jnp.stack([x[0]] * 4, 2), w), 1),
    "all of the stack": (lambda w, x: jnp.einsum("bsk,ekn->bsen", x, w), 1),
    "some of the stack": (lambda w, x: jnp.einsum("bsk,ekn->bens", x, w[1:3]), 1),
    "grid of the stack": (
        lambda w, x: jnp.einsum("bsk,bekn->ensb", x, w.reshape(2, 2, 64, 48)),
        1,
    ),
    "vmap over both": (lambda w, x: jax.vmap(jnp.matmul)(jnp.stack([x[0]] * 4), w), 1),
}


def test_products_of_a_stack():
    cases = {name: fn for name, (fn, _) in STACKED.items()}
    assert_each_runs_as_fp8(cases, kernel(4, 64, 48), normal(2, 3, 64))


@pytest.mark.parametrize("name", STACKED)
def test_each_product_of_a_stack_is_a_matmul(name):
    fn, matmuls = STACKED[name]
    (leaf,) = fp8_report(fn, kernel(4, 64, 48), normal(2, 3, 64)).leaves
    assert (leaf.matmuls, leaf.notes) == (matmuls, "")


@pytest.mark.parametrize("shape", [(1, 48), (64, 1), (1, 1), (1, 64, 48), (3, 1, 48)])
def test_axes_of_size_1(shape):
    def fn(w, x):
        return jnp.einsum("bk,...kn->...bn", x, w)

    assert_runs_as_fp8(fn, kernel(*shape), normal(2, shape[-2]), matmuls=1)


# Several dimensions in or out ---------------------------------------------------------------------

DENSE = {  # what contracts, shape of the weight, of x, and the product
    "heads out": ((-3,), (64, 4, 24), (2, 3, 64), "bsk,khd->bshd"),
    "heads out, other order": ((-3,), (64, 4, 24), (2, 3, 64), "bsk,khd->bdsh"),
    "heads in": ((-3, -2), (4, 16, 48), (2, 3, 4, 16), "bshd,hde->bse"),
    "heads in, other order": ((-3, -2), (4, 16, 48), (16, 3, 2, 4), "dsbh,hde->bse"),
    "out, heads": ((-2, -1), (48, 4, 16), (2, 3, 4, 16), "bshd,ehd->bse"),
    "in and out": ((-4, -3), (4, 16, 3, 16), (2, 4, 16), "bij,ijkl->bkl"),
    "heads of matrices": ((-2,), (4, 64, 16), (2, 3, 64), "bsk,hkd->bshd"),
    "heads of cut blocks": ((-2,), (4, 64, 24), (2, 3, 64), "bsk,hkd->bshd"),
    "heads of rows": ((-1,), (4, 16, 64), (2, 3, 64), "bsk,hdk->bhsd"),
    "key and value": ((-2,), (2, 4, 64, 16), (3, 64), "sk,chkd->cshd"),
    "experts": ((-2,), (3, 64, 48), (3, 5, 64), "etk,ekf->etf"),
    "experts of heads": ((-3,), (3, 64, 2, 16), (3, 5, 64), "etk,ekhd->ethd"),
}


@pytest.mark.parametrize("name", DENSE)
def test_products_of_several_dimensions(name):
    dims, shape, x, equation = DENSE[name]
    w, x = contracting(dims, *shape), normal(*x)
    assert_runs_as_fp8(lambda w, x: jnp.einsum(equation, x, w), w, x, matmuls=1)


def test_layers_of_several_dimensions_are_scanned_by_their_index():
    w = contracting((-3,), 3, 64, 4, 16)

    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.einsum("bk,khd->bhd", x, w).reshape(x.shape), None), x, w)

    assert_runs_as_fp8(fn, w, normal(2, 64), matmuls=3)


@pytest.mark.parametrize("shape", [(4, 64, 16), (3, 4, 64, 16)])
def test_heads_of_matrices_are_one_product_if_their_blocks_are_whole(shape):
    """Of a layer that is picked by a traced index too: `[heads, in, head_dim]`, as Gemma has it."""

    def fn(w, x, i):
        w = w[i] if w.ndim == 4 else w
        return jnp.einsum("bk,hkd->bhd", x, w)

    w, x, i = contracting((-2,), *shape), normal(2, 64), jnp.int32(1)
    assert_close(fp8(fn, weight_only=True)(w, x, i), fn(w.dequantize(), x, i))
    jaxpr = jax.make_jaxpr(fp8(fn))(w, x, i)
    (product,) = (e for e in jaxpr.eqns if e.params.get("name") == "fp8_matmul")
    avals: list[Any] = [v.aval for v in product.invars]
    assert (*shape[:-3], 64, 64) in {a.shape for a in avals}
    assert "scan" not in {e.primitive.name for e in jaxpr.eqns}


# Experts ------------------------------------------------------------------------------------------


def experts(w, x, sizes):
    return lax.ragged_dot(x, w, sizes)


def test_ragged_dot_of_experts():
    assert_runs_as_fp8(
        experts, contracting((-2,), 3, 64, 48), normal(9, 64), jnp.array([4, 0, 5]), matmuls=1
    )


def test_ragged_dot_of_experts_that_are_transposed_for_it():
    assert_runs_as_fp8(
        lambda w, x, sizes: lax.ragged_dot(x, w.swapaxes(1, 2), sizes),
        contracting((-1,), 3, 48, 64),
        normal(9, 64),
        jnp.array([4, 0, 5]),
        matmuls=1,
    )


def test_ragged_dot_of_one_matrix():
    w, x = kernel(64, 48), normal(9, 64)
    assert_runs_as_fp8(
        lambda w, x, n: lax.ragged_dot(x, w[None], n), w, x, jnp.array([9]), matmuls=1
    )
    stack = contracting((-2,), 1, 64, 48)
    assert_runs_as_fp8(experts, stack, x, jnp.array([9]), matmuls=1)


def test_ragged_dot_of_the_experts_of_a_layer():
    def fn(w, x, sizes):
        def layer(x, w):
            return jnp.tanh(lax.ragged_dot(x, w, sizes)), None

        return lax.scan(layer, x, w)[0], lax.ragged_dot(x, w[1], sizes)

    w, x = contracting((-2,), 2, 3, 64, 64), normal(9, 64)
    assert_runs_as_fp8(fn, w, x, jnp.array([4, 0, 5]), matmuls=3)


def test_gradients_through_ragged_dot():
    def loss(x, w, run):
        return jnp.sum(run(w, x, jnp.array([4, 0, 5])) ** 2)

    w, x = contracting((-2,), 3, 64, 48), normal(9, 64)
    expected = jax.grad(loss)(x, w.dequantize(), experts)
    assert_close(jax.grad(loss)(x, w, fp8(experts, weight_only=True)), expected, 1e-4)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (
            lambda w, x, sizes: lax.ragged_dot(x, w.swapaxes(1, 2), sizes),
            "it contracts the output axis of the blocks; Rule(contracting=(-1,)) fits this use",
        ),
        (
            lambda w, x, sizes: lax.ragged_dot(x, w[1:], sizes),
            "the groups are no consecutive matrices of the stack",
        ),
    ],
)
def test_ragged_dots_that_do_not_fit_the_blocks(fn, why):
    w, x = contracting((-2,), 4, 64, 64), normal(9, 64)
    sizes = jnp.array([4, 0, 5, 0])[: 4 if "output" in why else 3]
    with pytest.warns(UserWarning, match="in no FP8 product"):
        report = assert_runs_as_fp8(fn, w, x, sizes, dequantized_leaves=1)
    assert report.leaves[0].dequantized[0][2] == why


# Uses that do not fit the blocks ------------------------------------------------------------------

REFUSED = {  # what contracts in the storage, shape, the use, and what fits it
    "heads taken for layers": ((-2,), (4, 16, 48), "bshd,hde->bse", "(-3, -2)"),
    "out taken for in": ((-3,), (4, 16, 48), "bshd,hde->bse", "(-3, -2)"),
    "heads taken for in": ((-3, -2), (4, 16, 48), "bhse,hde->bhsd", "(-1,)"),
    "layers taken for in": ((-3,), (4, 16, 48), "hbd,hde->hbe", "(-2,)"),
    "transposed": ((-3, -2), (4, 16, 48), "bse,hde->bshd", "(-1,)"),
    "the outer two": ((-3,), (4, 16, 48), "bhe,hde->bd", None),
    "a batch after them": ((-3,), (4, 16, 48), "ebh,hde->ebd", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_report_says_which_rule_would_fit(name):
    dims, shape, equation, fitting = REFUSED[name]
    sizes = dict(zip(equation.split(",")[1].split("->")[0], shape, strict=True))
    x = normal(*(sizes.get(letter, 2) for letter in equation.split(",")[0]))

    def fn(w, x):
        return jnp.einsum(equation, x, w)

    with pytest.warns(UserWarning, match="in no FP8 product"):
        assert_runs_as_fp8(fn, contracting(dims, *shape), x, dequantized_leaves=1)
    ((primitive, line, why),) = fp8_report(fn, contracting(dims, *shape), x).leaves[0].dequantized
    assert primitive == "dot_general"
    assert "test_product.py:" in line
    if fitting is None:
        assert "Rule" not in why
    else:
        assert why.endswith(f"; Rule(contracting={fitting}) fits this use")
        fitted = contracting(tuple(map(int, fitting.strip("(),").split(","))), *shape)
        assert_runs_as_fp8(fn, fitted, x, matmuls=1)


# Slices and look-ups ------------------------------------------------------------------------------

SLICES = {  # blocks of a kernel [64, 48] are 32 in, 16 out
    "out": lambda w, x: x @ w[:, 16:32],
    "out, to the end": lambda w, x: x @ w[:, 32:],
    "in": lambda w, x: x[..., :32] @ w[:32],
    "heads": lambda w, x: jnp.einsum("bsk,khd->bshd", x, w.reshape(64, 3, 2, 8)[:, 1:, 1]),
    "split": lambda w, x: [x @ v for v in jnp.split(w, 3, axis=1)],
    "in a jitted function": lambda w, x: x @ jax.jit(lambda w: w[:, :16])(w),
}


@pytest.mark.parametrize("name", [n for n in SLICES if n != "heads"])
def test_a_slice_of_whole_blocks_stays_quantized(name):
    assert_runs_as_fp8(SLICES[name], kernel(64, 48), normal(2, 3, 64))


def test_a_slice_of_whole_heads_stays_quantized():
    w = contracting((-3,), 64, 4, 16)
    fn = SLICES["heads"]
    assert_runs_as_fp8(lambda w, x: jnp.einsum("bk,khd->bhd", x, w[:, 1:3]), w, normal(2, 64))
    assert "cuts blocks" in fp8_report(fn, kernel(64, 48), normal(2, 3, 64)).leaves[0].notes


LOOKUPS = {
    "rows": lambda w, ids: w[ids],
    "rows, filled": lambda w, ids: jnp.take(w, ids, axis=0),
    "rows, clipped": lambda w, ids: jnp.take(w, ids, axis=0, mode="clip"),
    "columns": lambda w, ids: w[:, ids],
    "one row": lambda w, ids: w[ids[0, 1]],
    "vmap": lambda w, ids: jax.vmap(lambda i: w[i])(ids[0]),
}


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
@pytest.mark.parametrize("table", [kernel(48, 64), jq.quantize(normal(48, 64), BLOCKS)])
@pytest.mark.parametrize("name", LOOKUPS)
def test_a_look_up_dequantizes_what_it_looks_up(name, table):
    fn, ids = LOOKUPS[name], jnp.array([[0, 17, 47], [5, -1, 99]])
    np.testing.assert_array_equal(fp8(fn)(table, ids), fn(table.dequantize(), ids))
    (leaf,) = fp8_report(fn, table, ids).leaves
    ((_, line, why),) = leaf.dequantized
    assert "test_product.py:" in line
    assert why in ("only what it looks up", "a slice that cuts blocks")
    jaxpr = jax.make_jaxpr(fp8(fn))(table, ids)
    assert not [v for v in outputs(jaxpr) if v.shape[-2:] in ((48, 64), (64, 48)) and v.size > 999]


def outputs(jaxpr):
    """All results of floating dtypes of more than a byte, of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                yield from outputs(value)
        for v in eqn.outvars:
            if jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.dtype.itemsize > 1:
                yield v.aval


def test_a_tied_embedding_is_looked_up_and_multiplied():
    table = jq.quantize(normal(48, 64), BLOCKS)
    report = assert_runs_as_fp8(
        lambda w, ids: w[ids] @ w.T, table, jnp.array([3, 4]), matmuls=1, dequantized_leaves=1
    )
    assert report.leaves[0].notes.endswith(": only what it looks up")


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_matrices_that_are_looked_up_stay_quantized(mode):
    """Also where NaN fills in for a matrix that is none."""
    experts, x = kernel(4, 64, 48), normal(2, 64)

    def fn(w, x, ids):
        return jnp.einsum("tk,tkn->tn", x, jnp.take(w, ids, axis=0, mode=mode))

    ids = jnp.array([3, 1])
    assert_runs_as_fp8(fn, experts, x, ids, matmuls=1)
    y = fp8(fn)(experts, x, jnp.array([3, 7]))
    assert jnp.isnan(y).any(axis=1).tolist() == [False, mode == "fill"]


def test_weights_that_are_out_in():
    w = jq.quantize(normal(48, 64, seed=1))
    assert_runs_as_fp8(lambda w, x: x @ w.T, w, normal(2, 64), matmuls=1)
    assert_runs_as_fp8(lambda w, x: jnp.einsum("nk,bk->bn", w, x), w, normal(2, 64), matmuls=1)


def test_activations_are_quantized_as_by_matmul():
    w, x = kernel(256, 48), normal(3, 256)
    y = fp8(lambda w, x: x @ w)(w, x)
    np.testing.assert_array_equal(y, jq.matmul(x, w))
    assert float(jnp.abs(y - x @ w.dequantize()).max()) > 0.01  # not what weight-only gives


def test_the_result_has_the_dtype_of_the_program():
    w, x = kernel(64, 48, dtype=jnp.bfloat16), normal(3, 64, dtype=jnp.bfloat16)
    assert fp8(lambda w, x: x @ w)(w, x).dtype == jnp.bfloat16
    run = fp8(lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    np.testing.assert_array_equal(run(w, x), jq.matmul(x, w, preferred_element_type=jnp.float32))


def test_nothing_stands_between_the_stored_weight_and_the_product():
    """One equation: the layer's index is a constant, the stack goes into the product whole."""
    w, x = kernel(4, 64, 48), normal(3, 64)
    jaxpr = jax.make_jaxpr(fp8(lambda w, x: x @ w[2].astype(jnp.float32)))(w, x)
    (eqn,) = jaxpr.eqns
    assert eqn.params["name"] == "fp8_matmul"
    avals: list[Any] = [v.aval for v in eqn.invars]
    assert {a.shape for a in avals} == {(3, 64), (4, 48, 64), (4, 3, 2), ()}


# What is dequantized ------------------------------------------------------------------------------

DEQUANTIZED = {
    "add": (lambda w, x: x @ (w + 1), "add", ""),
    "gather": (lambda w, x: w[jnp.array([1, 2])], "gather", "only what it looks up"),
    "points": (lambda w, x: w[jnp.array([1, 2]), jnp.array([3, 4])], "gather", ""),
    "concatenate": (
        lambda w, x: x @ jnp.concatenate([w, w], axis=1),
        "concatenate",
        "joined with other arrays; join the results of their products instead",
    ),
    "slice": (lambda w, x: x @ w[:, :24], "slice", "a slice that cuts blocks"),
    "other axis": (
        lambda w, x: x[..., :48] @ w.T,
        "dot_general",
        "it contracts the output axis of the blocks; Rule(contracting=(-1,)) fits this use",
    ),
    "part": (
        lambda w, x: jnp.einsum("bsk,hkn->bshn", x[..., :16], w.reshape(4, 16, 48)),
        "dot_general",
        "it contracts a part of the contraction axis",
    ),
    "reshape": (
        lambda w, x: jnp.sum(w.reshape(96, 32)),
        "reshape",
        "the blocks do not fit shape [96, 32]",
    ),
    "result": (lambda w, x: w.T, "a result", ""),
    "broadcast": (lambda w, x: jnp.broadcast_to(w, (2, 64, 48)), "broadcast_in_dim", ""),
}


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
def test_what_needs_the_values_gets_them():
    cases = {name: fn for name, (fn, _, _) in DEQUANTIZED.items()}
    assert_each_runs_as_fp8(cases, kernel(64, 48), normal(2, 3, 64))


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_what_needs_the_values_is_reported(name):
    fn, primitive, reason = DEQUANTIZED[name]
    (leaf,) = fp8_report(fn, kernel(64, 48), normal(2, 3, 64)).leaves
    ((seen, line, why),) = leaf.dequantized
    assert (seen, why) == (primitive, reason)
    if name != "result":
        assert "test_product.py:" in line


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
def test_a_stack_that_is_contracted_is_named():
    w = kernel(4, 64, 48)
    report = fp8_report(lambda w, x: jnp.einsum("bek,ekn->bn", x, w), w, normal(2, 4, 64))
    ((_, _, why),) = report.leaves[0].dequantized
    assert why == (
        "it contracts an axis along which the weight was taken for a stack of matrices; "
        "Rule(contracting=(-3, -2)) fits this use"
    )


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
def test_the_product_of_two_quantized_arrays():
    v, w = kernel(64, 48), kernel(48, 32, seed=1)
    report = assert_runs_as_fp8(lambda v, w: v @ w, v, w, dequantized_leaves=2)
    assert report.leaves[0].dequantized[0][2] == "a product of two quantized arrays"


def test_a_weight_is_dequantized_once_and_only_the_layer_that_is_used():
    w = kernel(4, 64, 48)

    def fn(w, x):
        m = w[1]
        return jnp.sum(m) + jnp.max(m) + jnp.sum(x @ m)

    jaxpr = jax.make_jaxpr(fp8(fn))(w, normal(2, 64))
    calls = [e for e in jaxpr.eqns if e.params.get("name") == "_dequantize"]
    assert len(calls) == 1
    aval: Any = calls[0].outvars[0].aval
    assert aval.shape == (1, 48, 64)
    assert_close(fp8(fn, weight_only=True)(w, normal(2, 64)), fn(dequantized(w), normal(2, 64)))


def test_no_tokens():
    w, stack = kernel(64, 48), kernel(4, 64, 48)
    assert fp8(lambda w, x: x @ w)(w, jnp.zeros((0, 64))).shape == (0, 48)
    batch = fp8(lambda w, x: jnp.einsum("eck,ekn->ecn", x, w))
    assert batch(stack, jnp.zeros((4, 0, 64))).shape == (4, 0, 48)
