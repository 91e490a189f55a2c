"""The Hopper kernel, run by Pallas's interpreter, against the definition in float64.

The interpreter runs its copies, barriers and arithmetic on a CPU. It knows nothing of what a GPU's
copies do beyond the ends of arrays, nor of how its units round: `test_attention_aot.py` compiles
the kernel for a GPU, and `benchmarks/attention.py` runs it on one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import cache_and_query, definition, relative_error
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.attention import decode_attention, decode_sm90, mosaic_gpu
from jaxquant.attention.decode_sm90 import Config

# What rounding the weights and the result costs.
TOLERANCE = 3e-3


@pytest.fixture
def hopper(monkeypatch):
    """A CPU that stands in for a Hopper GPU. What lies outside an array reads as zeros there."""
    monkeypatch.setattr(mosaic_gpu, "multiprocessors", lambda q, what: 2)
    params = plgpu.InterpretGPUParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    with plgpu.force_gpu_interpret_mode(params):
        yield


def attend(q: Any, k: Any, v: Any, layer: Any, lengths: Any, **options: Any) -> jax.Array:
    return decode_attention(q, k, v, layer, lengths, implementation="mosaic_gpu", **options)


@pytest.mark.parametrize(
    ("B", "H", "G", "S", "D", "options"),
    [
        (2, 2, 4, 72, 64, {}),
        (1, 1, 5, 200, 80, {"window": 70}),
        (1, 2, 12, 136, 128, {"softcap": 5.0, "scale": 0.3}),
        (1, 1, 1, 128, 16, {}),
        (1, 1, 64, 64, 64, {"window": 20}),
    ],
)
def test_attention_is_the_definitions(hopper, B, H, G, S, D, options):
    q, k, v, lengths = cache_and_query(B, H, G, S, D, "bfloat16")
    y = attend(q, k, v, 1, lengths, **options)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert relative_error(y, definition(q, k, v, 1, lengths, **options)) <= TOLERANCE


@pytest.mark.parametrize("config", [Config(64, 2, 4), Config(128, 2, 1), Config(128, 3, 2)])
@pytest.mark.parametrize("length", [1, 64, 333])
def test_every_cut_of_the_kernel(hopper, config, length):
    # One head: the interpreter mistakes the cluster barriers of a second one.
    q, k, v, lengths = cache_and_query(1, 1, 4, 400, 64, "bfloat16", lengths=[length])
    y = decode_sm90.decode(
        q, k, v, jnp.array([1]), lengths, window=None, scale=0.125, softcap=None, config=config
    )
    assert relative_error(y, definition(q, k, v, 1, lengths)) <= TOLERANCE


def test_logits_far_apart(hopper):
    q, k, v, lengths = cache_and_query(1, 1, 4, 136, 64, "bfloat16")
    y = attend(q, k, v, 1, lengths, scale=100.0)
    assert relative_error(y, definition(q, k, v, 1, lengths, scale=100.0)) <= TOLERANCE


@pytest.mark.parametrize(("heads", "splits"), [(8, 8), (32, 4), (64, 2), (128, 1), (512, 1)])
def test_few_heads_are_split(heads, splits):
    assert decode_sm90.default_config(1, heads, 4, 1536, 128, 132).splits == splits


def test_short_caches_are_not_split():
    assert decode_sm90.default_config(1, 1, 4, 64, 128, 132).splits == 1


def smem_bytes(config: Config, N: int, D: int) -> int:
    part = (D + 4) * N * 4
    ring = max(config.stages * 4 * config.tile * D, config.splits * part)
    return ring + 2 * N * (D + config.tile) + (part if config.splits > 1 else 0)


@pytest.mark.parametrize("D", [64, 128, 192, 256])
@pytest.mark.parametrize("G", [1, 16, 33, 64])
@pytest.mark.parametrize(("heads", "S"), [(1, 1 << 17), (8, 1536), (100, 8192)])
def test_every_default_fits_into_smem(D, G, heads, S):
    config = decode_sm90.default_config(1, heads, G, S, D, 132)
    assert config.stages >= 2
    assert smem_bytes(config, decode_sm90.padded_group(G), D) <= 223 << 10


def test_a_scan_reads_each_layer_in_place(hopper):
    q, k, v, lengths = cache_and_query(1, 2, 2, 72, 64, "bfloat16", L=3)

    @jax.jit
    def run(q, k, v, lengths):
        layers = jnp.arange(3)
        return lax.scan(lambda _, l: (None, attend(q, k, v, l, lengths)), None, layers)[1]

    for l, y in enumerate(run(q, k, v, lengths)):
        assert relative_error(y, definition(q, k, v, l, lengths)) <= TOLERANCE


def test_vmap_over_everything(hopper):
    q, k, v, lengths = cache_and_query(2, 1, 2, 72, 64, "bfloat16")
    split = [q[:, None], *(jnp.swapaxes(a, 0, 1)[:, :, None] for a in (k, v)), lengths[:, None]]
    ys = jax.vmap(lambda q, k, v, lengths: attend(q, k, v, -1, lengths))(*split)
    assert relative_error(ys[:, 0], definition(q, k, v, 1, lengths)) <= TOLERANCE


def test_vmap_over_queries_and_layers(hopper):
    q, k, v, lengths = cache_and_query(1, 1, 2, 72, 64, "bfloat16")
    qs, layers = jnp.stack([q, 2 * q, -q]), jnp.array([0, 1, 7])
    ys = jax.vmap(lambda q, l: attend(q, k, v, l, lengths))(qs, layers)
    for q, y, l in zip(qs, ys, (0, 1, 1), strict=True):
        assert relative_error(y, definition(q, k, v, l, lengths)) <= TOLERANCE


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 1, 64, 64), "float32", "q is float32; the kernel takes bfloat16"),
        ((1, 1, 1, 64, 72), "bfloat16", "D is 72; the kernel takes multiples of 16 up to 256"),
        ((1, 1, 1, 64, 272), "bfloat16", "D is 272; the kernel takes multiples of 16 up to 256"),
        ((1, 1, 1, 60, 64), "bfloat16", "S is 60; the kernel takes multiples of 8"),
        (
            (1, 1, 65, 64, 64),
            "bfloat16",
            "65 query heads share a key/value head; the kernel takes up to 64",
        ),
        (
            (0, 1, 1, 64, 64),
            "bfloat16",
            "an operand is empty (q [0, 1, 64], k [2, 0, 1, 64, 64]); the kernel takes others",
        ),
    ],
)
def test_operands_it_refuses(hopper, shape, dtype, message):
    operands = cache_and_query(*shape, dtype)
    with pytest.raises(NotImplementedError) as caught:
        attend(*operands[:3], 0, operands[3])
    assert str(caught.value) == f"mosaic_gpu: {message}"


def test_what_the_kernel_refuses_runs_through_xla(hopper):
    q, k, v, lengths = cache_and_query(1, 1, 1, 60, 64, "bfloat16")
    y = decode_attention(q, k, v, 0, lengths)
    xla = decode_attention(q, k, v, 0, lengths, implementation="xla")
    np.testing.assert_array_equal(y, xla)
