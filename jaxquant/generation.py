"""Sampling and the decode loop: prefill once, then chunks of tokens without leaving the device."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int

from jaxquant.errors import JaxquantError
from jaxquant.models.attention import Cache

# Tokens per call into the device, at most; a stream asks for fewer at a time.
LONGEST_CHUNK = 64
STREAM_CHUNK = 8
# What a cache may be made of, and prompts attend in, beside the model's dtype.
CACHE_DTYPES = ("float8_e4m3fn",)
ATTENTION_DTYPES = ("float8_e4m3fn",)
# Stands where a sequence that is done has no token.
_NONE = -1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is picked. The filters apply in the order of the fields, as in
    transformers.

    Attributes:
      repetition_penalty: divides positive logits of tokens seen before, multiplies negative ones
        (https://arxiv.org/abs/1909.05858); 1 is none.
      temperature: divides logits; 0 takes the most likely token, whatever the rest says.
      top_k: samples among the k most likely; 0 is all.
      top_p: samples among the fewest tokens whose probabilities add up to p; 1 is all.
      min_p: drops tokens less likely than min_p times the most likely one; 0 is none.
      seed: the same seed gives the same tokens.

    Raises:
      JaxquantError: a value out of range, by name.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("repetition_penalty", 1e-3, 1e3),
            ("temperature", 0.0, 1e3),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 1e-9, 1.0),
            ("min_p", 0.0, 1.0),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            whole = name in ("top_k", "seed")
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
                kind = "an integer" if whole else "a number"
                raise JaxquantError(f"{name} is {value!r}; allowed: {kind} from {low} to {high}")


def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    chunk: int = STREAM_CHUNK,
    cache_dtype: Any = None,
    attention_dtype: Any = None,
) -> Iterator[list[list[int]]]:
    """Generates in chunks.

    Args:
      model: a family's model, with `prefill`, `decode`, `empty_cache` and `cfg`.
      prompts: token ids; their lengths may differ.
      sampling: how tokens are picked.
      max_new_tokens: per prompt, at most; less if the context of the model ends before.
      stop_tokens: ids that end a sequence; the one that did is the last of its tokens.
      chunk: tokens per yield, at most.
      cache_dtype: of keys and values: None, the model's, or "float8_e4m3fn", half of BF16's bytes.
      attention_dtype: what prompts attend in: None, the model's, or "float8_e4m3fn", faster on
        Hopper for long ones; see `jaxquant.attention.fp8`.

    Yields:
      The new tokens of each prompt; an empty list for one that has ended. The caller may stop at
      any time.

    Raises:
      JaxquantError: an empty prompt, one that fills the context, ids outside the vocabulary;
        another cache_dtype or attention_dtype.
    """
    _check(model.cfg, prompts, max_new_tokens)
    check_dtype("cache_dtype", cache_dtype, CACHE_DTYPES)
    check_dtype("attention_dtype", attention_dtype, ATTENTION_DTYPES)
    B, rows = len(prompts), _power_of_two(len(prompts))
    lengths = np.ones(rows, np.int32)
    lengths[:B] = [len(p) for p in prompts]
    longest = int(lengths.max())
    T = bucket(longest)
    new = min(max_new_tokens, model.cfg.max_position - longest)
    tokens = np.zeros((rows, T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    state = _prefill(
        model,
        tokens,
        lengths,
        np.arange(rows) >= B,
        max(T, bucket(longest + new)),
        cache_dtype,
        attention_dtype,
    )
    stops = np.full(-(-max(len(stop_tokens), 1) // 8) * 8, -1, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    knobs = _Knobs.of(sampling)
    produced = 0
    while produced < new:
        n = min(chunk, new - produced, LONGEST_CHUNK)
        state, out, counts = _decode(model, state, knobs, stops, n)
        out, counts, done = jax.device_get((out, counts, state.done))
        yield [out[row, : counts[row]].tolist() for row in range(B)]
        produced += n
        if done.all():
            return


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    **options: Any,
) -> list[list[int]]:
    """All of `stream` at once, with its options: the new tokens of each prompt."""
    result: list[list[int]] = [[] for _ in prompts]
    for pieces in stream(model, prompts, sampling, chunk=LONGEST_CHUNK, **options):
        for tokens, piece in zip(result, pieces, strict=True):
            tokens.extend(piece)
    return result


def check_dtype(option: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises JaxquantError unless the value is None or allowed."""
    if value is not None and value not in allowed:
        raise JaxquantError(
            f"{option} is {value!r}; allowed: {', '.join(allowed)}, or None for the model's"
        )


