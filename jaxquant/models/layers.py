"""Building blocks of decoder-only models: linear, norm, rotary embedding."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxquant.array import QuantizedArray
from jaxquant.attention import rotate_halves
from jaxquant.matmul import (
    Prologue,
    QuantizedTokens,
    RMSNorm as RMSNormPrologue,
    grouped_matmul,
    matmul,
)


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
      groups: devices that rows are divided among.
    """

    layers: range
    row_alignment: int = 1
    separate: frozenset[str] = frozenset()
    groups: int = 1


class Linear(nnx.Module):
    """`x @ weight^T + bias`, a stack of them: weight `[L, N, K]` K-major, bias `[L, N]` or None."""

    def __init__(self, L: int, N: int, K: int, *, bias: bool, dtype: Any):
        self.weight = unloaded(L, N, K, dtype=dtype)
        self.bias = unloaded(L, N, dtype=dtype) if bias else None

    @property
    def quantizes(self) -> bool:
        """Whether it quantizes x, and so takes it quantized as well."""
        weight = self.weight.get_value()
        return isinstance(weight, QuantizedArray) and weight.activation_scheme == "dynamic"

    def __call__(
        self,
        x: Float[Array, "*batch A"] | QuantizedTokens,
        layer: Any,
        prologue: Prologue | None = None,
        residual: Float[Array, "*batch N"] | None = None,
    ) -> Float[Array, "*batch N"]:
        """Applies the projection of one layer to `prologue(x)` and adds the residual."""
        return _linear(self, x, layer, prologue, residual)


