"""The plain XLA matmul against its definition in float64, and what `matmul` refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hypothesis import given, strategies as st
from jax import lax
from jax.experimental import checkify
from numpy_reference import BF16, DTYPES, heavy_tailed, make_weight, normal, zero_blocks

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError
from jaxquant.matmul import RMSNorm, SiluMul, matmul

# Most calls are jitted: eager ones compile each operation by itself.
jitted = jax.jit(matmul, static_argnames=("preferred_element_type", "implementation"))

F32 = np.dtype(np.float32)
SCHEMES = ["dynamic", None]


def quantized(
    shape: tuple[int, ...],
    kind: Any = normal,
    *,
    block: Any = 128,
    scheme: str | None = "dynamic",
    dtype: np.dtype = BF16,
    seed: int = 0,
    **fields: Any,
) -> QuantizedArray:
    config = QuantConfig(weight_block_size=block, activation_scheme=scheme, **fields)
    return blocked.quantize(jnp.asarray(make_weight(kind, shape, dtype, seed)), config)


def activations(
    shape: tuple[int, ...], kind: Any = normal, dtype: np.dtype = BF16, seed: int = 1
) -> jax.Array:
    return jnp.asarray(make_weight(kind, shape, dtype, seed))


def definition(x: jax.Array, qa: QuantizedArray) -> tuple[np.ndarray, np.ndarray]:
    """y of the definition in float64, and the same sum over magnitudes, which bounds its error."""
    w = numpy_reference.dequantize(np.asarray(qa.qvalue), np.asarray(qa.scale), qa.block_size)
    a = np.asarray(x)
    if qa.activation_scheme == "dynamic":
        qvalue, scale = numpy_reference.quantize_activations(a)
        rows = qvalue.reshape(-1, a.shape[-1])
        a = numpy_reference.dequantize(rows, scale.reshape(len(rows), -1), (1, 128))
    a = a.reshape(-1, x.shape[-1]).astype(np.float64)
    shape = (*x.shape[:-1], w.shape[-2])
    return (a @ w.T).reshape(shape), (np.abs(a) @ np.abs(w).T).reshape(shape)


def assert_is_product(y: jax.Array, x: jax.Array, qa: QuantizedArray) -> None:
    """`|y - exact| <= (K + 3) 2^-24 sum_k |x w|`, and half an ulp of the result's dtype.

    The bound of any order of float32 sums of K products of two rounded factors.
    """
    exact, magnitude = definition(x, qa)
    K = x.shape[-1]
    eps = float(jnp.finfo(y.dtype).eps)
    bound = (K + 3) * 2.0**-24 * magnitude + eps / 2 * np.abs(exact) + 1e-38
    assert y.shape == exact.shape
    assert (np.abs(np.asarray(y, np.float64) - exact) <= bound * 1.01).all()


# The product --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@given(
    implementation=st.sampled_from(["xla", None]),
    M=st.sampled_from([1, 9]),
    NK=st.sampled_from([(1, 1), (130, 300), (256, 128)]),
    kinds=st.tuples(*[st.sampled_from([normal, heavy_tailed, zero_blocks])] * 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_product_is_its_definition(scheme, implementation, M, NK, kinds, dtype, seed):
    N, K = NK
    qa = quantized((N, K), kinds[0], scheme=scheme, dtype=F32, seed=seed)
    # Sums beyond the largest float16 are inf, and right, but not what is looked at here.
    x = activations((M, K), normal if dtype == np.float16 else kinds[1], dtype, seed + 1)
    out = jnp.float32 if dtype == np.float16 else None
    y = jitted(x, qa, implementation=implementation, preferred_element_type=out)
    assert y.dtype == (out or dtype)
    assert_is_product(y, x, qa)


@pytest.mark.parametrize("block", [64, 128, 256, (1, 128), (128, 64), (3, 5), (1024, 1024)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_block_size(block, scheme):
    qa = quantized((200, 320), heavy_tailed, block=block, scheme=scheme)
    x = activations((5, 320), dtype=F32)
    assert_is_product(jitted(x, qa), x, qa)


@pytest.mark.parametrize("fields", [{"fmt": "e5m2"}, {"scale_fmt": "ue8m0"}], ids=str)
def test_other_formats(fields):
    qa = quantized((200, 320), **fields)
    x = activations((5, 320), dtype=F32)
    assert_is_product(jitted(x, qa), x, qa)


@pytest.mark.parametrize("shape", [(300,), (1, 300), (1, 1, 300), (2, 3, 300), (2, 1, 3, 300)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_leading_axes_of_x_are_kept(shape, scheme):
    qa, x = quantized((130, 300), scheme=scheme), activations(shape)
    y = jitted(x, qa)
    assert y.shape == (*shape[:-1], 130)
    assert_is_product(y, x, qa)


@pytest.mark.parametrize("shape", [(0, 300), (2, 0, 300)])
def test_no_tokens_give_no_rows(shape):
    assert matmul(jnp.zeros(shape), quantized((130, 300))).shape == (*shape[:-1], 130)


@pytest.mark.parametrize("M", [0, 1, 2])
def test_an_empty_contraction_gives_zeros(M):
    y = matmul(jnp.ones((M, 0)), blocked.quantize(jnp.ones((3, 0))))
    np.testing.assert_array_equal(y, np.zeros((M, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", [None, np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("w", [quantized((8, 256)), jnp.ones((8, 256))], ids=["fp8", "plain"])
def test_result_has_xs_dtype_or_the_one_asked_for(dtype, out, w):
    y = jitted(activations((2, 256), dtype=dtype), w, preferred_element_type=out)
    assert y.dtype == (out or dtype)


def test_result_is_rounded_once():
    """float32 sums are not rounded to bfloat16 on the way to a float32 result."""
    qa, x = quantized((8, 256)), activations((2, 256))
    wide = jitted(x, qa, preferred_element_type=jnp.float32)
    assert (np.asarray(wide) != np.asarray(wide.astype(jnp.bfloat16), np.float32)).any()
    assert_is_product(wide, x, qa)
    np.testing.assert_array_equal(jitted(x, qa), wide.astype(jnp.bfloat16))


def test_transposed_array_is_stored_k_major_and_multiplied_from_the_right():
    kernel = make_weight(normal, (300, 130), F32, seed=2)  # [in, out], as in Flax
    qa = dataclasses.replace(blocked.quantize(jnp.asarray(kernel.T)), transposed=True)
    x = activations((4, 300), dtype=F32)
    y = jitted(x, qa)
    assert_is_product(y, x, dataclasses.replace(qa, transposed=False))
    np.testing.assert_allclose(y, x @ qa.dequantize(), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("M", [1, 5])
def test_stack_with_a_traced_layer_inside_scan(M, scheme):
    stack = quantized((3, 130, 300), scheme=scheme)
    x = activations((M, 300))
    ys = jax.jit(lambda x: lax.map(lambda i: matmul(x, stack, layer=i), jnp.arange(3)))(x)
    for i in range(3):
        one = jax.tree.map(lambda s, i=i: s[i], stack)
        assert_is_product(ys[i], x, one)
        np.testing.assert_array_equal(jitted(x, stack, layer=i), ys[i])


def test_array_scanned_over_its_leading_axis_is_a_matrix_in_the_body():
    stack, x = quantized((3, 130, 300)), activations((5, 300))
    _, ys = lax.scan(lambda carry, w: (carry, matmul(x, w)), None, stack)
    for i in range(3):
        np.testing.assert_array_equal(ys[i], jitted(x, stack, layer=i))


def test_vmap_over_tokens_and_over_experts():
    qa, x = quantized((130, 300)), activations((4, 300))
    by_row = jax.jit(jax.vmap(lambda row: matmul(row, qa)))(x)
    assert_is_product(by_row, x, qa)
    experts, xs = quantized((3, 130, 300)), activations((3, 4, 300))
    ys = jax.jit(jax.vmap(matmul))(xs, experts)
    for e in range(3):
        assert_is_product(ys[e], xs[e], jax.tree.map(lambda s, e=e: s[e], experts))


def test_a_tokens_result_does_not_depend_on_the_others():
    """Beyond the order of float32 sums: quantization is per token."""
    qa, x = quantized((130, 300)), activations((6, 300), heavy_tailed, F32)
    alone = jitted(x[3], qa)
    together = jitted(x.at[:3].set(1e30).at[4:].set(0), qa)[3]
    _, magnitude = definition(x[3], qa)
    assert (np.abs(alone - together) <= 2 * 303 * 2.0**-24 * magnitude).all()


def test_nan_in_a_token_stays_in_its_row():
    qa, x = quantized((130, 300)), activations((3, 300), dtype=F32)
    y = jitted(x.at[1, 7].set(jnp.nan), qa)
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[::2], jitted(x, qa)[::2])


# Weights that are not quantized -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [None, 1])
def test_plain_weights(dtype, layer):
    shape = (130, 300) if layer is None else (2, 130, 300)
    w, x = make_weight(normal, shape, dtype, 3), activations((2, 4, 300), dtype=dtype)
    y = matmul(x, jnp.asarray(w), layer=layer, preferred_element_type=jnp.float32)
    w64 = (w if layer is None else w[layer]).astype(np.float64)
    x64 = np.asarray(x, np.float64)
    bound = 303 * 2.0**-24 * (np.abs(x64) @ np.abs(w64).T)
    assert (np.abs(np.asarray(y, np.float64) - x64 @ w64.T) <= bound).all()


# Gradients ----------------------------------------------------------------------------------------


def test_gradient_of_weight_only_is_dy_times_w():
    qa, x = quantized((130, 300), scheme=None), activations((5, 300), dtype=F32)
    dy = np.asarray(activations((5, 130), dtype=F32, seed=4))
    y, vjp = jax.vjp(lambda x: jitted(x, qa), x)
    (dx,) = vjp(jnp.asarray(dy))
    w = np.asarray(qa.dequantize(jnp.float32), np.float64)
    bound = 133 * 2.0**-24 * (np.abs(dy) @ np.abs(w))
    assert (np.abs(np.asarray(dx, np.float64) - dy.astype(np.float64) @ w) <= bound).all()
    assert y.shape == (5, 130)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_gradient_of_w8a8_goes_straight_through_the_rounding(size):
    """Quantizing activations counts as the identity: dx = dy @ w, of any size."""
    dynamic, weight_only = quantized((130, 300)), quantized((130, 300), scheme=None)
    x = activations((5, 300), dtype=F32)
    dy = size * activations((5, 130), dtype=F32, seed=4)
    (dx,) = jax.vjp(lambda x: jitted(x, dynamic), x)[1](dy)
    (expected,) = jax.vjp(lambda x: jitted(x, weight_only), x)[1](dy)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5 * size)


# Bad input ----------------------------------------------------------------------------------------

QA, STACK, X = quantized((130, 300)), quantized((2, 130, 300)), jnp.ones((4, 300))
FIT = "their last axes are contracted and must be equal"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X[:, 1:], QA), {}, f"matmul: x [4, 299] does not fit w stored as [130, 300]: {FIT}"),
        ((X.T, QA), {}, f"matmul: x [300, 4] does not fit w stored as [130, 300]: {FIT}"),
        ((X[:, 1:], X), {}, f"matmul: x [4, 299] does not fit w stored as [4, 300]: {FIT}"),
        ((X[0, 0], QA), {}, f"matmul: x [] does not fit w stored as [130, 300]: {FIT}"),
        (
            (X, STACK),
            {},
            "matmul: w is stored as [2, 130, 300]; allowed: [N, K] "
            "(a stack [L, N, K] needs layer=)",
        ),
        ((X, QA), {"layer": 0}, "matmul: w is stored as [130, 300]; allowed: [L, N, K]"),
        ((X, X[0]), {}, "matmul: w is stored as [300]; allowed: [N, K] (a stack [L, N, K] needs "),
        ((X.astype(int), QA), {}, "matmul: x has dtype int32; allowed: a floating dtype"),
    ],
)
def test_bad_operands_are_named(args, kwargs, message):
    with pytest.raises(JaxquantError) as e:
        matmul(*args, **kwargs)
    assert str(e.value).startswith(message)


def test_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(JaxquantError, match=r"^matmul: implementation is 'cuda'; allowed: .*xla$"):
        matmul(X, QA, implementation="cuda")


def test_unknown_implementation_is_refused_for_plain_weights_too():
    with pytest.raises(JaxquantError, match="implementation is 'cuda'"):
        matmul(X, X, implementation="cuda")


@pytest.mark.parametrize("layer", [2, -3])
def test_layer_out_of_range_is_refused(layer):
    with pytest.raises(JaxquantError, match=rf"layer is {layer}; allowed"):
        matmul(X, STACK, layer=layer)


@pytest.mark.parametrize("layer", [2, -3])
def test_traced_layer_out_of_range_is_reported_by_checkify(layer):
    run = jax.jit(lambda layers: lax.map(lambda l: matmul(X, STACK, layer=l), layers))
    error, y = checkify.checkify(run)(jnp.array([0, layer]))
    with pytest.raises(checkify.JaxRuntimeError, match=rf"matmul: layer is {layer}; allowed: 0 to"):
        error.throw()
    assert (y == run(jnp.array([0, 1 if layer > 0 else 0]))).all()
    error, _ = checkify.checkify(run)(jnp.array([0, -1]))
    error.throw()


# What stands around it ----------------------------------------------------------------------------


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).astype(np.float64)


def test_rms_norm_is_its_definition():
    x, weight = activations((3, 64)), activations((2, 64), seed=2)
    a = np.asarray(x, np.float64)
    quotient = rounded(a / np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + 1e-5))
    expected = rounded(quotient * np.asarray(weight[1], np.float64))
    y = jax.jit(lambda x, norm: norm(x, 1))(x, RMSNorm(weight, 1e-5))
    # An ulp of bfloat16, where a quotient is as good as halfway.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-7)
    assert (np.asarray(y, np.float64) == expected).mean() > 0.99
    np.testing.assert_array_equal(y, RMSNorm(weight[1], 1e-5)(x))


def test_silu_mul_is_rounded_once():
    x = activations((3, 128))
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=-1)
    expected = rounded(gate / (1 + np.exp(-gate)) * up)
    y = jax.jit(lambda x: SiluMul()(x))(x)
    assert (np.asarray(y, np.float64) == expected).mean() > 0.99


@pytest.mark.parametrize("quantize", [False, True])
def test_bias_and_residual_are_added_as_separate_operations_are(quantize):
    w = quantized((2, 16, 256))
    w = w if quantize else blocked.dequantize(w)
    x, norm = activations((3, 256)), RMSNorm(activations((2, 256), seed=2), 1e-5)
    bias, residual = activations((2, 16), seed=3), activations((3, 16), seed=4)
    y = jitted(x, w, layer=1, prologue=norm, bias=bias, residual=residual)
    separate = rounded(np.asarray(jitted(norm(x, 1), w, layer=1), np.float64))
    separate = rounded(separate + np.asarray(bias[1], np.float64))
    separate = rounded(separate + np.asarray(residual, np.float64))
    np.testing.assert_array_equal(np.asarray(y, np.float64), separate)
    y = jitted(x, w, layer=-1, prologue=norm, bias=bias[1], residual=residual)
    np.testing.assert_array_equal(np.asarray(y, np.float64), separate)


def test_gradients_reach_all_that_stands_around():
    w = quantized((2, 16, 256), dtype=F32)
    x, norm = activations((3, 512), dtype=F32), activations((256,), dtype=F32, seed=2)
    bias = activations((2, 16), dtype=F32, seed=3)
    residual = activations((3, 16), dtype=F32, seed=4)
    dense = blocked.dequantize(w, jnp.float32)[1]

    def loss(product, x, norm, bias, residual):
        x = product(x, prologue=SiluMul())
        return jnp.sum(jnp.sin(product(x, prologue=RMSNorm(norm, 1e-5), bias=bias)) * residual)

    def quantized_product(x, prologue, bias=None):
        if bias is None:
            return prologue(x)
        return matmul(x, w, layer=1, prologue=prologue, bias=bias, residual=residual)

    def separate(x, prologue, bias=None):
        if bias is None:
            return prologue(x)
        # The value of the quantized product, the derivative of the other.
        y = prologue(x) @ dense.T + bias[1] + residual
        return y + jax.lax.stop_gradient(quantized_product(x, prologue, bias) - y)

    arguments = x, norm, bias, residual
    grads, expected = (
        jax.grad(lambda *a, f=f: loss(f, *a), argnums=(0, 1, 2))(*arguments)
        for f in (quantized_product, separate)
    )
    for grad, other in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad, other, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prologue": SiluMul()},
            "SiluMul of x [3, 256] is [3, 128], which does not fit w stored as [2, 16, 256]: "
            "their last axes are contracted and must be equal",
        ),
        ({"bias": jnp.ones(15)}, "bias is [15]; allowed: [16] or [2, 16]"),
        ({"residual": jnp.ones((2, 16))}, "residual is [2, 16]; allowed: [3, 16]"),
    ],
)
def test_what_does_not_fit_around_a_product(arguments, message):
    with pytest.raises(JaxquantError) as caught:
        matmul(activations((3, 256)), quantized((2, 16, 256)), layer=0, **arguments)
    assert str(caught.value) == f"matmul: {message}"
