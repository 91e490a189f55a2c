"""`fp8` as a function transformation: what it composes with, what it keeps, what it refuses."""

import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_checks import assert_close, dequantized, is_quantized, kernel, normal

import jaxquant as jq
from jaxquant.errors import JaxquantError
from jaxquant.transform import Fp8Report, fp8, fp8_report

PARAMS = {
    "up": {"kernel": kernel(64, 96), "bias": normal(96, seed=1)},
    "down": {"kernel": kernel(96, 64), "bias": normal(64, seed=2)},
}
X = normal(2, 64)


def mlp(params, x):
    h = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return h @ params["down"]["kernel"] + params["down"]["bias"]


def direct(params, x):
    """The same, written for QuantizedArrays."""
    h = jax.nn.gelu(jq.matmul(x, params["up"]["kernel"]) + params["up"]["bias"])
    return jq.matmul(h, params["down"]["kernel"]) + params["down"]["bias"]


def test_is_what_direct_calls_of_matmul_give():
    np.testing.assert_array_equal(fp8(mlp)(PARAMS, X), direct(PARAMS, X))
    np.testing.assert_array_equal(jax.jit(fp8(mlp))(PARAMS, X), jax.jit(direct)(PARAMS, X))
    np.testing.assert_array_equal(fp8(jax.jit(mlp))(PARAMS, X), jax.jit(direct)(PARAMS, X))


def test_vmap_over_activations():
    xs = normal(3, 2, 64)
    y = jax.vmap(fp8(mlp), in_axes=(None, 0))(PARAMS, xs)
    assert_close(y, fp8(mlp)(PARAMS, xs))


def test_vmap_over_an_ensemble_of_weights():
    ensemble = kernel(3, 64, 96)
    y = jax.vmap(fp8(lambda w, x: x @ w), in_axes=(0, None))(ensemble, X)
    each = [jq.matmul(X, jax.tree.map(lambda a, i=i: a[i], ensemble)) for i in range(3)]
    assert_close(y, jnp.stack(each))


def test_gradients_to_activations_and_to_what_is_not_quantized():
    def loss(biases, x, run, params):
        params = {k: {**v, "bias": biases[k]} for k, v in params.items()}
        return jnp.sum(run(params, x) ** 2)

    biases = {k: v["bias"] for k, v in PARAMS.items()}
    grad = jax.grad(loss, argnums=(0, 1))
    expected = grad(biases, X, mlp, dequantized(PARAMS))
    assert_close(grad(biases, X, fp8(mlp, weight_only=True), PARAMS), expected)
    assert_close(
        jax.jit(grad, static_argnums=2)(biases, X, fp8(mlp, weight_only=True), PARAMS), expected
    )
    # Straight through the rounding: near, and not zero.
    assert_close(grad(biases, X, fp8(mlp), PARAMS), expected, tolerance=0.1)


def test_a_gradient_inside_the_function_dequantizes_for_the_backward_product():
    def fn(params, x):
        return jax.grad(lambda x: jnp.sum(mlp(params, x)))(x)

    expected = fn(dequantized(PARAMS), X)
    assert_close(fp8(fn, weight_only=True)(PARAMS, X), expected)
    up = fp8_report(fn, PARAMS, X).leaves[1]
    assert up.matmuls == 1
    ((_, _, why),) = up.dequantized
    assert why.startswith("it contracts the output axis")


def test_weights_are_constants_also_where_they_are_dequantized():
    w = kernel(64, 96)
    run = fp8(lambda scale, w: jnp.sum((w * scale) ** 2))
    with pytest.warns(UserWarning, match="in no FP8 product"):
        grad = jax.grad(run)(2.0, w)
    assert_close(grad, 4 * jnp.sum(w.dequantize() ** 2), tolerance=1e-4)


def test_eval_shape_lowering_and_donation():
    assert jax.eval_shape(fp8(mlp), PARAMS, X) == jax.ShapeDtypeStruct((2, 64), jnp.float32)
    compiled = jax.jit(fp8(mlp), donate_argnums=1).lower(PARAMS, X).compile()
    x = X + 0
    assert_close(compiled(PARAMS, x), direct(PARAMS, X))
    assert x.is_deleted()


