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
      dim: how many of a head's dims are rotated, the first ones.
      theta: base of the frequencies `theta ** (-2 i / dim)`.
      scaling: how the frequencies change for long texts. None; "linear": all / factor; "dynamic":
        a larger theta for a sequence longer than original_max_position (NTK); "llama3": low ones
        / factor, high ones kept, a ramp between, as in Llama 3.1; "yarn": likewise, with the ramp
        over dims (https://arxiv.org/abs/2309.00071).
      factor, original_max_position: of the scaling.
      low_freq_factor, high_freq_factor: of "llama3", in turns over original_max_position.
      beta_slow, beta_fast: of "yarn", likewise.
      truncate: whether "yarn" rounds the ends of its ramp outwards.
      attention_factor: of "yarn", what rotated queries and keys are multiplied with.
      interleaved: whether the pairs are dims (2 i, 2 i + 1), not (i, i + dim / 2).
    """

    dim: int
    theta: float
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    attention_factor: float = 1.0
    interleaved: bool = False

    def frequencies(self, length: Any = 0) -> Float32[Array, "*batch pairs"]:
        """Radians per position, one for each rotated pair.

        Args:
          length: of the sequence, or `[*batch]` of each; only "dynamic" asks for it.
        """
        theta = self.theta
        if self.scaling == "dynamic":
            ratio = jnp.maximum(length, self.original_max_position) / self.original_max_position
            stretch = self.factor * ratio - (self.factor - 1)
            theta *= stretch[..., None] ** (self.dim / (self.dim - 2))
        freq = 1.0 / theta ** (jnp.arange(0, self.dim, 2, dtype=jnp.float32) / self.dim)
        scaled = freq / self.factor
        if self.scaling == "linear":
            return scaled
        if self.scaling == "llama3":
            turns = self.original_max_position * freq / (2 * math.pi)
            ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        elif self.scaling == "yarn":
            low, high = self._pair_of(self.beta_fast), self._pair_of(self.beta_slow)
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.dim - 1)
            high += 0.001 if low == high else 0.0  # as in the reference: a ramp has a length
            ramp = (high - jnp.arange(self.dim // 2)) / (high - low)
        else:
            return freq
        keep = jnp.clip(ramp, 0.0, 1.0)
        return keep * freq + (1 - keep) * scaled

    def _pair_of(self, turns: float) -> float:
        """The pair, as a fraction, that makes so many turns over original_max_position."""
        ratio = self.original_max_position / (turns * 2 * math.pi)
        return self.dim * math.log(ratio) / (2 * math.log(self.theta))

    def rotate(
        self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H D"]:
        """Rotates the pairs of each head by position * frequency."""
        freq = self.frequencies(positions.max(axis=1, keepdims=True) + 1)
        angles = positions[..., None].astype(jnp.float32) * freq
        cos, sin = (f(angles)[:, :, None] * self.attention_factor for f in (jnp.cos, jnp.sin))
        rotated, kept = x[..., : self.dim].astype(jnp.float32), x[..., self.dim :]
        if self.interleaved:
            x1, x2 = rotated[..., 0::2], rotated[..., 1::2]
        else:
            x1, x2 = jnp.split(rotated, 2, axis=-1)
        pairs = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        if self.interleaved:
            rotated = jnp.stack(pairs, axis=-1).reshape(rotated.shape)
        else:
            rotated = jnp.concatenate(pairs, axis=-1)
        return jnp.concatenate([rotated.astype(x.dtype), kept], axis=-1)


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
