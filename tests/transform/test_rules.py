"""Quantized arrays inside jit, scan, while, cond, remat, custom derivatives and shard_map."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_checks import (
    assert_close,
    assert_each_runs_as_fp8,
    assert_runs_as_fp8,
    contracting,
    kernel,
    normal,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxquant as jq
from jaxquant.transform import fp8, fp8_report

W, STACK, X = kernel(64, 64), kernel(4, 64, 64), normal(2, 64)


def layer(x, w):
    return jnp.tanh(x @ w) + x


def scan_inputs(stack, x, **kwargs):
    return lax.scan(lambda x, w: (layer(x, w), x.sum()), x, stack, **kwargs)


def scan_constant(w, x):
    return lax.scan(lambda x, _: (layer(x, w), None), x, length=3)[0]


def scan_carry(w, x):
    """The parameters go round in the carry, as in a training loop's state."""
    return lax.fori_loop(0, 3, lambda _, s: (s[0], jax.jit(layer)(s[1], s[0])), (w, x))[1]


def while_carry(w, x):
    def body(state):
        i, w, x = state
        return i + 1, w, layer(x, w)

    return lax.while_loop(lambda s: (s[0] < 3) & (jnp.max(s[2]) < 1e6), body, (0, w, x))[2]


def while_index(stack, x):
    return lax.while_loop(
        lambda s: s[0] < 4, lambda s: (s[0] + 1, layer(s[1], stack[s[0]])), (0, x)
    )[1]


def while_condition(w, x):
    return lax.while_loop(lambda x: jnp.sum(x @ w) > 1e9, lambda x: x + x @ w, x)


def cond(w, x):
    return lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 2 * (x @ w), w)


def switch(stack, x):
    return lax.switch(jnp.int32(1), [lambda w, i=i: x @ w[i] for i in range(3)], stack)


@jax.custom_jvp
def with_jvp(x, w):
    return x @ w


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0] @ primals[1]))


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@jax.custom_batching.custom_vmap
def with_vmap(x, w):
    return x @ w


with_vmap.def_vmap(lambda size, batched, x, w: (x @ w, True))

MATRIX = {
    "jit": (lambda w, x: jax.jit(layer)(x, w), 1),
    "jit in jit": (lambda w, x: jax.jit(lambda w, x: jax.jit(layer)(x, w.T.T))(w, x), 1),
    "jit of a transpose": (lambda w, x: x @ jax.jit(jnp.transpose)(w).T, 1),
    "jit twice": (lambda w, x: jax.jit(layer)(jax.jit(layer)(x, w), w), 2),
    "scan constant": (scan_constant, 3),
    "scan carry": (scan_carry, 3),
    "while carry": (while_carry, 1),
    "while condition": (while_condition, 2),
    "cond": (cond, 2),
    "remat": (lambda w, x: jax.checkpoint(layer)(x, w), 1),
    "custom_jvp": (lambda w, x: with_jvp(x, w), 1),
    "custom_vjp": (lambda w, x: with_vjp(x, w), 1),
    "custom_vmap": (lambda w, x: with_vmap(x, w), 1),
    "lax.map": (lambda w, x: lax.map(lambda row: row @ w, x), 2),
    "vmap of scan": (
        lambda w, x: jax.vmap(functools.partial(scan_constant, w))(jnp.stack([x, 2 * x])),
        3,
    ),
}
STACKS = {
    "scan": (scan_inputs, 4),
    "scan reversed": (functools.partial(scan_inputs, reverse=True), 4),
    "scan unrolled": (functools.partial(scan_inputs, unroll=2), 4),
    "scan of part": (lambda w, x: scan_inputs(w[1:3], x), 2),
    "scan of a transpose": (lambda w, x: scan_inputs(w.mT, x @ jnp.eye(64)), None),
    "scan of pairs": (
        lambda w, x: lax.scan(lambda x, w: scan_inputs(w, x), x, w.reshape(2, 2, 64, 64)),
        4,
    ),
    "scan of index": (
        lambda w, x: lax.scan(lambda x, i: (layer(x, w[i]), None), x, jnp.arange(4))[0],
        4,
    ),
    "scan with remat": (
        lambda w, x: lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, w)[0],
        4,
    ),
    "lax.map": (lambda w, x: lax.map(lambda w: x @ w, w), 4),
    "while": (while_index, 1),
    "switch": (switch, 3),
}


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
@pytest.mark.parametrize(("cases", "w"), [(MATRIX, W), (STACKS, STACK)], ids=["matrix", "stack"])
def test_results(cases, w):
    assert_each_runs_as_fp8({name: fn for name, (fn, _) in cases.items()}, w, X)