class FusedLinear(nnx.Module):
    """Projections of the same input as one product: their weights stand one below the other.

    Each begins at a multiple of `stack.row_alignment` rows, so that its blocks are its own; the
    rows between are zeros. Where they divide into `stack.groups` parts of whole blocks, they stand
    so in each of as many groups of rows: a device that has one has its share of all projections.

    Attributes:
      names: of the projections.
      groups: of rows.
      rows: the first row of each in a group, and the one behind its last.
    """

    def __init__(self, parts: Mapping[str, int], K: int, stack: Stack, *, bias: bool, dtype: Any):
        whole = stack.groups * stack.row_alignment
        self.groups = 1 if any(N % whole for N in parts.values()) else stack.groups
        sizes = [N // self.groups for N in parts.values()]
        self.names, self.rows = tuple(parts), fused_rows(sizes, stack)
        end = self.groups * self.rows[-1][1]
        self.weight = unloaded(len(stack.layers), end, K, dtype=dtype)
        self.bias = unloaded(len(stack.layers), end, dtype=dtype) if bias else None

    @property
    def contiguous(self) -> bool:
        """Whether nothing stands between them."""
        return sum(end - start for start, end in self.rows) == self.rows[-1][1]

    def __call__(
        self, x: Float[Array, "*batch A"], layer: Any, prologue: Prologue | None = None
    ) -> list[Float[Array, "*batch _"]]:
        """The projections of one layer, in their order, of `prologue(x)`."""
        y = _linear(self, x, layer, prologue)
        if self.groups == 1:
            return [y[..., start:end] for start, end in self.rows]
        batch, groups = y.shape[:-1], y.reshape(*y.shape[:-1], self.groups, -1)
        return [groups[..., start:end].reshape(*batch, -1) for start, end in self.rows]

    def joined(
        self, x: Float[Array, "*batch A"], layer: Any, prologue: Prologue | None = None
    ) -> Float[Array, "*batch _"]:
        """The projections one behind the other."""
        if self.contiguous and self.groups == 1:
            return _linear(self, x, layer, prologue)
        return jnp.concatenate(self(x, layer, prologue), axis=-1)


def fused_rows(sizes: Iterable[int], stack: Stack) -> tuple[tuple[int, int], ...]:
    """The first row of each projection in a fused weight, and the one behind its last."""
    rows, end = [], 0
    for N in sizes:
        start = -(-end // stack.row_alignment) * stack.row_alignment
        end = start + N
        rows.append((start, end))
    return tuple(rows)


class ExpertLinear(nnx.Module):
    """Projections of E experts, fused as in FusedLinear: weight `[L, E, N, K]`."""

    def __init__(self, E: int, parts: Mapping[str, int], K: int, stack: Stack, *, dtype: Any):
        self.names, self.rows = tuple(parts), fused_rows(parts.values(), stack)
        self.weight = unloaded(len(stack.layers), E, self.rows[-1][1], K, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "S A"],
        group_sizes: Int[Array, " E"],
        layer: Any,
        *,
        rows: Int[Array, " T"] | None = None,
        places: Int[Array, "S k"] | None = None,
        prologue: Prologue | None = None,
    ) -> Float[Array, "T _"]:
        """The projections of one layer, one behind the other; see `grouped_matmul`."""
        w = self.weight.get_value()
        y = grouped_matmul(
            x, w, group_sizes, rows=rows, places=places, layer=layer, prologue=prologue
        )
        if sum(end - start for start, end in self.rows) == y.shape[1]:
            return y
        return jnp.concatenate([y[:, start:end] for start, end in self.rows], axis=1)


class SeparateLinear(nnx.Module):
    """What a FusedLinear computes, by a Linear for each projection."""

    def __init__(self, parts: Mapping[str, int], K: int, stack: Stack, *, bias: bool, dtype: Any):
        self.names = tuple(parts)
        for name, N in parts.items():
            setattr(self, name, Linear(len(stack.layers), N, K, bias=bias, dtype=dtype))

    def __call__(
        self, x: Float[Array, "*batch A"], layer: Any, prologue: Prologue | None = None
    ) -> list[Float[Array, "*batch _"]]:
        """The projections of one layer, in their order, of `prologue(x)`."""
        return [getattr(self, name)(x, layer, prologue) for name in self.names]

    def joined(
        self, x: Float[Array, "*batch A"], layer: Any, prologue: Prologue | None = None
    ) -> Float[Array, "*batch _"]:
        """The projections one behind the other."""
        return jnp.concatenate(self(x, layer, prologue), axis=-1)


def _linear(
    module: Any,
    x: Array | QuantizedTokens,
    layer: Any,
    prologue: Prologue | None,
    residual: Array | None = None,
) -> Array:
    bias = None if module.bias is None else module.bias.get_value()
    return matmul(
        x,
        module.weight.get_value(),
        layer=layer,
        prologue=prologue,
        bias=bias,
        residual=residual,
    )


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

    @property
    def prologue(self) -> Prologue:
        """The norm as a part of the product that follows."""
        return RMSNormPrologue(self.weight.get_value(), self.eps)

    def __call__(self, x: Float[Array, "*batch K"], layer: Any = None) -> Float[Array, "*batch K"]:
        """Normalizes; `layer` picks from a stack."""
        return self.prologue(x, layer)


class Table(nnx.Module):
    """A `[V, K]` table: the embedding of tokens, and what gives their logits."""

    def __init__(self, V: int, K: int, dtype: Any):
        self.weight = unloaded(V, K, dtype=dtype)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch K"]:
        """The rows of these tokens."""
        if tokens.size > 1:
            return self.weight.get_value()[tokens]
        # Of a single row XLA makes a slice, for which it gathers a divided table on all devices.
        rows = self.weight.get_value()[jnp.broadcast_to(tokens, (2, *tokens.shape))]
        return rows[0]

    def logits(
        self, x: Float[Array, "*batch K"], norm: Prologue | None = None
    ) -> Float32[Array, "*batch V"]:
        """`norm(x) @ weight^T` in float32."""
        return matmul(x, self.weight.get_value(), prologue=norm, preferred_element_type=jnp.float32)


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

    def rotates_halves_of(self, D: int) -> bool:
        """Whether it is pairs (i, i + D / 2), of all of D dims."""
        return self.dim == D and not self.interleaved

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

    def table(
        self, positions: Int[Array, "B T"]
    ) -> tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]]:
        """Cosines and sines of position * frequency, times `attention_factor`."""
        freq = self.frequencies(positions.max(axis=1, keepdims=True) + 1)
        angles = positions[..., None].astype(jnp.float32) * freq
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor

    def rotate(
        self,
        x: Float[Array, "B T H D"],
        cos: Float32[Array, "B T pairs"],
        sin: Float32[Array, "B T pairs"],
    ) -> Float[Array, "B T H D"]:
        """Rotates the pairs of each head by the angles of a `table`."""
        rotated, kept = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            rotated = jnp.concatenate([rotated[..., 0::2], rotated[..., 1::2]], axis=-1)
        rotated = rotate_halves(rotated, cos, sin)
        if self.interleaved:
            rotated = jnp.stack(jnp.split(rotated, 2, axis=-1), axis=-1).reshape(rotated.shape)
        return jnp.concatenate([rotated, kept], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotations:
    """The angles of tokens under the ropes of a model: made once, where XLA would in each layer.

    Attributes:
      ropes: distinct ones.
      tables: `Rope.table` of each.
    """

    ropes: tuple[Rope, ...] = dataclasses.field(metadata={"static": True})
    tables: tuple[tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]], ...]

    @staticmethod
    def of(ropes: Iterable[Rope | None], positions: Int[Array, "B T"]) -> "Rotations":
        """Of tokens at these positions."""
        distinct = tuple(dict.fromkeys(rope for rope in ropes if rope is not None))
        return Rotations(distinct, tuple(rope.table(positions) for rope in distinct))

    def table(self, rope: Rope) -> tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]]:
        """Cosines and sines under one rope."""
        return self.tables[self.ropes.index(rope)]

    def rotate(self, x: Float[Array, "B T H D"], rope: Rope | None) -> Float[Array, "B T H D"]:
        """Queries or keys, rotated; as they are if rope is None."""
        return x if rope is None else rope.rotate(x, *self.table(rope))
