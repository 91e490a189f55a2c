"""FP8 keys and values: their bytes, what they become in a cache, and attention over them."""

from typing import Any

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import (
    appended,
    definition,
    dequantized,
    fp8_cache_and_token,
    relative_error,
)
from jax import lax

from jaxquant.attention import append_and_attend, decode_attention
from jaxquant.attention.cache import (
    append,
    cache_shape,
    empty,
    fill,
    quantize_keys,
    quantize_values,
)
from jaxquant.blocked import quantize_activations
from jaxquant.errors import JaxquantError


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def same_bytes(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_keys_and_values_are_quantized_as_activations():
    x = random(2, 3, 256, 64)
    qvalue, scale = quantize_activations(x)
    k, v = quantize_keys(x), quantize_values(x)
    assert same_bytes((k.qvalue, k.scale), (qvalue, scale))
    pages = (a.reshape(2, 3, 16, 16, -1).mT for a in (qvalue, scale))
    assert same_bytes((v.qvalue, v.scale), tuple(pages))
    np.testing.assert_array_equal(k.dequantize(), v.dequantize().reshape(x.shape))


def test_heads_wider_than_a_group_of_activations_have_one_scale():
    k = quantize_keys(random(1, 2, 256))
    assert k.scale.shape == (1, 2, 1)
    amax = np.abs(np.asarray(random(1, 2, 256), np.float32)).max(-1, keepdims=True)
    np.testing.assert_array_equal(k.scale, amax / np.float32(448))


def test_a_row_of_zeros():
    k = quantize_keys(jnp.zeros((1, 2, 16), jnp.bfloat16))
    assert not np.asarray(k.qvalue).view(np.uint8).any()
    np.testing.assert_array_equal(k.scale, np.full((1, 2, 1), np.float32(1e-10) / np.float32(448)))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [5, 127, 128, 200])
def test_what_is_filled_and_appended_is_what_quantizing_all_gives(B, T, values):
    whole = random(B, 2, T + 1, 16)
    cache = fill(empty((2, B, 2, 201, 16), "float8_e4m3fn", values=values), whole[:, :, :T], 1)
    cache = append(cache, whole[:, :, T], 1, jnp.full(B, T + 1))
    assert cache_shape(cache) == (2, B, 2, 256, 16)
    expected = dequantized(quantize_keys(whole))
    np.testing.assert_array_equal(dequantized(cache)[1, :, :, : T + 1], expected)
    assert not dequantized(cache)[1, :, :, T + 1 :].any()
    assert not dequantized(cache)[0].any()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("T", [100, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_slots_that_await_a_prompt_need_no_zeros(monkeypatch, dtype, T, values):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(lax, "empty", builders.full_of_nan)
    zeros, new = empty((2, 1, 2, 256, 16), dtype, values=values), random(1, 2, T, 16)
    cache = empty((2, 1, 2, 256, 16), dtype, values=values, awaited=T)
    assert not same_bytes(cache, zeros)
    for layer in range(2):
        cache, zeros = (fill(c, new.astype(c.dtype), layer) for c in (cache, zeros))
    assert same_bytes(cache, zeros)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("B", [1, 2])
def test_a_full_cache_takes_a_token_in_its_last_slot(B, values):
    cache, token = empty((1, B, 1, 128, 8), "float8_e4m3fn", values=values), random(B, 1, 8)
    expected = append(cache, token, 0, jnp.full(B, 128))
    assert same_bytes(append(cache, token, 0, jnp.full(B, 140)), expected)
    assert dequantized(expected)[0, :, :, 127].all()


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"window": 9}, {"softcap": 2.0, "scale": 0.5}], ids=["all", "window", "softcap"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_attention_is_that_over_the_dequantized_cache(B, options, dtype, tolerance):
    qkv, k, v, lengths, rotation = fp8_cache_and_token(B, 2, 3, 128, 8, dtype=dtype)
    y, k, v = append_and_attend(qkv, k, v, 1, lengths, rotation, **options)
    q, *_ = appended(qkv, dequantized(k), dequantized(v), 1, lengths, rotation)
    expected = definition(q, dequantized(k), dequantized(v), 1, lengths, **options)
    assert (y.shape, y.dtype) == ((B, 6, 8), qkv.dtype)
    assert relative_error(y, expected) <= tolerance
    again = decode_attention(jnp.asarray(q, dtype), k, v, 1, lengths, **options)
    assert relative_error(again, expected) <= tolerance


def test_a_token_is_rotated_and_then_quantized():
    qkv, k, v, lengths, rotation = fp8_cache_and_token(3, 2, 3, 128, 8, dtype="float32")
    _, new_k, new_v = append_and_attend(qkv, k, v, 1, lengths, rotation)
    _, *expected = appended(qkv, dequantized(k), dequantized(v), 1, lengths, rotation)
    for got, want in zip((new_k, new_v), expected, strict=True):
        np.testing.assert_allclose(dequantized(got), want, rtol=2**-4, atol=0.02)


def test_what_unfilled_slots_hold_does_not_matter():
    qkv, k, v, lengths, _ = fp8_cache_and_token(2, 1, 2, 128, 8, dtype="float32", lengths=[4, 9])
    beyond = np.arange(128) >= np.asarray(lengths)[:, None]
    nan_k = jax.tree.map(
        lambda a: jnp.where(beyond[:, None, :, None], jnp.asarray(jnp.nan, a.dtype), a), k
    )
    of_pages = beyond.reshape(2, 1, 8, 1, 16)
    nan_v = jax.tree.map(lambda a: jnp.where(of_pages, jnp.asarray(jnp.nan, a.dtype), a), v)
    y, *_ = append_and_attend(qkv, k, v, 0, lengths)
    spoilt, *_ = append_and_attend(qkv, nan_k, nan_v, 0, lengths)
    np.testing.assert_array_equal(y, spoilt)


def test_a_cache_that_is_half_fp8_is_refused(unchecked):
    qkv, k, v, lengths, _ = fp8_cache_and_token(1, 1, 2, 128, 8, dtype="bfloat16")
    for operands, came in (
        ((k, v.dequantize().reshape(k.shape)), "((1, 8), None)"),
        ((k, k), "((1, 8), (1, 8))"),
    ):
        with pytest.raises(JaxquantError) as caught:
            append_and_attend(qkv, *operands, 0, lengths)
        assert str(caught.value) == (
            f"append_and_attend: k and v have blocks {came}; allowed: none, or (1, 8) and (8, 1)"
        )
