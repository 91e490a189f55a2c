"""Attention on a Hopper GPU at the shapes of models, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import (
    appended,
    cache_and_token,
    causal,
    definition,
    dequantized,
    fp8_cache_and_token,
    relative_error,
)

from jaxquant.attention import append_and_attend, fp8, rotate_and_fill
from jaxquant.attention.cache import FP8, empty
from jaxquant.attention.prefill import _xla
from jaxquant.models.attention import of_heads

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    """There is one."""


@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "G", "S", "D"),
    [
        (1, 8, 4, 1536, 128),
        (4, 8, 4, 1536, 128),
        (16, 8, 4, 1280, 128),
        (64, 8, 4, 512, 128),
        (1, 4, 8, 8192, 128),
        (3, 3, 3, 256, 64),
        (2, 2, 2, 384, 256),
    ],
)
def test_a_decode_step(B, H, G, S, D, in_fp8):
    make = fp8_cache_and_token if in_fp8 else cache_and_token
    qkv, k, v, lengths, rotation = make(B, H, G, S, D, dtype="bfloat16")
    run = jax.jit(append_and_attend, static_argnames="implementation")
    y, new_k, new_v = run(qkv, k, v, 1, lengths, rotation, implementation="mosaic_gpu")
    again, *_ = run(qkv, k, v, 1, lengths, rotation, implementation="mosaic_gpu")
    assert np.asarray(y).tobytes() == np.asarray(again).tobytes()

    def exact(cache):
        return dequantized(cache) if in_fp8 else np.asarray(cache, np.float64)

    q, *expected = appended(qkv, exact(k), exact(v), 1, lengths, rotation)
    cache = exact(new_k), exact(new_v)
    assert relative_error(y, definition(q, *cache, 1, lengths)) <= 3e-3
    at = 1, np.arange(B), slice(None), np.asarray(lengths) - 1
    for new, by_definition in zip(cache, expected, strict=True):
        # What FP8 rounds, or in BF16 a fused multiply and add.
        assert relative_error(new[at], by_definition[at]) <= (0.04 if in_fp8 else 4e-3)


@pytest.mark.parametrize("cache_dtype", [FP8, jnp.bfloat16])
@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize(("B", "T", "Hq", "H", "D"), [(1, 2048, 32, 8, 128), (2, 640, 9, 3, 64)])
def test_a_prompt_is_rotated_and_kept_to_the_byte(B, T, Hq, H, D, cache_dtype, in_fp8):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, n, D)), jnp.bfloat16) for n in (Hq, H, H))
    caches = [empty((2, B, H, T + 128, D), cache_dtype, values=values) for values in (False, True)]
    # So short that products are exact: their sum is the same with an FMA and without.
    tables = (rng.integers(-16, 17, (B, T, D // 2)) / 16 for _ in range(2))
    rotation = tuple(jnp.asarray(table, "float32") for table in tables)
    units = fp8.fp8_units(q, k, v) if in_fp8 else None
    got = jax.jit(rotate_and_fill)(q, k, v, *caches, 1, rotation, units)
    expected = jax.jit(_xla)(q, k, v, *caches, jnp.int32(1), rotation, units)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(("B", "T", "Hq", "H", "D"), [(1, 1024, 8, 2, 128), (2, 200, 6, 3, 64)])
def test_a_prompt_attends_in_fp8(B, T, Hq, H, D):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, n, D)), jnp.bfloat16) for n in (Hq, H, H))

    def attend(q, k, v):
        units = fp8.fp8_units(q, k, v)
        return of_heads(fp8.fp8_attention(fp8.in_units((q, k, v), units), units, q.dtype), Hq)

    y = jax.jit(attend)(q, k, v)
    assert 1e-2 < relative_error(y, causal(q, k, v)) <= 7e-2
