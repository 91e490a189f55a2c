"""Attention of prompts in FP8: the reference, its units, and what is handed to cuDNN.

There is no cuDNN here: in its place stands what it computes.
"""

import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import causal, relative_error
from hopper import ON_GPU, on_hopper
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from jaxquant.attention import fp8
from jaxquant.attention.cache import FP8
from jaxquant.models.attention import Cache, Forward, Prefill, of_heads
from jaxquant.models.layers import Rope

# That of a single e4m3 operand is 2.6%; these are queries, keys, values, weights and the result.
TOLERANCE = 7e-2


def operands(B: int, T: int, H: int, G: int, D: int, seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, H * G, D), (B, T, H, D), (B, T, H, D)
    return tuple(jnp.asarray(rng.standard_normal(s), "bfloat16") for s in shapes)


def attend(*qkv: jax.Array, **options: Any) -> jax.Array:
    return jax.jit(functools.partial(_attend, **options))(*qkv)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    units = fp8.fp8_units(q, k, v)
    y = fp8.fp8_attention(fp8.in_units((q, k, v), units), units, q.dtype, **options)
    return of_heads(y, q.shape[2])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 200, 2, 2, 64), {}),
        ((1, 1, 1, 3, 40), {}),
        ((1, 300, 1, 2, 16), {"window": 40, "scale": 0.5}),
        ((1, 129, 3, 1, 16), {"softcap": 2.0, "window": 500}),
    ],
)
def test_attention_is_the_definitions_within_what_fp8_holds(shape, options):
    q, k, v = operands(*shape)
    y = attend(q, k, v, **options)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert 1e-2 < relative_error(y, causal(q, k, v, **options)) <= TOLERANCE


def test_it_is_the_definition_of_the_documentation():
    q, k, v = operands(1, 5, 1, 1, 16)
    units = [2.0 ** (np.floor(np.log2(np.abs(np.asarray(x, float)).max())) - 7) for x in (q, k, v)]
    np.testing.assert_array_equal(fp8.fp8_units(q, k, v), units)

    def e4m3(x):
        return np.asarray(jnp.asarray(x, jnp.float32).astype(FP8), np.float64)

    q8, k8, v8 = (
        e4m3(np.asarray(x, float)[0, :, 0] / unit) for x, unit in zip((q, k, v), units, strict=True)
    )
    logits = np.where(np.tri(5, dtype=bool), 0.25 * units[0] * units[1] * q8 @ k8.T, -np.inf)
    p = 256 * np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = units[2] * e4m3(e4m3(p) @ v8 / p.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(np.asarray(attend(q, k, v), float)[0, :, 0], expected)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with on_hopper(monkeypatch, fp8, uninitialized_memory="nan", detect_races=True):
        yield


def units_by_xla(monkeypatch, *operands: Any) -> fp8.Units:
    def refuse(*_):
        raise NotImplementedError

    with monkeypatch.context() as m:
        m.setattr(fp8, "_units_by_kernel", refuse)
        return fp8.fp8_units(*operands)


@pytest.mark.parametrize(
    ("B", "T", "Hq", "H", "D", "stretch"),
    [(2, 128, 9, 3, 64, 1.0), (3, 128, 3, 1, 128, 1.3), (1, 128, 2, 2, 256, 1.0)],
)
def test_the_kernel_finds_the_units(hopper, monkeypatch, B, T, Hq, H, D, stretch):
    rng, heads = np.random.default_rng(0), (Hq, H, H)
    qkv = [rng.standard_normal((B, T, n, D)) * 10.0**-n for n in heads]
    for t, place in ((0, 0), (77, 1), (T - 1, -1)):  # wherever the largest is
        for x in qkv:
            x[-1, t, place % x.shape[2], place] = -10 * np.abs(x).max()
        q, k, v = (jnp.asarray(x, "bfloat16") for x in qkv)
        units = fp8._units_by_kernel(q, k, v, stretch)
        np.testing.assert_array_equal(units, units_by_xla(monkeypatch, q, k, v, stretch))
    assert ON_GPU or not gpu_callbacks.get_races().races_found


def test_units_of_zeros_by_the_kernel(hopper, monkeypatch):
    x = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    expected = units_by_xla(monkeypatch, x, x, x)
    np.testing.assert_array_equal(fp8._units_by_kernel(x, x, x, 1.0), expected)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_a_power_of_two_changes_nothing_but_the_unit(factor):
    q, k, v = operands(1, 40, 1, 2, 16)
    expected = np.asarray(attend(q, k, v), np.float64)
    np.testing.assert_array_equal(np.asarray(attend(q / factor, factor * k, v)), expected)
    np.testing.assert_array_equal(np.asarray(attend(q, k, factor * v)), factor * expected)


def test_a_sequence_does_not_depend_on_its_batch():
    short, long = operands(1, 40, 2, 2, 16), operands(1, 40, 2, 2, 16, seed=1)
    together = attend(*(jnp.concatenate([x, 9 * y]) for x, y in zip(short, long, strict=True)))
    alone = np.asarray(attend(*short), np.float64)
    assert relative_error(together[:1], alone) <= 1e-3  # what is smallest is rounded more


def test_a_token_sees_none_behind_it():
    q, k, v = operands(1, 200, 1, 2, 16)
    y = attend(q, k.at[:, 150:].multiply(-0.5), v.at[:, 150:].multiply(-0.5))
    np.testing.assert_array_equal(y[:, :150], attend(q, k, v)[:, :150])


def test_zeros_stay_zeros():
    q, k, v = (jnp.zeros((1, 130, h, 16), jnp.bfloat16) for h in (2, 1, 1))
    assert not attend(q, k, v).any()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.8])