@pytest.mark.parametrize("name", ["jit twice", "scan carry", "while carry", "cond", "remat"])
def test_results_op_by_op(name):
    assert_runs_as_fp8(MATRIX[name][0], W, X, op_by_op=True)


@pytest.mark.parametrize("name", MATRIX)
def test_a_matrix_stays_quantized(name):
    fn, matmuls = MATRIX[name]
    (leaf,) = fp8_report(fn, W, X).leaves
    assert (leaf.matmuls, leaf.notes) == (matmuls, "")


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_stays_quantized(name):
    fn, matmuls = STACKS[name]
    (leaf,) = fp8_report(fn, STACK, X).leaves
    if name == "scan of a transpose":
        assert "it contracts the output axis of the blocks" in leaf.notes
    else:
        assert (leaf.matmuls, leaf.notes) == (matmuls, "")


@pytest.mark.parametrize("name", ["jit", "remat", "scan constant", "scan", "scan with remat"])
def test_gradients_through_primitives_that_hold_a_jaxpr(name):
    (fn, _), w = (STACKS[name], STACK) if name in STACKS else (MATRIX[name], W)

    def loss(x, w, run):
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(run(w, x)))

    grad = jax.jit(jax.grad(loss), static_argnums=2)
    assert_close(grad(X, w, fp8(fn, weight_only=True)), grad(X, w.dequantize(), fn), 1e-4)


def test_a_scan_does_not_slice_the_stack():
    jaxpr = jax.make_jaxpr(fp8(scan_inputs))(STACK, X)
    (scan,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    (product,) = (e for e in scan.params["jaxpr"].eqns if e.params.get("name") == "fp8_matmul")
    assert (4, 64, 64) in {v.aval.shape for v in product.invars}


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
def test_loops_that_change_a_weight_or_scan_its_rows_dequantize_it():
    def decay(w, x):
        return lax.fori_loop(0, 2, lambda _, s: (s[0] / 2, s[1] @ s[0]), (w, x))[1]

    def rows(w, x):
        return lax.scan(lambda c, row: (c + row, None), x[0], w)[0]

    report = assert_runs_as_fp8(decay, W, X, dequantized_leaves=1)
    assert report.leaves[0].dequantized[0][2] == "the loop changes it"
    report = assert_runs_as_fp8(rows, W, X, dequantized_leaves=1)
    assert report.leaves[0].dequantized[0][2] == "scanned along an axis of the blocks"


def test_a_result_of_jit_that_is_the_weight_is_the_weight():
    y, w = fp8(jax.jit(lambda w, x: (x @ w, w)))(W, X)
    assert w is W
    np.testing.assert_array_equal(y, jq.matmul(X, W))


def test_calls_of_one_jitted_function_share_its_trace():
    traced = []

    @jax.jit
    def block(x, w):
        traced.append(w.shape)
        return layer(x, w)

    weights = [kernel(64, 64, seed=i) for i in range(5)]
    jaxpr = jax.make_jaxpr(fp8(lambda ws, x: functools.reduce(block, ws, x)))(weights, X)
    assert len(traced) == 1
    assert len({id(e.params["jaxpr"]) for e in jaxpr.eqns}) == 1
    assert {e.params["name"] for e in jaxpr.eqns} == {"block"}


def test_custom_derivatives_without_a_weight_keep_their_rules():
    @jax.custom_vjp
    def clip_gradient(x):
        return x

    clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))

    def loss(w, x):
        return jnp.sum(100 * clip_gradient(x @ w))

    expected = jax.grad(loss, argnums=1)(W.dequantize(), X)
    assert_close(jax.grad(fp8(loss, weight_only=True), argnums=1)(W, X), expected)


def test_a_jitted_function_keeps_its_shardings_and_donations():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, P("data"))
    step = jax.jit(layer, in_shardings=(sharded, None), out_shardings=sharded, donate_argnums=0)
    x = normal(4, 64) + 0
    assert fp8(step)(x, W).sharding.is_equivalent_to(sharded, 2)
    step = jax.jit(layer, donate_argnums=0)
    fp8(step)(x, W)
    assert x.is_deleted()


# shard_map ---------------------------------------------------------------------------------------


def mesh_2x2():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def tensor_parallel(params, x):
    """Column-parallel, then row-parallel: one layer of an MLP as Megatron has it."""

    def body(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down[1], "model")

    specs = (P(None, "model"), P(None, "model", None), P("data"))
    run = jax.shard_map(body, mesh=mesh_2x2(), in_specs=specs, out_specs=P("data"))
    return run(params["up"], params["down"], x)


def test_shard_map_shards_the_blocks():
    params = {"up": kernel(64, 128), "down": kernel(2, 128, 64)}
    assert_runs_as_fp8(tensor_parallel, params, normal(4, 64), matmuls=2)


