"""The decoder that families share: embedding, stacks of layers, norm, head; prefill and decode.

Equal layers are stacked and scanned: one layer is compiled, and a kernel can read its weights in
place from the stack. Layers that differ in what is quantized are in stacks of their own.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxquant.models.attention import Cache, DecodeStep, Forward, Prefill
from jaxquant.models.fused import FusedRows, StackedExperts
from jaxquant.models.layers import RMSNorm, Rope, Stack, Table


class Decoder(nnx.Module):
    """A decoder-only model. Parameters are ShapeDtypeStructs until they are loaded.

    A family sets `layers_type`: made of `(cfg, stack, dtype)`, called with

        x             [B, T, K], the residual stream
        l             which layer of the stack
        tokens        what is done: `attention.Forward`, `Prefill` or `DecodeStep`
        cache         the Cache that goes with it, or None
        cache_layer   which layer of the model
        kind          of cfg.layer_kinds, if the config has them

    and returning x and the cache.

    Args:
      cfg: the family's sizes; with vocab_size, hidden_size, num_layers, rms_norm_eps,
        tie_word_embeddings, and for the cache num_kv_heads and head_dim. Layers whose parameters
        are equal but whose computation is not have `layer_kinds`, one hashable for each.
      dtype: of parameters and activations.
      stacks: how layers are stored; default one for each run of equal layers.
    """

    layers_type: ClassVar[Any]
    norm_type: ClassVar[Any] = RMSNorm
    # Path of a parameter, or the end of one within a layer -> what the checkpoint calls it, where
    # that differs.
    checkpoint_names: ClassVar[Mapping[str, str]] = {}

    @staticmethod
    def fused(cfg: Any) -> Mapping[str, FusedRows]:
        """Modules of the checkpoint that hold the rows of several projections, by name."""
        return {}

    @classmethod
    def stacked(cls, cfg: Any) -> StackedExperts | None:
        """How the experts of a layer lie in a checkpoint that has them stacked."""
        return None

    @staticmethod
    def variant(cfg: Any, layer: int) -> Hashable:
        """What tells layers with different parameters apart, in a family that has some."""
        return None

    def __init__(self, cfg: Any, dtype: Any, stacks: Sequence[Stack] | None = None):
        stacks = stacks or _equal_layers(cfg, self.variant)
        self.cfg = cfg
        self.stacks = tuple(stacks)
        self.embed_tokens = Table(cfg.vocab_size, cfg.hidden_size, dtype)
        self.layers = nnx.List([self.layers_type(cfg, stack, dtype) for stack in stacks])
        self.norm = self.norm_type(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None if cfg.tie_word_embeddings else Table(cfg.vocab_size, cfg.hidden_size, dtype)
        )

    def __call__(
        self, tokens: Int[Array, "B T"], attention_dtype: str | None = None
    ) -> Float32[Array, "B T V"]:
        """Logits of every token, without a cache; `attention_dtype` as in `prefill`."""
        forward = Forward.of(tokens, self._ropes, dtype=attention_dtype)
        x, _ = self._run(tokens, forward, None)
        return self.head(x)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        cache: Cache,
        attention_dtype: str | None = None,
    ) -> tuple[Float32[Array, "B V"], Cache]:
        """Fills an empty cache with prompts.

        Args:
          tokens: the prompts, padded on the right.
          lengths: their lengths, 1 to T.
          cache: at least T slots.
          attention_dtype: what the prompts attend in: None, the model's dtype, or "float8_e4m3fn";
            see `jaxquant.attention.fp8`.

        Returns:
          Logits of the last token of each prompt, and the cache.
        """
        prefill = Prefill.of(tokens, self._ropes, lengths, attention_dtype)
        x, cache = self._run(tokens, prefill, cache)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.head(last), dataclasses.replace(cache, lengths=lengths)

    def decode(self, tokens: Int[Array, " B"], cache: Cache) -> tuple[Float32[Array, "B V"], Cache]:
        """Appends one token to each sequence; the cache must have a slot for it.

        Returns:
          Logits of these tokens, and the cache.
        """
        lengths = cache.lengths
        step = DecodeStep.of(lengths, self._ropes)
        devices = max(stack.groups for stack in self.stacks)
        x, cache = self._run(tokens[:, None], step, cache, _unrolled(devices))
        return self.head(x[:, 0]), dataclasses.replace(cache, lengths=lengths + 1)

    @property
    def _kinds(self) -> tuple:
        return getattr(self.cfg, "layer_kinds", (None,) * self.cfg.num_layers)

    @property
    def _ropes(self) -> list[Rope | None]:
        return [kind.rope for kind in self._kinds if kind is not None]

    def _run(
        self, ids: Int[Array, "B T"], tokens: Any, cache: Any, unrolled: int = 1
    ) -> tuple[Float[Array, "B T K"], Any]:
        # The cache is carried and written in place; as a scanned input it would be copied.
        carry = self.embed(ids), cache
        kinds = self._kinds
        for stack, layers in zip(self.stacks, self.layers, strict=True):
            first = stack.layers.start
            for start, period, count in repeats(kinds[first : stack.layers.stop]):
                pattern = kinds[first + start :][:period]

                def layers_of(
                    i: Array,
                    carry: tuple,
                    layers: Any = layers,
                    first: int = first,
                    start: int = start,
                    pattern: tuple = pattern,
                ) -> tuple:
                    x, cache = carry
                    l = start + len(pattern) * i
                    for j, kind in enumerate(pattern):
                        how = () if kind is None else (kind,)
                        x, cache = layers(x, l + j, tokens, cache, first + l + j, *how)
                    return x, cache

                carry = _repeat(layers_of, count, carry, max(1, unrolled // period))
        return carry

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """The residual stream that enters the first layer."""
        return self.embed_tokens.embed(ids)

    def head(self, x: Float[Array, "*batch K"]) -> Float32[Array, "*batch V"]:
        """Final norm and logits in float32."""
        return (self.lm_head or self.embed_tokens).logits(x, self.norm.prologue)

    def empty_cache(self, B: int, S: int, dtype: Any = None, awaited: int = 0) -> Cache:
        """A cache for B sequences of up to S tokens, of the model's dtype or another.

        Args:
          B: batch size.
          S: slots.
          dtype: also float8_e4m3fn.
          awaited: tokens of the prompts that come next, padded, whose slots need no zeros.
        """
        cfg = self.cfg
        dtype = dtype or self.embed_tokens.weight.get_value().dtype
        L, H, D = cfg.num_layers, cfg.num_kv_heads, cfg.head_dim
        return Cache.empty(L, B, H, S, D, dtype, awaited=awaited)


def _unrolled(devices: int) -> int:
    """Layers that a decode step does in one turn of a loop."""
    if jax.default_backend() != "gpu":
        return 1
    # A turn is counted by kernels, and waits for the one before: 8 layers in one take 1.3% more of
    # one token's step than 32 do. What is the same in each of them is compiled once, but not where
    # XLA divides it among devices: a layer takes 1.4 s there.
    return 32 if devices == 1 else 4


def _repeat(piece: Callable[[Array, tuple], tuple], count: int, carry: tuple, most: int) -> tuple:
    """`carry = piece(i, carry)` for i below count, at most `most` of them in one turn of a loop."""
    turns = -(-count // most)
    size = count // turns

    def turn(_: Array, state: tuple) -> tuple:
        carry, before = state
        for j in range(size):
            carry = piece(before[j] * size + j, carry)
        return carry, before + 1

    # The turns before, an array: what XLA makes of one it makes in one kernel, of a scalar, such as
    # the loop's own counter, each number in a kernel of its own.
    carry, _ = lax.fori_loop(0, turns, turn, (carry, jnp.zeros(size, jnp.int32)))
    for i in range(turns * size, count):
        carry = piece(jnp.int32(i), carry)
    return carry


def _equal_layers(cfg: Any, variant: Callable[[Any, int], Hashable]) -> list[Stack]:
    runs = itertools.groupby(range(cfg.num_layers), key=lambda l: variant(cfg, l))
    layers = [list(run) for _, run in runs]
    return [Stack(range(run[0], run[-1] + 1)) for run in layers]


@functools.lru_cache
def repeats(kinds: tuple[Hashable, ...]) -> tuple[tuple[int, int, int], ...]:
    """Cuts a sequence into repeated patterns such that the patterns are short in all.

    Args:
      kinds: of n layers.

    Returns:
      `(start, period, count)` of each piece: `kinds[start : start + period]`, count times.

    >>> repeats(("a", "a", "b", "a", "a", "b", "a"))
    ((0, 3, 2), (6, 1, 1))
    """
    n = len(kinds)
    best: dict[int, tuple[int, tuple]] = {n: (0, ())}
    for start in reversed(range(n)):
        options = []
        for period in range(1, n - start + 1):
            pattern, end = kinds[start : start + period], start + period
            while kinds[end : end + period] == pattern:
                end += period
            cost, pieces = best[end]
            options.append((period + cost, ((start, period, (end - start) // period), *pieces)))
        best[start] = min(options, key=lambda option: option[0])
    return best[0][1]