def bucket(n: int) -> int:
    """n rounded up, so that few shapes are compiled: powers of two from 32, then 512's."""
    return max(32, _power_of_two(n)) if n <= 512 else -(-n // 512) * 512


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
    """What one chunk hands to the next; donated."""

    cache: Cache
    logits: Float32[Array, "B V"]  # of the next token
    seen: Bool[Array, "B V"]  # tokens of the prompt or generated
    done: Bool[Array, " B"]
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Knobs:
    """Sampling, split into what is compiled in and what is not."""

    repetition_penalty: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})
    penalized: bool = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(s: Sampling) -> "_Knobs":
        return _Knobs(
            repetition_penalty=np.float32(s.repetition_penalty),
            temperature=np.float32(s.temperature),
            top_k=np.int32(s.top_k),
            top_p=np.float32(s.top_p),
            min_p=np.float32(s.min_p),
            seed=np.uint32(s.seed),
            greedy=s.temperature < 1e-5,  # less would overflow logits / temperature
            filtered=s.top_k > 0 or s.top_p < 1 or s.min_p > 0,
            penalized=s.repetition_penalty != 1,
        )


@functools.partial(jax.jit, static_argnames=("slots", "cache_dtype", "attention_dtype"))
def _prefill(
    model: Any,
    tokens: Array,
    lengths: Array,
    done: Array,
    slots: int,
    cache_dtype: str | None = None,
    attention_dtype: str | None = None,
) -> _State:
    cache = model.empty_cache(len(tokens), slots, cache_dtype, awaited=tokens.shape[1])
    logits, cache = model.prefill(tokens, lengths, cache, attention_dtype)
    rows = jnp.arange(tokens.shape[0])[:, None]
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    # Padding marks no token: an index beyond the vocabulary is dropped.
    seen = jnp.zeros(logits.shape, bool)
    seen = seen.at[rows, jnp.where(real, tokens, logits.shape[1])].set(True, mode="drop")
    return _State(cache, logits, seen, done, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, donate_argnames="state")
def _decode(
    model: Any, state: _State, knobs: _Knobs, stops: Array, n: Any
) -> tuple[_State, Int[Array, "B chunk"], Int[Array, " B"]]:
    """Up to n tokens of each sequence that is not done, and how many each got."""
    B = state.done.shape[0]

    def body(carry: tuple) -> tuple:
        state, out, i = carry
        token = sample(state.logits, state.seen, knobs, state.step)
        # Each in one kernel, where XLA makes two of a scatter, and of `done | isin(...)`.
        drawn = jnp.where(state.done, _NONE, token)
        out = lax.dynamic_update_slice_in_dim(out, drawn[:, None], i, axis=1)
        done = jnp.any(state.done[:, None] | (token[:, None] == stops), axis=1)
        seen = state.seen.at[jnp.arange(B), token].set(True) if knobs.penalized else state.seen
        logits, cache = model.decode(token, state.cache)
        return _State(cache, logits, seen, done, state.step + 1), out, i + 1

    def unfinished(carry: tuple) -> Array:
        state, _, i = carry
        return (i < n) & ~state.done.all()

    out = jnp.full((B, LONGEST_CHUNK), _NONE, jnp.int32)
    state, out, _ = lax.while_loop(unfinished, body, (state, out, 0))
    got = out != _NONE
    return state, jnp.where(got, out, 0), jnp.sum(got, axis=1, dtype=jnp.int32)


def sample(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"], knobs: Any, step: Any
) -> Int[Array, " B"]:
    """The next token of each sequence."""
    if knobs.penalized:
        penalty = knobs.repetition_penalty
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalized, logits)
    if knobs.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / knobs.temperature
    if knobs.filtered:
        logits = jnp.where(logits >= _threshold(logits, knobs), logits, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(knobs.seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _threshold(logits: Float32[Array, "B V"], knobs: Any) -> Float32[Array, "B 1"]:
    """The least logit that top-k, top-p and min-p leave."""
    V = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(knobs.top_k > 0, jnp.minimum(knobs.top_k, V), V)
    ranked = jnp.where(jnp.arange(V) < k, ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # A likelihood relative to the most likely token is a difference of logits.
    enough = ranked - ranked[:, :1] >= jnp.log(knobs.min_p)
    # Rounded sums reach 1 before the end: a top_p of 1 has to keep what is there too.
    likely = (before < knobs.top_p) | (knobs.top_p >= 1)
    kept = likely & enough & jnp.isfinite(ranked)
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)


def _check(cfg: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise JaxquantError(f"max_new_tokens is {max_new_tokens!r}; allowed: a positive integer")
    if not len(prompts):
        raise JaxquantError("no prompts came; give at least one")
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if not ids.size:
            raise JaxquantError(f"prompt {i} is empty; give at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise JaxquantError(f"prompt {i} is {prompt!r:.80}; allowed: a sequence of token ids")
        if len(prompt) >= cfg.max_position:
            raise JaxquantError(
                f"prompt {i} has {len(prompt)} tokens; the context of the model is "
                f"{cfg.max_position} tokens, with room for at least one new one"
            )
        low, high = ids.min(), ids.max()
        if low < 0 or high >= cfg.vocab_size:
            raise JaxquantError(
                f"prompt {i} has the token id {high if high >= cfg.vocab_size else low}; "
                f"allowed: 0 to {cfg.vocab_size - 1}"
            )
