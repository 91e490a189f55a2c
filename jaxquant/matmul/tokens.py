"""Tokens that are quantized already: what the kernel ahead of a product may hand to it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxquant.blocked import ACTIVATION_GROUP, expand_blocks, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTokens:
    """Activations in FP8 as the kernels of products take them, padded, the scales transposed.

        x[m, k] ~= qvalue[m, k] * scale[k // 128, m]

    It is a pytree of `qvalue` and `scale`; the rest is static.

    Attributes:
      qvalue: `[T, K]` float8_e4m3fn; what is behind the tokens is undefined.
      scale: `[ceil(K / 128), S]` float32, likewise.
      batch: the shape of the tokens.
      dtype: of what was quantized.
    """

    qvalue: Any
    scale: Any
    batch: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what was quantized: `[*batch, K]`."""
        return *self.batch, self.qvalue.shape[-1]

    @property
    def ndim(self) -> int:
        """Number of its dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    def dequantize(self) -> Float32[Array, "*batch K"]:
        """`qvalue * scale`."""
        M, K = math.prod(self.batch), self.shape[-1]
        scale = expand_blocks(self.scale[:, :M].T, (1, ACTIVATION_GROUP), (M, K))
        return (widen(self.qvalue[:M]) * scale).reshape(self.shape)


def with_one_scale(
    qvalue: Float[Array, "*batch K"], scale: Float32[Array, ""], dtype: Any
) -> QuantizedTokens:
    """Tokens that are FP8 with the same scale for all; dtype is that of what was quantized."""
    *batch, K = qvalue.shape
    M = math.prod(batch)
    try:
        rows, scales = (a.shape for a in kernel_layout(M, K))
    except ImportError:  # then no kernel takes them
        rows, scales = (M, K), (-(-K // ACTIVATION_GROUP), M)
    qvalue = jnp.pad(qvalue.reshape(M, K), ((0, rows[0] - M), (0, 0)))
    return QuantizedTokens(qvalue, jnp.broadcast_to(scale, scales), tuple(batch), jnp.dtype(dtype))


def kernel_layout(M: int, K: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The qvalue and the scale of M tokens, of which T and S are what the kernels take."""
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.matmul.act_quant_sm90 import SCALE_COLUMNS
    from jaxquant.matmul.decode_sm90 import MAX_TOKENS, padded_tokens

    T = padded_tokens(M) if M <= MAX_TOKENS else -(-M // 8) * 8
    groups, S = -(-K // ACTIVATION_GROUP), -(-M // SCALE_COLUMNS) * SCALE_COLUMNS
    return (
        jax.ShapeDtypeStruct((T, K), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((groups, S), jnp.float32),
    )
