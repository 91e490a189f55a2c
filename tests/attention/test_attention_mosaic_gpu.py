"""The Hopper kernel, run by Pallas's interpreter, against the definition in float64.

The interpreter runs its copies, barriers and arithmetic on a CPU. It knows nothing of what a GPU's
copies do beyond the ends of arrays, nor of how its units round: `test_attention_aot.py` compiles
the kernel for a GPU, and `make test-gpu` runs it on one, by these same tests.
"""

import dataclasses
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
    dequantized,
    fp8_cache_and_token,
    relative_error,
)
from hopper import on_hopper
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from jaxquant.attention import (
    append_and_attend,
    decode_attention,
    decode_fp8_sm90,
    decode_sm90,
    mosaic_gpu,
)
from jaxquant.attention.sm90 import Cluster, Config, is_quantizable, padded_group
from jaxquant.blocked import quantize, quantize_activations
from jaxquant.matmul import matmul

# What rounding the weights and the result costs.
TOLERANCE = 3e-3


@pytest.fixture
def hopper(monkeypatch):
    with on_hopper(monkeypatch, mosaic_gpu):
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


def test_larger_clusters_share_multiprocessors():
    # As many of four as there are have no place where a thread block takes a multiprocessor.
    for kernel in (decode_sm90, decode_fp8_sm90):
        assert kernel.default_config(1, 8, 4, 1536, 128, 132).stages == 3
        assert kernel.default_config(1, 32, 4, 1536, 128, 132).stages == 2


def test_short_caches_are_not_split():
    assert decode_sm90.default_config(1, 1, 4, 64, 128, 132).splits == 1


def smem_bytes(config: Config, N: int, D: int) -> int:
    ring = config.stages * 4 * config.tile * D
    return ring + 2 * N * (D + config.tile) + Cluster(1, config.splits, D, N).nbytes


@pytest.mark.parametrize("D", [64, 128, 192, 256])
@pytest.mark.parametrize("G", [1, 16, 33, 64])
@pytest.mark.parametrize(("heads", "S"), [(1, 1 << 17), (8, 1536), (100, 8192)])
def test_every_default_fits_into_smem(D, G, heads, S):
    config = decode_sm90.default_config(1, heads, G, S, D, 132)
    assert config.stages >= 2
    assert smem_bytes(config, padded_group(G), D) <= 223 << 10


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


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "G", "D"), [(3, 2, 4, 128), (9, 1, 1, 256), (3, 1, 16, 256), (3, 3, 8, 128)]
)
def test_a_result_may_be_quantized(hopper, fp8, B, H, G, D):
    cache_and_qkv = fp8_cache_and_token if fp8 else cache_and_token
    qkv, k, v, lengths, rotation = cache_and_qkv(B, H, G, 128, D, dtype="bfloat16")

    def attend(may_quantize):
        options: Any = {"may_quantize": may_quantize, "implementation": "mosaic_gpu"}
        return append_and_attend(qkv, k, v, 1, lengths, rotation, **options)[0]

    y, quantized = attend(False).reshape(B, -1), attend(True)
    expected = quantize_activations(y)
    assert (quantized.shape, quantized.dtype, quantized.batch) == (y.shape, y.dtype, (B,))
    assert same_bytes(quantized.qvalue[:B], expected[0])
    assert same_bytes(quantized.scale[:, :B].T, expected[1])


@pytest.mark.parametrize(
    ("B", "H", "G", "D", "quantizes"),
    [
        (16, 8, 4, 128, True),
        (3, 8, 16, 256, True),
        (1, 8, 4, 128, False),  # the product does it in passing
        (16, 8, 4, 64, False),
        (16, 8, 12, 128, False),  # computed as 16
        (16, 8, 64, 128, False),
    ],
)
def test_which_results_may_be_quantized(B, H, G, D, quantizes):
    assert is_quantizable(B, H, G, D) == quantizes


def test_xla_quantizes_no_result(hopper):
    qkv, k, v, lengths, rotation = cache_and_token(3, 1, 4, 60, 128, "bfloat16")
    y, *_ = append_and_attend(qkv, k, v, 1, lengths, rotation, may_quantize=True)
    assert isinstance(y, jax.Array)


