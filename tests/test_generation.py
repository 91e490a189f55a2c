"""Sampling against transformers' definitions in numpy; the decode loop against the full forward."""

import dataclasses
from itertools import chain
from typing import Any

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import generation
from jaxquant.errors import JaxquantError
from jaxquant.generation import Sampling

V = 24
CONTEXT = builders.CONFIG["max_position_embeddings"]
PROMPT = [5, 17, 200, 31, 8]


@pytest.fixture(scope="module")
def model():
    return builders.tiny_model()


def reference(logits, seen, s):
    """Probabilities as transformers' logits processors and warpers make them, in their order."""
    scores = logits.astype(np.float64)
    penalized = np.where(scores < 0, scores * s.repetition_penalty, scores / s.repetition_penalty)
    scores = np.where(seen, penalized, scores)
    if s.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    scores = scores / s.temperature
    if s.top_k > 0:
        scores[scores < np.sort(scores)[-min(s.top_k, len(scores))]] = -np.inf
    if s.top_p < 1:
        order = np.argsort(scores)
        remove = np.cumsum(_softmax(scores[order])) <= 1 - s.top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    if s.min_p > 0:
        probs = _softmax(scores)
        scores[probs < s.min_p * probs.max()] = -np.inf
    return _softmax(scores)


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def draw(logits, seen, sampling, n):
    """n tokens for one row of logits."""
    return np.asarray(_draw(logits[None], seen[None], generation._Knobs.of(sampling), np.arange(n)))


@jax.jit
def _draw(logits, seen, knobs, steps):
    return jax.vmap(lambda step: generation.sample(logits, seen, knobs, step)[0])(steps)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=1.0, repetition_penalty=1.8),
        Sampling(temperature=1.0, repetition_penalty=0.6),
        Sampling(temperature=1.3, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.3),
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in dataclasses.asdict(s).items() if k != "seed"),
)
def test_samples_have_transformers_distribution(sampling):
    """The chi-square statistic of 20000 draws at a fixed seed, and not one that is filtered out."""
    n = 20_000
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits = (2 * rng.standard_normal(V)).astype(np.float32)
        seen = rng.random(V) < 0.3
        expected = reference(logits, seen, sampling)
        counts = np.bincount(draw(logits, seen, sampling, n), minlength=V)
        assert (counts[expected == 0] == 0).all()
        often = n * expected > 5
        statistic = ((counts - n * expected)[often] ** 2 / (n * expected[often])).sum()
        degrees = often.sum() - 1
        assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 5  # five standard deviations


@pytest.mark.parametrize("penalty", [1.0, 0.5, 1.4])
def test_greedy_is_the_most_likely_after_the_penalty(penalty):
    sampling = Sampling(repetition_penalty=penalty, top_k=3, top_p=0.1, min_p=0.5)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, V)).astype(np.float32)
    seen = rng.random((64, V)) < 0.5
    knobs = generation._Knobs.of(sampling)
    got = generation.sample(jnp.asarray(logits), jnp.asarray(seen), knobs, 0)
    assert got.dtype == jnp.int32
    assert np.array_equal(
        got, [reference(row, s, sampling).argmax() for row, s in zip(logits, seen, strict=True)]
    )


@pytest.mark.parametrize("temperature", [1e-44, 1e-30, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = np.asarray([-3e4, 2e4, 1e4, 1.5e4], np.float32)
    tokens = draw(logits, np.zeros(4, bool), Sampling(temperature=temperature, top_p=0.9), 50)
    assert (tokens == 1).all()


def test_rows_and_steps_draw_independently():
    knobs = generation._Knobs.of(Sampling(temperature=1.0))
    logits, seen = jnp.zeros((8, 1000)), jnp.zeros((8, 1000), bool)
    draws = np.stack([generation.sample(logits, seen, knobs, step) for step in range(4)])
    assert len(np.unique(draws)) > 28


@pytest.mark.parametrize("sampling", [Sampling(repetition_penalty=1.5), Sampling()])
def test_greedy_equals_the_full_forward(model, sampling):
    tokens = list(PROMPT)
    for _ in range(9):
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(model(padded))[0, len(tokens) - 1]
        seen = np.isin(np.arange(len(logits)), tokens)
        tokens.append(int(reference(logits, seen, sampling).argmax()))
    (new,) = generation.generate(model.module, [PROMPT], sampling, max_new_tokens=9)
    assert PROMPT + new == tokens


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 50, "seed": 3}])
def test_chunks_add_up(model, sampling):
    prompts, sampling = [PROMPT, PROMPT[:2], [7]], Sampling(**sampling)
    whole = generation.generate(model.module, prompts, sampling, max_new_tokens=20)
    assert [len(tokens) for tokens in whole] == [20] * 3
    for chunk in (1, 7, 20, 1000):
        pieces = list(
            generation.stream(model.module, prompts, sampling, max_new_tokens=20, chunk=chunk)
        )
        assert [list(chain(*row)) for row in zip(*pieces, strict=True)] == whole
        assert max(len(piece) for piece in pieces[0]) == min(chunk, 20)


