"""Products of tokens that are quantized already."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import on_hopper

from jaxquant.blocked import quantize, quantize_activations
from jaxquant.errors import JaxquantError
from jaxquant.matmul import QuantizedTokens, SiluMul, decode_sm90, matmul, mosaic_gpu
from jaxquant.matmul.tokens import kernel_layout, with_one_scale


@pytest.fixture
def hopper(monkeypatch):
    with on_hopper(monkeypatch, mosaic_gpu):
        yield


def tokens(*shape: int, seed: int = 0) -> tuple[jax.Array, QuantizedTokens]:
    """x `[*batch, K]`, and that quantized; behind the tokens there is NaN."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    xq, sx = quantize_activations(x.reshape(-1, shape[-1]))
    M, K = xq.shape
    qvalue, scale = (jnp.full(a.shape, jnp.nan, a.dtype) for a in kernel_layout(M, K))
    qvalue, scale = qvalue.at[:M].set(xq), scale.at[:, :M].set(sx.T)
    return x, QuantizedTokens(qvalue, scale, shape[:-1], jnp.dtype(x.dtype))


def weight(*shape: int, **changes: Any) -> Any:
    w = quantize(jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.bfloat16))
    return dataclasses.replace(w, **changes)


def same_bytes(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("shape", [(1, 256), (3, 1, 256), (13, 256), (130, 384)])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_product_is_the_one_of_what_was_quantized(hopper, shape, implementation):
    x, xq = tokens(*shape)
    w, residual = weight(2, 136, shape[-1]), jnp.ones((*shape[:-1], 136), jnp.bfloat16)
    y, expected = (
        matmul(a, w, layer=1, residual=residual, implementation=implementation) for a in (xq, x)
    )
    assert (xq.shape, xq.ndim, xq.size) == (x.shape, x.ndim, x.size)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert same_bytes(y, expected)


@pytest.mark.parametrize("M", [1, 3, 8, 13, 70, 128, 129, 300])
def test_the_layout_is_what_the_kernels_take(M):
    qvalue, scale = kernel_layout(M, 384)
    assert qvalue.shape[0] == (decode_sm90.padded_tokens(M) if M <= 128 else -(-M // 8) * 8)
    assert scale.shape == (3, -(-M // 64) * 64)


@pytest.mark.parametrize("shape", [(3, 256), (2, 65, 384)])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_tokens_of_one_scale(hopper, shape, implementation):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float8_e4m3fn)
    xq = with_one_scale(x, jnp.float32(0.25), jnp.bfloat16)
    assert (xq.shape, xq.dtype) == (shape, jnp.bfloat16)
    np.testing.assert_array_equal(xq.dequantize(), x.astype(jnp.float32) / 4)
    layout = [(a.shape, a.dtype) for a in kernel_layout(math.prod(shape[:-1]), shape[-1])]
    assert [(a.shape, a.dtype) for a in (xq.qvalue, xq.scale)] == layout
    w = weight(136, shape[-1])
    expected = x.astype(jnp.float32) / 4 @ w.dequantize(jnp.float32).T
    y = matmul(xq, w, implementation=implementation)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_vmap(hopper, implementation):
    both = [tokens(3, 256, seed=seed)[1] for seed in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *both)
    w = weight(136, 256)
    ys = jax.vmap(lambda xq: matmul(xq, w, implementation=implementation))(stacked)
    for y, xq in zip(ys, both, strict=True):
        assert same_bytes(y, matmul(xq, w, implementation=implementation))


def test_it_counts_as_a_constant():
    _, xq = tokens(3, 256)
    w, residual = weight(8, 256), jnp.ones((3, 8), jnp.bfloat16)
    grad = jax.grad(lambda r: matmul(xq, w, residual=r).astype(jnp.float32).sum())(residual)
    np.testing.assert_array_equal(grad, jnp.ones((3, 8)))


@pytest.mark.parametrize(
    ("w", "prologue", "message"),
    [
        (jnp.ones((8, 256)), None, "x is quantized already, which w is not made for"),
        (weight(8, 256, activation_scheme=None), None, "x is quantized already, which w is not"),
        (weight(8, 128), SiluMul(), "x is quantized already and has a prologue, SiluMul"),
        (weight(8, 384), None, "x [3, 256] does not fit w stored as [8, 384]"),
    ],
)
def test_what_is_refused(w, prologue, message):
    with pytest.raises(JaxquantError) as caught:
        matmul(tokens(3, 256)[1], w, prologue=prologue)
    assert message in str(caught.value)
