"""Prompts on their way to attention and the cache: the kernel, by Pallas's interpreter, and XLA.

The interpreter knows nothing of how a GPU's units round: `test_prefill_aot.py` compiles the kernel
for a GPU.
"""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import on_hopper
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from jaxquant.attention import fp8, heads, prefill, rotate_and_fill
from jaxquant.attention.cache import FP8, empty, fill
from jaxquant.attention.xla import rotate_halves


@pytest.fixture
def hopper(monkeypatch):
    """There is no other way but the kernel."""
    monkeypatch.setattr(prefill, "fill", None)
    with on_hopper(monkeypatch, prefill):
        yield


def operands(
    B: int, T: int, Hq: int, H: int, D: int, S: int, cache_dtype: Any, dtype: Any = jnp.bfloat16
) -> tuple:
    """q, k, v, both caches of 2 layers, rotation."""
    rng = np.random.default_rng(0)
    qkv = (jnp.asarray(rng.standard_normal((B, T, heads, D)), dtype) for heads in (Hq, H, H))
    caches = (empty((2, B, H, S, D), cache_dtype, values=values) for values in (False, True))
    # So short that products are exact: their sum is the same with an FMA and without.
    tables = (rng.integers(-16, 17, (B, T, D // 2)) / 16 for _ in range(2))
    rotation = tuple(jnp.asarray(table, "float32") for table in tables)
    return *qkv, *caches, rotation


def expected(q, k, v, cache_k, cache_v, rotation, layer, units=None):
    q, k = (rotate_halves(x, *rotation) for x in (q, k))
    caches = (fill(c, x.swapaxes(1, 2), layer) for c, x in ((cache_k, k), (cache_v, v)))
    return (q, k, v) if units is None else fp8.in_units((q, k, v), units), *caches


def assert_same_bytes(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("cache_dtype", [FP8, jnp.bfloat16])
@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "Hq", "H", "D", "S"),
    [
        (2, 128, 3, 3, 64, 264),  # heads that are no whole groups; slots behind the prompt
        (1, 128, 4, 1, 128, 128),
        (1, 256, 2, 2, 256, 256),
    ],
)
def test_the_kernel_writes_the_bytes_of_the_reference(
    hopper, B, T, Hq, H, D, S, cache_dtype, in_fp8
):
    q, k, v, cache_k, cache_v, rotation = operands(B, T, Hq, H, D, S, cache_dtype)
    units = fp8.fp8_units(q, k, v) if in_fp8 else None
    got = rotate_and_fill(q, k, v, cache_k, cache_v, 1, rotation, units)
    assert_same_bytes(got, expected(q, k, v, cache_k, cache_v, rotation, 1, units))


def test_layers_are_taken_as_indices(hopper):
    *qkv_and_caches, rotation = operands(1, 128, 1, 1, 64, 128, FP8)
    for layer in (-1, 0, 7):
        got = rotate_and_fill(*qkv_and_caches, jnp.asarray(layer), rotation)
        assert_same_bytes(got, expected(*qkv_and_caches, rotation, layer))


def test_vmap_runs_one_after_the_other(hopper):
    *qkv_and_caches, rotation = operands(1, 128, 2, 1, 64, 128, FP8)
    q, k, v, *caches = qkv_and_caches
    got = jax.vmap(lambda q: rotate_and_fill(q, k, v, *caches, 0, rotation))(jnp.stack([q, -q]))
    for i, sign in enumerate((1, -1)):
        one = jax.tree.map(lambda a, i=i: a[i], got)
        assert_same_bytes(one, expected(sign * q, k, v, *caches, rotation, 0))


@pytest.mark.parametrize("cache_dtype", [FP8, jnp.bfloat16])
def test_gradients_are_those_of_the_reference(hopper, monkeypatch, cache_dtype):
    q, k, v, *caches, rotation = operands(1, 128, 2, 1, 64, 128, cache_dtype)

    def gradients(run):
        def loss(*qkv):
            taken, *_ = run(*qkv, *caches, jnp.int32(1), rotation)
            return sum((x.astype("float32") ** 2).sum() for x in taken)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    monkeypatch.setattr(prefill, "fill", fill)
    got = gradients(rotate_and_fill)
    assert_same_bytes(got, gradients(lambda *args: prefill._xla(*args, None)))
    assert jnp.linalg.norm(got[2] - 2 * v) == 0


@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize("cache_dtype", [FP8, jnp.bfloat16])
def test_no_threads_race(monkeypatch, cache_dtype, in_fp8):
    *qkv_and_caches, rotation = operands(1, 128, 4, 1, 64, 128, cache_dtype)
    units = fp8.fp8_units(*qkv_and_caches[:3]) if in_fp8 else None
    with on_hopper(monkeypatch, prefill, detect_races=True):
        jax.block_until_ready(rotate_and_fill(*qkv_and_caches, 1, rotation, units))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotation": None}, "nothing is rotated; the kernel takes what is rotated by halves"),
        ({"dtype": jnp.float32}, "q is float32; the kernel takes bfloat16"),
        ({"D": 80}, "D is 80 and 80; the kernel takes the same for all, of (64, 128, 256)"),
        ({"H": 4}, "q has 2 heads, k 4; the kernel takes a multiple of k's"),
        ({"T": 100}, "q is [1, 100, 2, 64]; the kernel takes multiples of 128 tokens"),
        ({"S": 129, "cache_dtype": jnp.bfloat16}, "S is 129; the kernel takes multiples of 8, for"),
        ({"bytes": 1000}, "q is [1, 128, 2, 64]; the kernel takes less than 1000 bytes in all"),
    ],
)
def test_what_the_kernel_does_not_take_runs_through_xla(monkeypatch, caplog, change, message):
    monkeypatch.setattr(prefill, "multiprocessors", lambda q, what: 2)
    monkeypatch.setattr(heads, "_MAX_BYTES", change.get("bytes", 1 << 31))
    sizes = {"B": 1, "T": 128, "Hq": 2, "H": 1, "D": 64, "S": 256, "cache_dtype": FP8}
    sizes |= {name: value for name, value in change.items() if name in {*sizes, "dtype"}}
    *rest, rotation = operands(**sizes)
    with caplog.at_level(logging.DEBUG, "jaxquant"):
        got = rotate_and_fill(*rest, 1, change.get("rotation", rotation))
    still = jnp.ones_like(rotation[0]), jnp.zeros_like(rotation[1])
    assert_same_bytes(got, expected(*rest, still if "rotation" in change else rotation, 1))
    assert re.search(re.escape(f"through XLA: mosaic_gpu: {message}"), caplog.text)