def test_sharded_weights():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("model")
    w = kernel(64, 128)
    sharded = jax.device_put(w, jax.NamedSharding(mesh, spec))
    y = jax.jit(fp8(lambda w, x: x @ w))(sharded, X)
    np.testing.assert_allclose(y, jq.matmul(X, w), rtol=1e-5, atol=1e-5)


def test_the_function_runs_once_for_each_signature():
    traced = []

    def fn(w, x, *, flag=False):
        traced.append(x.shape)
        return x @ w if flag else 2 * (x @ w)

    run, w = fp8(fn), kernel(64, 96)
    run(w, X)
    run(kernel(64, 96, seed=3), X + 1)
    assert len(traced) == 1
    assert_close(run(w, X, flag=True) * 2, run(w, X))
    assert len(traced) == 2
    run(w, normal(3, 64))
    assert len(traced) == 3


def test_tracing_32_layers_takes_less_than_3_seconds():
    """224 products, of shapes alone; it takes about twice what `jax.make_jaxpr` of `fn` takes."""
    weights = [jax.eval_shape(lambda w: w, kernel(64, 64))] * (7 * 32)

    def fn(weights, x):
        for w in weights:
            x = jax.nn.silu(x @ w) + x
        return x

    start = time.perf_counter()
    jaxpr = jax.make_jaxpr(fp8(fn))(weights, jax.ShapeDtypeStruct((1, 64), jnp.float32))
    assert time.perf_counter() - start < 3
    products = [e for e in jaxpr.eqns if e.params.get("name") == "fp8_matmul"]
    assert len(products) == 224
    assert len({id(e.params["jaxpr"]) for e in products}) == 1


def test_python_values_stay_what_they_are():
    """Control flow on them works, and what is equal to another type's value is not mixed up."""

    def fn(w, x, mode, n, activation):
        assert isinstance(mode, str)
        for _ in range(n):
            x = activation(x @ w)
        return x, type(n).__name__

    seen = []

    def record(w, x, n):
        seen.append(type(n))
        return x @ w * n

    w = kernel(64, 64)
    first: Callable = fp8(lambda *args: fn(*args)[0])
    y = first(w, X, "train", 2, jnp.tanh)
    assert y.shape == X.shape
    run: Callable = fp8(record)
    for n in (1, True, 1.0):
        run(w, X, n)
    assert seen == [int, bool, float]


def test_static_arguments_of_jit_reach_the_function_by_name():
    run = jax.jit(fp8(lambda w, x, scale=1: x @ w * scale), static_argnames="scale")
    assert_close(run(PARAMS["up"]["kernel"], X, scale=2), 2 * run(PARAMS["up"]["kernel"], X))


def test_without_quantized_arrays_it_is_the_function_itself():
    calls = []

    def fn(params, x):
        calls.append(float(x[0, 0]))  # fine, as nothing is traced
        return mlp(params, x)

    run = fp8(fn)
    assert_close(run(dequantized(PARAMS), X), mlp(dequantized(PARAMS), X))
    run(dequantized(PARAMS), X)
    assert len(calls) == 2


def test_integer_inputs_and_other_arrays_pass_through():
    def fn(params, tokens, table, mask):
        return jnp.where(mask, mlp(params, table[tokens]), 0), tokens + 1

    tokens, table = np.array([1, 0], np.int64), np.asarray(normal(4, 64))
    y, following = fp8(fn)(PARAMS, tokens, table, np.True_)
    np.testing.assert_array_equal(y, direct(PARAMS, jnp.asarray(table[tokens])))
    assert following.dtype == jnp.int32


def test_random_keys_pass_through():
    def fn(params, x, key):
        return mlp(params, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0))

    key = jax.random.key(3)
    assert_close(fp8(fn, weight_only=True)(PARAMS, X, key), fn(dequantized(PARAMS), X, key))


def test_parameters_that_are_returned_stay_quantized():
    params, y = fp8(lambda params, x: (params, mlp(params, x)))(PARAMS, X)
    assert params["up"]["kernel"] is PARAMS["up"]["kernel"]
    assert y.shape == (2, 64)


def test_a_callable_pytree_may_hold_the_weights():
    run = fp8(jax.tree_util.Partial(mlp, PARAMS))
    np.testing.assert_array_equal(run(X), direct(PARAMS, X))
    assert fp8_report(jax.tree_util.Partial(mlp, PARAMS), X).leaves[0].path.endswith("down/kernel")