def test_seeds_reproduce(model):
    def new(seed, prompts=(PROMPT,)):
        options = {"max_new_tokens": 20, "stop_tokens": ()}
        return model.generate(prompts, temperature=1.0, seed=seed, **options)

    assert new(2**32 - 1) == new(2**32 - 1)
    assert new(1) != new(2)
    a, b = new(1, (PROMPT, PROMPT))
    assert a != b  # two answers to one prompt are two draws


def test_a_stop_token_is_the_last(model):
    (free,) = model.generate([PROMPT], max_new_tokens=16, stop_tokens=())
    stop = free[5]
    expected = free[: free.index(stop) + 1]
    assert model.generate([PROMPT], max_new_tokens=16, stop_tokens=[999_999, stop]) == [expected]
    pieces = list(
        generation.stream(
            model.module, [PROMPT], Sampling(), max_new_tokens=16, stop_tokens=[stop], chunk=2
        )
    )
    assert list(chain(*(row for (row,) in pieces))) == expected
    assert pieces[-1] != [[]]


def test_rows_end_on_their_own(model):
    prompts = [PROMPT, PROMPT[::-1], [9, 9]]
    free = model.generate(prompts, max_new_tokens=16, stop_tokens=())
    stops = [free[0][3], free[2][9]]
    new = model.generate(prompts, max_new_tokens=16, stop_tokens=stops)
    for row, tokens in zip(new, free, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in stops]
        assert row == (tokens[: ends[0] + 1] if ends else tokens)
    assert len({len(row) for row in new}) > 1


def test_the_checkpoints_stop_tokens_are_the_default(model, monkeypatch):
    (free,) = model.generate([PROMPT], max_new_tokens=16, stop_tokens=())
    monkeypatch.setattr(model, "generation_config", {"eos_token_id": [1000, free[2]]})
    assert model.generate([PROMPT], max_new_tokens=16) == [free[: free.index(free[2]) + 1]]
    monkeypatch.setattr(model, "generation_config", {"eos_token_id": free[2]})
    assert model.stop_tokens == (free[2],)
    monkeypatch.setattr(model, "generation_config", {})
    assert model.stop_tokens == (builders.CONFIG["eos_token_id"],)
    monkeypatch.setattr(model, "generation_config", {"eos_token_id": "</s>"})
    with pytest.raises(JaxquantError, match=r"eos_token_id is .*'</s>'.*; allowed: a token id"):
        model.generate([PROMPT])


@pytest.mark.parametrize("length", [CONTEXT - 6, CONTEXT - 1])
def test_the_context_ends_generation(model, length):
    prompt = (PROMPT * CONTEXT)[:length]
    (new,) = model.generate([prompt], max_new_tokens=50, stop_tokens=())
    assert len(new) == CONTEXT - length
    logits = np.asarray(model(np.asarray([prompt + new], np.int32)))[0]
    assert new == logits[length - 1 : -1].argmax(-1).tolist()


def test_prompts_may_be_arrays(model, unchecked):
    rows = np.asarray([PROMPT, PROMPT[::-1]], np.int32)
    expected = model.generate(rows.tolist(), max_new_tokens=4, stop_tokens=())
    for tokens in (rows, jnp.asarray(rows), list(rows)):
        assert model.generate(tokens, max_new_tokens=4, stop_tokens=()) == expected


def test_compiled_once_per_bucket(model):
    """Lengths, counts and values of sampling share code; flags and buckets have their own."""

    prefill_and_decode: Any = generation._prefill, generation._decode

    def sizes():
        return tuple(function._cache_size() for function in prefill_and_decode)

    def run(length, new, **sampling):
        generation.generate(
            model.module, [[1] * length], Sampling(**sampling), max_new_tokens=new,
            stop_tokens=range(new % 8),
        )  # fmt: skip

    run(3, 9)
    run(3, 9, temperature=1.0, top_p=0.9)
    before = sizes()
    for length, new in ((1, 1), (31, 1), (17, 15)):
        run(length, new)
        run(length, new, temperature=0.3, top_k=3, seed=length)
    assert sizes() == before
    run(30, 30)  # a longer cache
    prefill, decode = sizes()
    assert (prefill - before[0], decode - before[1]) == (1, 1)
    run(28, 20)
    assert sizes() == (prefill, decode)