def test_what_is_rotated_later_stays_within_448_units(factor):
    rope = Rope(8, 1e4, scaling="yarn", attention_factor=factor)
    x = jnp.full((1, 128, 1, 8), -3.99, jnp.bfloat16)
    rotated = rope.rotate(x, *rope.table(jnp.arange(128)[None]))
    units = fp8.fp8_units(x, x, x, max(1.0, factor))
    q, *_ = fp8.in_units((rotated, rotated, rotated), units)
    largest = jnp.abs(rotated).max() / units[0]
    assert largest <= 448
    assert jnp.abs(q.astype(jnp.float32)).max() == pytest.approx(largest, rel=2**-4)


# Models ------------------------------------------------------------------------------------------


def both(dtype: str | None, cache_dtype: str, rope: Rope, **options: Any) -> tuple:
    """What a prompt gets without a cache, and with one."""
    q, k, v = operands(2, 40, 1, 2, 16)
    B, T, H, D = k.shape
    ids = jnp.zeros((B, T), jnp.int32)
    cache = Cache.empty(2, B, H, T, D, cache_dtype)
    forward, prefill = (kind.of(ids, [rope], dtype=dtype) for kind in (Forward, Prefill))
    y, _ = forward.attend(q, k, v, None, 1, rope=rope, **options)
    return y, *prefill.attend(q, k, v, cache, 1, rope=rope, **options)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("rope", "options"),
    [
        (Rope(16, 1e4), {}),
        (Rope(8, 1e4, interleaved=True), {"window": 4, "softcap": 5.0, "scale": 0.3}),
    ],
)
def test_tokens_attend_in_fp8_with_a_cache_and_without(cache_dtype, rope, options):
    exact, *_ = both(None, cache_dtype, rope, **options)
    y, prefilled, cache = both("float8_e4m3fn", cache_dtype, rope, **options)
    assert 1e-2 < relative_error(y, np.asarray(exact, np.float64)) <= TOLERANCE
    np.testing.assert_array_equal(y, prefilled)
    *_, same = both(None, cache_dtype, rope, **options)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# cuDNN -------------------------------------------------------------------------------------------