def test_shard_map_shards_heads():
    def fn(params, x):
        def body(query, out, x):
            h = jnp.tanh(jnp.einsum("bk,khd->bhd", x, query))
            return lax.psum(jnp.einsum("bhd,hdk->bk", h, out), "model")

        specs = (P(None, "model"), P("model"), P("data"))
        run = jax.shard_map(body, mesh=mesh_2x2(), in_specs=specs, out_specs=P("data"))
        return run(params["query"], params["out"], x)

    params = {"query": contracting((-3,), 64, 4, 16), "out": contracting((-3, -2), 4, 16, 64)}
    assert_runs_as_fp8(fn, params, normal(4, 64), matmuls=2)


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
def test_the_rule_that_fits_a_use_of_shards_is_that_of_the_whole():
    def fn(w, x):
        def body(w, x):
            return lax.psum(jnp.einsum("bhd,hde->be", x, w), "model")

        specs = (P("model"), P(None, "model"))
        return jax.shard_map(body, mesh=mesh_2x2(), in_specs=specs, out_specs=P())(w, x)

    w = contracting((-3,), 64, 4, 16)
    report = assert_runs_as_fp8(fn, w, normal(3, 64, 4), dequantized_leaves=1)
    assert report.leaves[0].notes.endswith("Rule(contracting=(-3, -2)) fits this use")


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
def test_shards_of_what_is_no_major_dimension():
    def fn(w, x):
        specs = (P(None, None, "model"), P())
        return jax.shard_map(
            lambda w, x: jnp.einsum("bk,khd->bhd", x, w),
            mesh=mesh_2x2(),
            in_specs=specs,
            out_specs=P(None, None, "model"),
        )(w, x)

    w = contracting((-3,), 64, 4, 16)
    report = assert_runs_as_fp8(fn, w, normal(4, 64), dequantized_leaves=1)
    assert report.leaves[0].dequantized[0][2] == "shards of a slice or a reshape of the weight"


@pytest.mark.filterwarnings("ignore:fp8. quantized, but in no FP8 product")
def test_shards_that_cut_blocks_are_dequantized():
    params = {"up": kernel(64, 48), "down": kernel(2, 48, 64)}
    report = assert_runs_as_fp8(tensor_parallel, params, normal(4, 64), dequantized_leaves=2)
    reasons = {leaf.dequantized[0][2] for leaf in report.leaves}
    assert reasons <= {
        "2 shards of 48 cut its blocks of 16",
        "2 shards of 48 cut its blocks of 32",
    }


def test_inside_shard_map():
    mesh = mesh_2x2()
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    run = jax.shard_map(fp8(lambda w, x: x @ w), mesh=mesh, **specs)
    np.testing.assert_array_equal(run(W, normal(4, 64)), jq.matmul(normal(4, 64), W))


def test_sharded_types_are_those_of_the_program():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
        x, w = put(X), jax.tree.map(put, STACK)
        out = NamedSharding(mesh, P(None, "model"))
        w = dataclasses.replace(w, qvalue=jax.device_put(w.qvalue, out))
        v = jax.device_put(STACK.dequantize(), NamedSharding(mesh, P(None, None, "model")))

        def fn(w, x):
            assert jax.typeof(w).sharding.spec == P(None, None, "model")
            return jnp.einsum("bk,kn->bn", x, w[0], out_sharding=P()), x @ w[1]

        expected, actual = jax.jit(fn)(v, x), jax.jit(fp8(fn, weight_only=True))(w, x)
        assert [jax.typeof(y) for y in actual] == [jax.typeof(y) for y in expected]
        assert_close(actual, expected)


def test_sharded_types_of_heads():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
        x, w = put(X), jax.tree.map(put, contracting((-3,), 64, 4, 16))
        out = NamedSharding(mesh, P("model"))
        w = dataclasses.replace(w, qvalue=jax.device_put(w.qvalue, out))

        def fn(w, x):
            assert jax.typeof(w).sharding.spec == P(None, "model", None)
            return jnp.einsum("bk,khd->bhd", x, w)

        y = jax.jit(fp8(fn, weight_only=True))(w, x)
        assert jax.typeof(y).sharding.spec == P(None, "model", None)
        assert_close(y, jnp.einsum("bk,khd->bhd", X, contracting((-3,), 64, 4, 16).dequantize()))


def test_report_counts_the_trips_of_nested_loops():
    def fn(w, x):
        return lax.scan(lambda x, _: (scan_constant(w, x), None), x, length=5)[0]

    assert fp8_report(fn, W, X).leaves[0].matmuls == 15
