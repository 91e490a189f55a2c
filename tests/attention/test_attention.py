"""Both ops against their definition in float64: the XLA reference, and which one runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import (
    appended,
    cache_and_query,
    cache_and_token,
    definition,
    relative_error,
)

from jaxquant.attention import append_and_attend, decode_attention
from jaxquant.errors import JaxquantError


@pytest.mark.parametrize(
    ("B", "H", "G", "S", "D", "options"),
    [
        (3, 2, 4, 40, 16, {}),
        (2, 1, 5, 33, 8, {"window": 7}),
        (2, 3, 1, 20, 24, {"scale": 0.5, "softcap": 2.0}),
        (1, 1, 64, 17, 32, {"window": 100}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_attention_is_the_definitions(B, H, G, S, D, options, dtype, tolerance):
    q, k, v, lengths = cache_and_query(B, H, G, S, D, dtype)
    y = decode_attention(q, k, v, 1, lengths, **options)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert relative_error(y, definition(q, k, v, 1, lengths, **options)) <= tolerance


def test_a_scan_and_a_map_over_layers():
    q, k, v, lengths = cache_and_query(2, 2, 2, 24, 8, "float32", L=3)

    def attend(layer):
        return decode_attention(q, k, v, layer, lengths)

    expected = [definition(q, k, v, l, lengths) for l in range(3)]
    scanned = jax.lax.scan(lambda _, l: (None, attend(l)), None, jnp.arange(3))[1]
    mapped = jax.vmap(attend)(jnp.arange(3))
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-5)


def test_a_cpu_takes_xla():
    q, k, v, lengths = cache_and_query(1, 1, 2, 16, 16, "bfloat16")
    y = decode_attention(q, k, v, 0, lengths)
    np.testing.assert_array_equal(y, decode_attention(q, k, v, 0, lengths, implementation="xla"))
    with pytest.raises(NotImplementedError, match="mosaic_gpu: the device is a cpu"):
        decode_attention(q, k, v, 0, lengths, implementation="mosaic_gpu")


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_a_token_is_rotated_appended_and_attends(B, rotates, dtype, tolerance):
    qkv, k, v, lengths, rotation = cache_and_token(B, 2, 3, 20, 8, dtype)
    operands: Any = qkv, k, v, 1, lengths, rotation if rotates else None
    y, new_k, new_v = append_and_attend(*operands, window=9)
    q, *cache = appended(*operands)
    assert (y.shape, y.dtype) == ((B, 6, 8), qkv.dtype)
    assert relative_error(y, definition(q, *cache, 1, lengths, window=9)) <= tolerance
    for got, want in zip((new_k, new_v), cache, strict=True):
        assert got.dtype == qkv.dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-2, atol=1e-2)


def test_a_full_cache_takes_the_token_in_its_last_slot():
    qkv, k, v, lengths, _ = cache_and_token(2, 1, 1, 8, 4, "float32", lengths=[8, 8])
    full = append_and_attend(qkv, k, v, 0, lengths)
    for got, want in zip(append_and_attend(qkv, k, v, 0, lengths + 3), full, strict=True):
        np.testing.assert_array_equal(got, want)


Q, CACHE, LENGTHS = jnp.ones((2, 4, 8)), jnp.ones((3, 2, 2, 16, 8)), jnp.ones(2, jnp.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, "q is [4, 8]; allowed: [B, Hq, D]"),
        (
            {"k": CACHE[:, :1]},
            "k is [3, 1, 2, 16, 8], q [2, 4, 8]; allowed: k [L, 2, H, S, 8]",
        ),
        (
            {"v": CACHE[:1]},
            "v is [1, 2, 2, 16, 8], k [3, 2, 2, 16, 8]; allowed: equal shapes",
        ),
        ({"q": Q[:, :3]}, "q has 3 heads, k 2; allowed: a multiple of k's"),
        ({"lengths": LENGTHS[:1]}, "lengths is [1]; allowed: [2]"),
        ({"q": Q.astype(jnp.int32)}, "q has dtype int32; allowed: a floating dtype"),
        ({"layer": 3}, "layer is 3; allowed: 0 to 2"),
        ({"window": 0}, "window is 0; allowed: at least 1, or None"),
        ({"scale": -1.0}, "scale is -1.0; allowed: a positive number, or None"),
        ({"softcap": 0.0}, "softcap is 0.0; allowed: a positive number, or None"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; allowed: mosaic_gpu, xla"),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, changes, message):
    operands = {"q": Q, "k": CACHE, "v": CACHE, "layer": 0, "lengths": LENGTHS}
    with pytest.raises(JaxquantError) as caught:
        decode_attention(**operands | changes)
    assert str(caught.value) == f"decode_attention: {message}"


QKV, TABLE = jnp.ones((2, 8, 8)), jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qkv": QKV[0]},
            "qkv is [8, 8], k [3, 2, 2, 16, 8]; allowed: qkv [B, Hq + 2 H, D], k [L, B, H, S, D]",
        ),
        (
            {"qkv": QKV[:, :4]},
            "qkv is [2, 4, 8], k [3, 2, 2, 16, 8]; "
            "allowed: qkv [B, Hq + 2 H, D], k [L, B, H, S, D]",
        ),
        ({"qkv": QKV[:, :7]}, "q has 3 heads, k 2; allowed: a multiple of k's"),
        (
            {"rotation": (TABLE, TABLE[:1])},
            "rotation has [1, 4], queries [2, 4, 8]; allowed: [2, D / 2], for an even D",
        ),
        ({"implementation": "cuda"}, "implementation is 'cuda'; allowed: mosaic_gpu, xla"),
    ],
)
def test_a_token_that_does_not_fit_is_refused(unchecked, changes, message):
    operands = {"qkv": QKV, "k": CACHE, "v": CACHE, "layer": 0, "lengths": LENGTHS}
    with pytest.raises(JaxquantError) as caught:
        append_and_attend(**operands | changes)
    assert str(caught.value) == f"append_and_attend: {message}"
