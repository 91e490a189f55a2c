"""The reference: plain XLA, right on every backend, fused by the compiler as far as it goes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jaxquant.array import QuantizedArray
from jaxquant.blocked import (
    ACTIVATION_GROUP,
    expand_blocks,
    hold,
    quantize_activations,
    take_layer,
    widen,
)
from jaxquant.matmul.prologue import Prologue, rounded, take
from jaxquant.matmul.tokens import QuantizedTokens


def matmul(
    x: Float[Array, "*batch A"] | QuantizedTokens,
    w: QuantizedArray,
    layer: Any,
    out_dtype: Any,
    prologue: Prologue | None = None,
    bias: Float[Array, "..."] | None = None,
    residual: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch N"]:
    """`x @ w^T` with w dequantized to float32 on the way. See `jaxquant.matmul.matmul`."""
    if isinstance(x, QuantizedTokens):
        x = x.dequantize()
    else:
        x = x if prologue is None else prologue(x, layer)
        x = _fake_quantize(x) if w.activation_scheme == "dynamic" else x
    weight = _dequantize_layer(w, layer)
    y = _dot_f32(x.astype(jnp.float32), weight)
    return finish(y, layer, out_dtype, bias, residual)


def plain_matmul(
    x: Float[Array, "*batch A"],
    w: Float[Array, "*L N K"],
    layer: Any,
    out_dtype: Any,
    prologue: Prologue | None = None,
    bias: Float[Array, "..."] | None = None,
    residual: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch N"]:
    """`x @ w^T` for a weight that is not quantized, accumulated in float32."""
    x = x if prologue is None else prologue(x, layer)
    y = lax.dot_general(
        x,
        w if layer is None else lax.dynamic_index_in_dim(w, layer, keepdims=False),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return finish(y, layer, out_dtype, bias, residual)


def finish(
    y: Float[Array, "*batch N"],
    layer: Any,
    out_dtype: Any,
    bias: Float[Array, "..."] | None,
    residual: Float[Array, "..."] | None,
) -> Float[Array, "*batch N"]:
    """What stands after a product: y, y + bias, y + bias + residual, each rounded to out_dtype."""
    y = rounded(y, out_dtype)
    if bias is not None:
        y = rounded(y + take(bias, layer, 1).astype(out_dtype), out_dtype)
    if residual is not None:
        y = rounded(y + residual.astype(out_dtype), out_dtype)
    return y


def _fake_quantize(x: Float[Array, "*batch K"]) -> Float32[Array, "*batch K"]:
    qvalue, scale = quantize_activations(x)
    full = expand_blocks(
        scale[..., None, :], (1, ACTIVATION_GROUP), (*x.shape[:-1], 1, x.shape[-1])
    )
    return widen(hold(qvalue)) * full[..., 0, :]


def _dequantize_layer(w: QuantizedArray, layer: Any) -> Float32[Array, "N K"]:
    qvalue, scale = w.qvalue, w.scale
    if layer is not None:
        qvalue, scale = take_layer(qvalue, layer), take_layer(scale, layer)
    return widen(qvalue) * expand_blocks(scale, w.block_size, qvalue.shape)


def _dot_f32(x: Float32[Array, "*batch K"], w: Float32[Array, "N K"]) -> Array:
    if math.prod(x.shape[:-1]) == 1 and jax.default_backend() != "cpu":
        # One token: a product and a sum fuse with what makes w, where a dot reads it from memory.
        # On a CPU the dot fuses too, and is the faster one.
        y = jnp.sum(x.reshape(1, -1) * w, axis=-1)
        return y.reshape(*x.shape[:-1], w.shape[0])
    # The default precision of a float32 dot is TF32 or less on accelerators.
    return lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