def stand_in(
    q: Any, k: Any, v: Any, *, fp8_params: Any, scale: float, mask_type: Any, use_fp8: bool
) -> Any:
    """What cuDNN's FP8 attention computes, and that it is asked for what it has."""
    assert use_fp8
    assert mask_type == cudnn.MaskType.CAUSAL
    assert q.dtype == k.dtype == v.dtype == FP8
    assert q.shape[1] % 128 == 0
    assert set(fp8_params) == set(cudnn.fp8_params_keys)
    assert all(p.shape == (1, 1, 1, 1) for p in fp8_params.values())
    params = {name: float(p[0, 0, 0, 0]) for name, p in fp8_params.items()}
    assert (params["scale_s"], params["descale_s"]) == (256, 1 / 256)
    factors = (params[f"descale_{name}"] for name in "qkv")
    exact = (x.astype(jnp.float32) * f for x, f in zip((q, k, v), factors, strict=True))
    y = causal(*exact, scale=scale)
    y = jnp.asarray(y * params["scale_o"], jnp.float32).astype(FP8)
    return y, None, None


@pytest.fixture
def with_cudnn(monkeypatch):
    """A CPU that stands in for a Hopper GPU with cuDNN."""
    monkeypatch.setattr(fp8, "multiprocessors", lambda q, what: 2)
    monkeypatch.setattr(cudnn, "dot_product_attention", stand_in)


@pytest.mark.parametrize("shape", [(1, 256, 2, 4, 128), (2, 200, 3, 1, 64), (1, 1, 1, 3, 64)])
def test_cudnn_computes_the_same(with_cudnn, monkeypatch, shape):
    q, k, v = operands(*shape)
    reference = []
    xla = fp8._xla
    monkeypatch.setattr(fp8, "_xla", lambda *args, **options: reference.append(1))
    y = _attend(q, k, 30 * v, scale=0.05)
    assert not reference
    expected = causal(q, k, 30 * v, scale=0.05)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert relative_error(y, expected) <= TOLERANCE
    monkeypatch.undo()
    assert fp8._xla is xla
    exact = np.asarray(attend(q, k, 30 * v, scale=0.05), np.float64)
    assert relative_error(y, exact) <= 4e-2


def test_cudnn_is_what_jax_calls(monkeypatch):
    monkeypatch.setattr(fp8, "multiprocessors", lambda q, what: 2)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    traced = jax.jit(_attend).trace(*operands(1, 256, 2, 4, 128))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmaxF8") == 1


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 1, 2, 80), {}, "D is 80 and 80; its FP8 attention takes the same for all, of (64"),
        ((1, 8, 1, 2, 64), {"window": 4}, "window is 4 of 8 tokens; its FP8 attention takes none"),
        ((1, 8, 1, 2, 64), {"softcap": 50.0}, "softcap is 50.0; its FP8 attention takes none"),
    ],
)
def test_what_cudnn_does_not_take_runs_through_xla(with_cudnn, caplog, shape, options, message):
    q, k, v = (jnp.ones(x.shape, x.dtype) for x in operands(*shape))
    with caplog.at_level(logging.DEBUG, "jaxquant"):
        y = attend(q, k, v, **options)
    assert y.shape == q.shape
    assert re.search(re.escape(f"runs through XLA: cudnn: {message}"), caplog.text)


@pytest.mark.parametrize(
    "changed", [lambda *operands: None, lambda *operands, use_fp8: None], ids=["gone", "renamed"]
)
def test_another_jax_is_named_as_the_reason(with_cudnn, monkeypatch, caplog, changed):
    monkeypatch.setattr(cudnn, "dot_product_attention", changed)
    with caplog.at_level(logging.DEBUG, "jaxquant"):
        attend(*operands(1, 8, 1, 1, 64))
    assert "cudnn: this jax has no FP8 attention" in caplog.text
