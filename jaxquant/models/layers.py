"""Building blocks of decoder-only models: linear, norm, rotary embedding, cached attention."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxquant.matmul import matmul


def unloaded(*shape: int, dtype: Any) -> nnx.Param:
    """A parameter that holds its shape and dtype until a checkpoint is loaded into it."""
    value: Any = jax.ShapeDtypeStruct(shape, dtype)
    return nnx.Param(value)


class Linear(nnx.Module):
    """`x @ weight^T + bias`, a stack of them: weight `[L, N, K]` K-major, bias `[L, N]` or None."""

    def __init__(self, L: int, N: int, K: int, *, bias: bool, dtype: Any):
        self.weight = unloaded(L, N, K, dtype=dtype)
        self.bias = unloaded(L, N, dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "*batch K"], layer: Any) -> Float[Array, "*batch N"]:
        """Applies the projection of one layer."""
        y = matmul(x, self.weight.get_value(), layer=layer)
        return y if self.bias is None else y + self.bias.get_value()[layer]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, the quotient in float32.

    The weight is `[K]`, or a stack `[L, K]`.
    """

    def __init__(self, *shape: int, eps: float, dtype: Any):
        self.weight = unloaded(*shape, dtype=dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch K"], layer: Any = None) -> Float[Array, "*batch K"]:
        """Normalizes; `layer` picks from a stack."""
        weight = self.weight.get_value() if layer is None else self.weight.get_value()[layer]
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return weight * normed.astype(x.dtype)


class Table(nnx.Module):
    """A `[V, K]` table: the embedding of tokens, and what gives their logits."""

    def __init__(self, V: int, K: int, dtype: Any):
        self.weight = unloaded(V, K, dtype=dtype)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch K"]:
        """The rows of these tokens."""
        return self.weight.get_value()[tokens]

    def logits(self, x: Float[Array, "*batch K"]) -> Float32[Array, "*batch V"]:
        """`x @ weight^T` in float32."""
        return matmul(x, self.weight.get_value(), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864).

    Attributes:
      dim: how many of a head's dims are rotated.
      theta: base of the frequencies `theta ** (-2 i / dim)`.
      scaling: None, "linear" (frequencies / factor) or "llama3" (low frequencies / factor, high
        ones kept, a ramp between; as in Llama 3.1).
      factor, low_freq_factor, high_freq_factor, original_max_position: of the scaling.
    """

    dim: int
    theta: float
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def frequencies(self) -> Float32[Array, " pairs"]:
        """Radians per position, one for each rotated pair."""
        freq = 1.0 / self.theta ** (jnp.arange(0, self.dim, 2, dtype=jnp.float32) / self.dim)
        if self.scaling is None:
            return freq
        scaled = freq / self.factor
        if self.scaling == "linear":
            return scaled
        turns = self.original_max_position * freq / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = jnp.clip(ramp, 0.0, 1.0)
        return keep * freq + (1 - keep) * scaled

    def rotate(
        self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H D"]:
        """Rotates the pairs (i, i + dim / 2) of each head by position * frequency."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies()
        cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
        x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values of all layers; donate it to the function that extends it.

    Sequences start at slot 0, whatever their length, so but for rounding a result does not depend
    on the rest of the batch. Heads come before slots, so that a decode step reads each head's in
    one piece.

    Attributes:
      k: `[L, B, H, S, D]`, H key/value heads, S slots.
      v: likewise.
      lengths: `[B]` int32, how many slots of each sequence are filled.
    """

    k: Float[Array, "L B H S D"]
    v: Float[Array, "L B H S D"]
    lengths: Int[Array, " B"]

    @staticmethod
    def empty(L: int, B: int, H: int, S: int, D: int, dtype: Any) -> "Cache":
        """A cache with no filled slots."""
        shape = (L, B, H, S, D)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((B,), jnp.int32))


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    window: int | None,
) -> Float[Array, "B T Hq D"]:
    """Each token attends to itself and those before it, the last `window` of them if given."""
    left = None if window is None or window >= q.shape[1] else (window - 1, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, v, is_causal=True, local_window_size=left
    )
    # cuDNN's flash attention takes 16-bit inputs and heads of up to 128 in steps of 8.
    flash = q.dtype != jnp.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    if flash and q.shape[1] > 1 and jax.default_backend() == "gpu":
        return attend(implementation="cudnn")
    with jax.default_matmul_precision(_precision(q.dtype)):
        return attend(implementation="xla")


def cached_attention(
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B H S D"],
    v: Float[Array, "B H S D"],
    position: Int[Array, " B"],
    window: int | None,
) -> Float[Array, "B 1 Hq D"]:
    """The token at `position` of each sequence attends to slots 0 to position, or the last ones."""
    (B, H, S, D), precision = k.shape, _precision(q.dtype)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    logits = product("bhgd,bhsd->bhgs", q.reshape(B, H, -1, D), k) / math.sqrt(D)
    slot, last = jnp.arange(S), position[:, None]
    mask = slot <= last
    if window is not None and window < S:
        mask &= slot > last - window
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return product("bhgs,bhsd->bhgd", weights, v).astype(q.dtype).reshape(q.shape)


def _precision(dtype: Any) -> str | None:
    # float32 means float32: the default precision on accelerators is TF32.
    return "highest" if dtype == jnp.float32 else None
