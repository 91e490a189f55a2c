"""Building blocks of decoder-only models: linear, norm, rotary embedding."""

import dataclasses
import math
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True)
class Stack:
    """Consecutive equal layers, and how their parameters are stored.

    Attributes:
      layers: their numbers in the model.
      row_alignment: rows at which a projection may begin in a fused weight: a block's rows.
      separate: names of fused products that have a weight for each projection here, because only
        some of these are quantized.
    """

    layers: range
    row_alignment: int = 1
    separate: frozenset[str] = frozenset()


class Linear(nnx.Module):
    """`x @ weight^T + bias`, a stack of them: weight `[L, N, K]` K-major, bias `[L, N]` or None."""

    def __init__(self, L: int, N: int, K: int, *, bias: bool, dtype: Any):
        self.weight = unloaded(L, N, K, dtype=dtype)
        self.bias = unloaded(L, N, dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "*batch K"], layer: Any) -> Float[Array, "*batch N"]:
        """Applies the projection of one layer."""
        return _linear(self.weight, self.bias, x, layer)


class FusedLinear(nnx.Module):
    """Projections of the same input as one product: their weights stand one below the other.

    Each begins at a multiple of `stack.row_alignment` rows, so that its blocks are its own; the
    rows between are zeros.

    Attributes:
      names: of the projections.
      rows: the first row of each, and the one behind its last.
    """

    def __init__(self, parts: Mapping[str, int], K: int, stack: Stack, *, bias: bool, dtype: Any):
        rows, end = [], 0
        for N in parts.values():
            start = -(-end // stack.row_alignment) * stack.row_alignment
            end = start + N
            rows.append((start, end))
        self.names, self.rows = tuple(parts), tuple(rows)
        self.weight = unloaded(len(stack.layers), end, K, dtype=dtype)
        self.bias = unloaded(len(stack.layers), end, dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "*batch K"], layer: Any) -> list[Float[Array, "*batch _"]]:
        """The projections of one layer, in their order."""
        y = _linear(self.weight, self.bias, x, layer)
        return [y[..., start:end] for start, end in self.rows]


def _linear(weight: nnx.Param, bias: nnx.Param | None, x: Array, layer: Any) -> Array:
    y = matmul(x, weight.get_value(), layer=layer)
    return y if bias is None else y + bias.get_value()[layer]


class SeparateLinear(nnx.Module):
    """What a FusedLinear computes, by a Linear for each projection."""

    def __init__(self, parts: Mapping[str, int], K: int, stack: Stack, *, bias: bool, dtype: Any):
        self.names = tuple(parts)
        for name, N in parts.items():
            setattr(self, name, Linear(len(stack.layers), N, K, bias=bias, dtype=dtype))

    def __call__(self, x: Float[Array, "*batch K"], layer: Any) -> list[Float[Array, "*batch _"]]:
        """The projections of one layer, in their order."""
        return [getattr(self, name)(x, layer) for name in self.names]


def projections(
    name: str, parts: Mapping[str, int], K: int, stack: Stack, *, bias: bool, dtype: Any
) -> FusedLinear | SeparateLinear:
    """Projections of the same input, fused unless `stack` has them separate.

    Args:
      name: of the product.
      parts: name -> N of each projection.
      K: size of the input.
      stack: the layers.
      bias: whether they have one.
      dtype: of parameters.
    """
    kind = SeparateLinear if name in stack.separate else FusedLinear
    return kind(parts, K, stack, bias=bias, dtype=dtype)


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