def test_vmap_of_a_quantized_result(hopper):
    qkv, k, v, lengths, _ = cache_and_token(3, 1, 8, 64, 128, "bfloat16")
    w = quantize(jnp.asarray(np.random.default_rng(4).standard_normal((64, 1024)), "bfloat16"))

    def step(qkv):
        y, *_ = append_and_attend(
            qkv, k, v, 1, lengths, may_quantize=True, implementation="mosaic_gpu"
        )
        return matmul(y, w, implementation="xla")

    qkvs = jnp.stack([qkv, -2 * qkv])
    for y, qkv_ in zip(jax.vmap(step)(qkvs), qkvs, strict=True):
        assert same_bytes(y, step(qkv_))


def alike(a: Any, b: Any) -> bool:
    """Equal but for a bit, which a fused multiply and add may give or take; NaN for NaN."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.allclose(a, b, rtol=2**-7, atol=1e-6, equal_nan=True)


def same_bytes(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("B", "H", "G", "S", "D", "lengths", "rotates", "options"),
    [
        (2, 2, 4, 136, 128, [71, 136], True, {}),
        (2, 1, 2, 72, 256, [1, 65], True, {"window": 7}),
        (2, 1, 2, 72, 64, [64, 2], True, {}),  # pairs of dims in different warps
        (1, 4, 12, 72, 64, [70], False, {"softcap": 5.0, "scale": 0.3}),
        (1, 1, 6, 136, 128, [66], True, {"window": 1}),
        (1, 1, 4, 136, 128, [129], True, {"window": 100}),  # in a cluster of 2
    ],
)
def test_appending_is_the_definitions(hopper, B, H, G, S, D, lengths, rotates, options):
    qkv, k, v, lengths, rotation = cache_and_token(B, H, G, S, D, "bfloat16", lengths=lengths)
    operands: Any = qkv, k, v, 1, lengths, rotation if rotates else None
    y, *cache = append_and_attend(*operands, implementation="mosaic_gpu", **options)
    q, *expected = appended(*operands)
    assert (y.shape, y.dtype) == ((B, H * G, D), qkv.dtype)
    assert relative_error(y, definition(q, *expected, 1, lengths, **options)) <= TOLERANCE
    xla = append_and_attend(*operands, implementation="xla", **options)
    assert all(alike(*pair) for pair in zip(cache, xla[1:], strict=True))


def test_an_append_in_every_part_of_a_cluster(hopper):
    # The first thread block has the new token; the others may have no tile.
    config = Config(64, 2, 4)
    for length in (1, 64, 65, 333):
        qkv, k, v, lengths, rotation = cache_and_token(
            1, 1, 4, 400, 128, "bfloat16", lengths=[length]
        )
        y, *_ = decode_sm90.append_and_attend(
            qkv,
            k,
            v,
            jnp.array([1]),
            lengths,
            rotation,
            window=None,
            scale=128**-0.5,
            softcap=None,
            config=config,
        )
        q, *expected = appended(qkv, k, v, 1, lengths, rotation)
        assert relative_error(y, definition(q, *expected, 1, lengths)) <= TOLERANCE


def test_steps_of_a_loop_over_layers(hopper):
    qkv, k, v, lengths, rotation = cache_and_token(1, 2, 2, 72, 128, "bfloat16", L=3)

    def loop(implementation):
        def layer(l, carry):
            qkv, k, v = carry
            y, k, v = append_and_attend(
                qkv, k, v, l, lengths, rotation, implementation=implementation
            )
            return qkv.at[:, :4].set(y), k, v

        return jax.jit(lambda *carry: lax.fori_loop(0, 3, layer, carry))(qkv, k, v)

    (y, *cache), (expected, *expected_cache) = loop("mosaic_gpu"), loop("xla")
    assert relative_error(y, np.asarray(expected, np.float64)) <= 2 * TOLERANCE
    assert all(alike(*pair) for pair in zip(cache, expected_cache, strict=True))


def test_vmap_of_an_append(hopper):
    qkv, k, v, lengths, rotation = cache_and_token(2, 1, 2, 72, 128, "bfloat16")

    def append(qkv, k, v, length, *rotation):
        one = jax.tree.map(lambda a: a[None], (qkv, length, rotation))
        stack = k[:, None], v[:, None]
        run = append_and_attend(one[0], *stack, 1, one[1], one[2], implementation="mosaic_gpu")
        return jax.tree.map(lambda a: a[0], run[0]), run[1][:, 0], run[2][:, 0]

    axes = 0, 1, 1, 0, 0, 0
    y, new_k, new_v = jax.vmap(append, in_axes=axes, out_axes=(0, 1, 1))(
        qkv, k, v, lengths, *rotation
    )
    expected = append_and_attend(qkv, k, v, 1, lengths, rotation, implementation="mosaic_gpu")
    assert all(same_bytes(*pair) for pair in zip((y, new_k, new_v), expected, strict=True))


@pytest.mark.parametrize("make", [cache_and_token, fp8_cache_and_token])
def test_a_scan_over_each_layers_cache(hopper, make):
    qkv, k, v, lengths, rotation = make(2, 2, 2, 128, 128, dtype="bfloat16", L=3)
    qkvs = jnp.stack([qkv, -qkv, 2 * qkv])

    @jax.jit
    def scan(*layers):
        def step(_, layer):
            qkv, *cache = layer
            k, v = jax.tree.map(lambda a: a[None], cache)
            return None, append_and_attend(
                qkv, k, v, 0, lengths, rotation, implementation="mosaic_gpu"
            )

        return lax.scan(step, None, layers)[1]

    y, *cache = scan(qkvs, k, v)
    cache = jax.tree.map(lambda a: a[:, 0], cache)
    for l, of_layer in enumerate(qkvs):
        expected, k, v = append_and_attend(
            of_layer, k, v, l, lengths, rotation, implementation="mosaic_gpu"
        )
        assert same_bytes(y[l], expected)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves([k, v]), strict=True):
        assert same_bytes(a, b)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 1, 64, 80), "D is 80; the kernel takes multiples of 64, where it appends"),
        ((1, 8, 1, 60, 64), "S is 60; the kernel takes multiples of 8"),
    ],
)
def test_appends_it_refuses(hopper, shape, message):
    qkv, k, v, lengths, _ = cache_and_token(*shape, "bfloat16")
    with pytest.raises(NotImplementedError) as caught:
        append_and_attend(qkv, k, v, 0, lengths, implementation="mosaic_gpu")
    assert str(caught.value) == f"mosaic_gpu: {message}"
    append_and_attend(qkv, k, v, 0, lengths)  # the kernel may run behind an append by XLA


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


# An FP8 cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("B", "H", "G", "S", "D", "lengths", "rotates", "options"),
    [
        (2, 2, 4, 256, 128, [71, 256], True, {}),
        (2, 1, 2, 128, 256, [1, 65], True, {"window": 7}),
        (2, 1, 2, 128, 64, [128, 2], True, {}),  # rotated ahead of the kernel
        (1, 4, 12, 128, 128, [70], False, {"softcap": 5.0, "scale": 0.3}),
        (1, 1, 4, 384, 128, [257], True, {"window": 200}),  # in a cluster of 2
    ],
)
def test_fp8_is_the_definitions(hopper, B, H, G, S, D, lengths, rotates, options):
    qkv, k, v, lengths, rotation = fp8_cache_and_token(
        B, H, G, S, D, dtype="bfloat16", lengths=lengths
    )
    operands: Any = qkv, k, v, 1, lengths, rotation if rotates else None
    y, new_k, new_v = append_and_attend(*operands, implementation="mosaic_gpu", **options)
    cache = dequantized(new_k), dequantized(new_v)
    q, *_ = appended(qkv, *cache, 1, lengths, operands[-1])
    assert (y.shape, y.dtype) == ((B, H * G, D), qkv.dtype)
    assert relative_error(y, definition(q, *cache, 1, lengths, **options)) <= TOLERANCE
    xla = append_and_attend(*operands, implementation="xla", **options)[1:]
    if rotates:  # a fused multiply and add may round otherwise
        for got, want in zip(cache, map(dequantized, xla), strict=True):
            np.testing.assert_allclose(got, want, rtol=2**-3, atol=0.02)
    else:
        leaves = map(jax.tree.leaves, ((new_k, new_v), xla))
        assert all(same_bytes(*pair) for pair in zip(*leaves, strict=True))


@pytest.mark.parametrize("length", [1, 128, 129, 500])
def test_fp8_in_every_part_of_a_cluster(hopper, length):
    qkv, k, v, lengths, rotation = fp8_cache_and_token(
        1, 1, 4, 512, 128, dtype="bfloat16", lengths=[length]
    )
    y, k, v = decode_fp8_sm90.append_and_attend(
        qkv,
        k,
        v,
        jnp.array([1]),
        lengths,
        rotation,
        window=None,
        scale=128**-0.5,
        softcap=None,
        config=Config(128, 2, 4),
    )
    cache = dequantized(k), dequantized(v)
    q, *_ = appended(qkv, *cache, 1, lengths, rotation)
    assert relative_error(y, definition(q, *cache, 1, lengths)) <= TOLERANCE


@pytest.mark.parametrize("config", [Config(128, 2, 1), Config(128, 3, 2)])
def test_every_cut_of_the_fp8_kernel(hopper, config):
    qkv, k, v, lengths, _ = fp8_cache_and_token(1, 1, 4, 512, 64, dtype="bfloat16", lengths=[310])
    options: Any = {"window": None, "scale": 0.125, "softcap": None, "config": config}
    y, k, v = decode_fp8_sm90.append_and_attend(qkv, k, v, jnp.array([1]), lengths, None, **options)
    cache = dequantized(k), dequantized(v)
    q, *_ = appended(qkv, *cache, 1, lengths, None)
    assert relative_error(y, definition(q, *cache, 1, lengths)) <= TOLERANCE


@pytest.mark.parametrize(
    ("lengths", "options"),
    [([310, 1], {}), ([129, 512], {"window": 200}), ([2, 257], {"softcap": 5.0})],
)
def test_two_heads_of_a_thread_block(hopper, lengths, options):
    # Of one sequence, and of two: the third and the fourth of six.
    qkv, k, v, lengths, rotation = fp8_cache_and_token(
        2, 3, 4, 512, 128, dtype="bfloat16", lengths=lengths
    )

    def attend(heads, quantized=False):
        all_options: Any = {"window": None, "scale": 128**-0.5, "softcap": None} | options
        all_options |= {"config": Config(128, 2, 1, heads), "quantized": quantized}
        return decode_fp8_sm90.append_and_attend(
            qkv, k, v, jnp.array([1]), lengths, rotation, **all_options
        )

    y, *cache = attend(2)
    alone, *alone_cache = attend(1)
    assert same_bytes(y, alone)
    leaves = map(jax.tree.leaves, (cache, alone_cache))
    assert all(same_bytes(*pair) for pair in zip(*leaves, strict=True))
    assert same_bytes(attend(2, quantized=True)[0].qvalue, attend(1, quantized=True)[0].qvalue)
    cache = [dequantized(a) for a in cache]
    q, *_ = appended(qkv, *cache, 1, lengths, rotation)
    assert relative_error(y, definition(q, *cache, 1, lengths, **options)) <= TOLERANCE


@pytest.mark.parametrize(
    ("B", "H", "G", "D", "heads"),
    [
        (32, 8, 4, 128, 2),
        (64, 8, 8, 128, 2),
        (16, 8, 4, 128, 1),  # every other multiprocessor would have none
        (257, 1, 4, 128, 1),  # in no pairs
        (64, 8, 12, 128, 1),
        (64, 8, 4, 64, 1),
        (64, 8, 4, 256, 1),
    ],
)
def test_which_heads_are_in_pairs(B, H, G, D, heads):
    config = decode_fp8_sm90.default_config(B, H, G, 1536, D, 132)
    assert config.heads == heads
    assert config.splits == 1
    # A kilobyte is CUDA's, and another has room for the barriers.
    residents = 2 if heads == 2 else 1
    assert residents * (fp8_smem_bytes(config, padded_group(G), D) + 2048) <= 228 << 10


def fp8_smem_bytes(config: Config, N: int, D: int) -> int:
    tile, stages = config.tile, config.stages
    ring = tile * D * (2 * stages - 1) + 8 * tile * (stages + 1)
    heads = config.heads * (ring + 2 * N * (D + tile))
    return heads + 2048 + Cluster(1, config.splits, D, N).nbytes


@pytest.mark.parametrize("D", [64, 128, 192, 256])
@pytest.mark.parametrize("G", [1, 16, 33, 64])
@pytest.mark.parametrize(("heads", "S"), [(1, 1 << 17), (8, 1536), (100, 8192), (512, 1536)])
def test_every_default_for_fp8_fits_into_smem(D, G, heads, S):
    config, N = decode_fp8_sm90.default_config(1, heads, G, S, D, 132), padded_group(G)
    assert config.stages >= 2
    assert config.tile >= N
    assert fp8_smem_bytes(config, N, D) <= 223 << 10


@pytest.mark.parametrize(
    ("fp8", "config"),
    [
        *((fp8, Config(128, 2, splits)) for fp8 in (False, True) for splits in (1, 2)),
        (True, Config(128, 2, 1, 2)),
    ],
)
def test_no_two_threads_race(monkeypatch, fp8, config):
    cache_and_qkv = fp8_cache_and_token if fp8 else cache_and_token
    # The new token's slot is in no tile. In one, it is masked, whatever a copy finds there.
    qkv, k, v, lengths, rotation = cache_and_qkv(
        1, config.heads, 2, 384, 128, dtype="bfloat16", lengths=[257]
    )
    kernel = decode_fp8_sm90 if fp8 else decode_sm90
    options: Any = {"window": None, "scale": 0.1, "softcap": None, "config": config}
    with on_hopper(monkeypatch, detect_races=True):
        y, *_ = kernel.append_and_attend(qkv, k, v, jnp.array([1]), lengths, rotation, **options)
        found = gpu_callbacks.get_races().races_found
    assert np.isfinite(np.asarray(y, np.float64)).all()
    assert not found


def test_fp8_of_very_different_scales(hopper):
    qkv, k, v, lengths, _ = fp8_cache_and_token(1, 1, 4, 256, 128, dtype="bfloat16", lengths=[150])
    factors = jnp.exp2(jnp.asarray(np.random.default_rng(2).integers(-30, 30, 256), jnp.float32))
    k = dataclasses.replace(k, scale=k.scale * jnp.minimum(factors[:, None], 2))
    v = dataclasses.replace(v, scale=v.scale * factors.reshape(16, 1, 16))
    y, k, v = append_and_attend(qkv, k, v, 1, lengths, implementation="mosaic_gpu")
    cache = dequantized(k), dequantized(v)
    q, *_ = appended(qkv, *cache, 1, lengths, None)
    assert relative_error(y, definition(q, *cache, 1, lengths)) <= TOLERANCE


def test_an_fp8_cache_of_part_of_a_tile_is_refused(hopper):
    qkv, k, v, lengths, _ = fp8_cache_and_token(1, 1, 2, 128, 64, dtype="bfloat16")
    k = jax.tree.map(lambda a: a[:, :, :, :48], k)
    v = jax.tree.map(lambda a: a[:, :, :, :3], v)
    with pytest.raises(NotImplementedError) as caught:
        append_and_attend(qkv, k, v, 0, lengths, implementation="mosaic_gpu")
    assert str(caught.value) == "mosaic_gpu: S is 48; the kernel takes multiples of 128"
    append_and_attend(qkv, k, v, 0, jnp.minimum(lengths, 48))


def test_fp8_it_refuses(hopper):
    q, k, v, lengths, _ = fp8_cache_and_token(1, 2, 2, 128, 64, dtype="bfloat16")
    with pytest.raises(NotImplementedError) as caught:
        decode_attention(q[:, :4], k, v, 0, lengths, implementation="mosaic_gpu")
    message = "the cache is FP8; the kernel takes such a cache where it appends"
    assert str(caught.value) == f"mosaic_gpu: {message}"
    decode_attention(q[:, :4], k, v, 0, lengths)