def test_the_cache_is_donated(model):
    module = model.module
    tokens, lengths = np.ones((1, 32), np.int32), np.ones(1, np.int32)
    state = generation._prefill(module, tokens, lengths, np.zeros(1, bool), 32)
    knobs, stops = generation._Knobs.of(Sampling()), np.full(8, -1, np.int32)
    address = state.cache.k.unsafe_buffer_pointer()
    new, _, _ = generation._decode(module, state, knobs, stops, 4)
    assert state.cache.k.is_deleted()
    assert state.logits.is_deleted()
    assert new.cache.k.unsafe_buffer_pointer() == address  # in place


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 32), (32, 32), (33, 64), (512, 512), (513, 1024), (1025, 1536)]
)
def test_buckets(n, expected):
    assert generation.bucket(n) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", None),
    ],
)
def test_options_out_of_range_are_named(field, value, unchecked):
    with pytest.raises(
        JaxquantError, match=rf"{field} is {value!r}; allowed: an? ".replace("'", ".")
    ):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts came"),
        ([[1], []], "prompt 1 is empty"),
        ([[1] * CONTEXT], f"prompt 0 has {CONTEXT} tokens; the context of the model is {CONTEXT}"),
        ([[1, -1]], "prompt 0 has the token id -1; allowed: 0 to 259"),
        ([[1], [3, 260]], "prompt 1 has the token id 260"),
        ([[1.5]], r"prompt 0 is \[1.5\]; allowed: a sequence of token ids"),
        ([1, 2], "prompt 0 is 1; allowed: a sequence of token ids"),
        (["hello"], "prompt 0 is 'hello'; allowed: a sequence of token ids"),
        ("hello", "prompt 0 is 'h'"),
        ([[[1]]], r"prompt 0 is \[\[1\]\]"),
    ],
)
def test_prompts_that_cannot_be_continued(model, prompts, message, unchecked):
    with pytest.raises(JaxquantError, match=message):
        model.generate(prompts, max_new_tokens=2)


def test_an_fp8_cache(model, monkeypatch):
    dtypes = []
    prefill = generation._prefill

    def spy(*args):
        state = prefill(*args)
        dtypes.append(jax.tree.leaves(state.cache)[0].dtype)
        return state

    monkeypatch.setattr(generation, "_prefill", spy)
    options = {"max_new_tokens": 8, "stop_tokens": ()}
    expected = model.generate([PROMPT], **options)
    (new,) = model.generate([PROMPT], **options, cache_dtype="float8_e4m3fn")
    assert dtypes == [jnp.float32, jnp.float8_e4m3fn]
    assert (new[0], len(new)) == (expected[0][0], 8)  # the first is of the prefill


def test_a_prompt_attends_in_fp8(model, monkeypatch):
    dtypes = []
    prefill = generation._prefill

    def spy(*args):
        dtypes.append(args[-1])
        return prefill(*args)

    monkeypatch.setattr(generation, "_prefill", spy)
    options = {"max_new_tokens": 3, "stop_tokens": ()}
    for dtype in (None, "float8_e4m3fn"):
        (new,) = model.generate([PROMPT], **options, attention_dtype=dtype)
        assert len(new) == 3
    assert dtypes == [None, "float8_e4m3fn"]


@pytest.mark.parametrize("option", ["cache_dtype", "attention_dtype"])
@pytest.mark.parametrize("value", ["fp8", "float8_e5m2", "bfloat16"])
def test_other_dtypes_are_refused(model, option, value):
    with pytest.raises(JaxquantError) as caught:
        model.generate([PROMPT], **{option: value})
    assert str(caught.value) == (
        f"{option} is {value!r}; allowed: float8_e4m3fn, or None for the model's"
    )


@pytest.mark.parametrize("value", [0, -3, 1.5, None])
def test_max_new_tokens_is_positive(model, value, unchecked):
    with pytest.raises(JaxquantError, match=f"max_new_tokens is {value}; allowed: a positive"):
        model.generate([PROMPT], max_new_tokens=value)