def test_name_and_docstring_are_those_of_the_function():
    assert fp8(direct).__name__ == "direct"
    assert fp8(direct).__doc__ == "The same, written for QuantizedArrays."


# Report and warnings ------------------------------------------------------------------------------


def test_the_report_of_a_whole_model():
    def fn(params, x):
        return mlp(params, x) + mlp(params, x) + jnp.sum(params["up"]["kernel"])

    params = {**PARAMS, "left": {"kernel": kernel(64, 64)}}
    report = fp8_report(fn, params, X)
    assert isinstance(report, Fp8Report)
    down, left, up = report.leaves
    assert (down.path, down.shape, down.matmuls, down.notes) == ("down/kernel", (96, 64), 2, "")
    assert (left.matmuls, left.notes) == (0, "not used")
    assert up.matmuls == 2
    ((primitive, line, why),) = up.dequantized
    assert (primitive, why) == ("reduce_sum", "")
    assert "test_fp8.py:" in line
    assert report.idle == (left,)
    assert report.dequantized == (up,)
    text = str(report)
    assert "4 FP8 matmuls of 3 quantized arrays; 1 dequantized, 1 in no matmul" in text
    assert "dequantized for reduce_sum at " in text
    assert "<td>down/kernel</td>" in report._repr_html_()


def test_the_report_of_what_a_library_has_jitted():
    """Its equations have no line of user code of their own."""
    w = kernel(64, 64)
    (leaf,) = fp8_report(lambda w: jax.jit(jnp.linalg.norm)(w) + jnp.var(w), w).leaves
    assert leaf.matmuls == 0
    assert leaf.dequantized
    assert all("test_fp8.py:" in line for _, line, _ in leaf.dequantized)


def test_the_report_takes_shapes_and_counts_layers_together():
    layers = [{"kernel": kernel(64, 64)} for _ in range(3)]
    shapes = jax.eval_shape(lambda: layers)

    def fn(layers, x):
        for layer in layers:
            x = x @ layer["kernel"]
        return x

    report = fp8_report(fn, shapes, jax.ShapeDtypeStruct((1, 64), jnp.float32))
    assert str(report).splitlines()[2].split() == ["*/kernel", "3", "64x64", "3"]


def test_a_weight_in_no_product_warns_once():
    run = fp8(lambda w, x: x + jnp.sum(w, axis=1))
    with pytest.warns(
        UserWarning, match=r"in no FP8 product: argument 0 \(dequantized for reduce_s"
    ):
        run(PARAMS["up"]["kernel"], X)
    with warnings.catch_warnings(action="error"):
        run(PARAMS["up"]["kernel"], X)
    with pytest.warns(UserWarning, match=r"down/kernel \(not used\)") as caught:
        fp8(lambda params, x: x @ params["up"]["kernel"])(PARAMS, X)
    assert caught[0].filename == __file__


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look",
    [
        float,
        bool,
        np.asarray,
        lambda s: [0, 1][s.astype(int)],
        lambda s: jnp.arange(3)[jnp.arange(3) > s],
    ],
)
def test_a_function_that_looks_at_values(look):
    def fn(w, x):
        look(jnp.sum(w))
        return x @ w

    with pytest.raises(JaxquantError, match=r"needs the value of an array at .*test_fp8.py:\d+, "):
        fp8(fn)(PARAMS["up"]["kernel"], X)


def test_an_argument_that_cannot_be_static():
    with pytest.raises(JaxquantError, match="fp8: options/x is a set, neither an array nor") as e:
        fp8(lambda params, options: 0)(PARAMS, {"options": {"x": {1}}})
    assert "hashable" in str(e.value)


def test_a_report_without_quantized_arrays():
    with pytest.raises(JaxquantError, match="fp8_report: no QuantizedArray among the arguments"):
        fp8_report(mlp, dequantized(PARAMS), X)


def test_errors_of_the_function_are_its_own():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        fp8(mlp)(PARAMS, normal(2, 63))


def test_the_tree_under_test_is_quantized():
    assert sum(map(is_quantized, jax.tree.leaves(PARAMS, is_leaf=is_quantized))) == 2
