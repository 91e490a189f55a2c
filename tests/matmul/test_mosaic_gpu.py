"""The Hopper kernels, run by Pallas's interpreter, against the definition in float64.

The interpreter runs their copies, barriers and arithmetic on a CPU. It knows nothing of what a
GPU's copies do beyond the ends of arrays, nor of how its units round: `test_aot.py` compiles the
kernels for a GPU, and `make test-gpu` runs them on one, by these same tests.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hopper import FLOAT32, on_hopper
from jax import lax
from jax.experimental.pallas import Slice, mosaic_gpu as plgpu
from numpy_reference import BF16, heavy_tailed, make_weight, normal, zero_blocks

from jaxquant import blocked, hopper as hopper_module
from jaxquant.array import QuantizedArray
from jaxquant.config import QuantConfig
from jaxquant.matmul import (
    RMSNorm,
    SiluMul,
    act_quant_sm90,
    decode_sm90,
    gemm_sm90,
    gemv_sm90,
    mosaic_gpu,
)
from jaxquant.matmul.act_quant_sm90 import quantize, quantize_tokens
from jaxquant.matmul.api import matmul
from jaxquant.matmul.sm90 import SMEM_BYTES, round_up
from jaxquant.matmul.tokens import kernel_layout

# Few, so that a thread block goes through several tiles.
SMS = 2
F32 = np.dtype(np.float32)


@pytest.fixture
def hopper(monkeypatch):
    with on_hopper(monkeypatch, mosaic_gpu, sms=SMS):
        yield


def weight(shape: tuple[int, ...], kind: Any = normal, **config: Any) -> QuantizedArray:
    return blocked.quantize(jnp.asarray(make_weight(kind, shape, BF16, 0)), QuantConfig(**config))


def tokens(shape: tuple[int, ...], kind: Any = normal, dtype: np.dtype = BF16) -> jax.Array:
    return jnp.asarray(make_weight(kind, shape, dtype, 1))


def definition(x: jax.Array, qvalue: Any, scale: Any) -> np.ndarray:
    xq, sx = numpy_reference.quantize_activations(np.asarray(x))
    a = numpy_reference.dequantize(xq, sx, (1, 128))
    return a @ numpy_reference.dequantize(np.asarray(qvalue), np.asarray(scale), (128, 128)).T


def assert_close(y: Any, expected: np.ndarray) -> None:
    # What rounding the result costs; the sums in float32 are far closer.
    tolerance = 3e-3 if y.dtype == BF16 else FLOAT32
    error = np.linalg.norm(np.asarray(y, np.float64) - expected)
    assert error <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("M", "N", "K", "x_dtype", "out_dtype"),
    [
        (1, 64, 1024, BF16, BF16),  # K is split
        (3, 72, 96, F32, F32),
        (13, 200, 160, BF16, BF16),
        (66, 8, 32, BF16, BF16),
        (75, 136, 288, F32, F32),
    ],
)
def test_a_product_is_the_definitions(hopper, M, N, K, x_dtype, out_dtype):
    x, w = tokens((M, K), dtype=x_dtype), weight((N, K))
    y = mosaic_gpu.matmul(x, w, None, out_dtype)
    assert (y.shape, y.dtype) == ((M, N), out_dtype)
    assert_close(y, definition(x, w.qvalue, w.scale))


@pytest.mark.parametrize(("M", "kind"), [(2, zero_blocks), (80, heavy_tailed)])
def test_values_that_are_hard(hopper, M, kind):
    x, w = tokens((M, 256), kind), weight((128, 256), kind)
    y = mosaic_gpu.matmul(x, w, None, BF16)
    assert_close(y, definition(x, w.qvalue, w.scale))


def test_zero_tokens_give_zeros(hopper):
    y = mosaic_gpu.matmul(jnp.zeros((3, 160), BF16), weight((64, 160)), None, BF16)
    assert not np.asarray(y).any()


def operands(M: int, N: int, K: int, rows: int) -> tuple[tuple, np.ndarray]:
    """What the kernels take, with the activations padded to `rows`, and their product."""
    x, w = tokens((M, K)), weight((1, N, K))
    xq, sx = numpy_reference.quantize_activations(np.asarray(x))
    xq = np.pad(xq.view(np.uint8), ((0, rows - M), (0, 0))).view(xq.dtype)
    sx = np.pad(sx.T, ((0, 0), (0, -M % 64)))
    layer = jnp.zeros(1, jnp.int32)
    operands = jnp.asarray(xq), jnp.asarray(sx), w.qvalue, w.scale, layer
    return operands, definition(x, w.qvalue[0], w.scale[0])


@pytest.mark.parametrize(
    ("tile_m", "cluster", "M"), [(64, False, 72), (192, False, 72), (128, True, 136)]
)
def test_every_tile_of_the_prefill_kernel(hopper, tile_m, cluster, M):
    args, expected = operands(M, 136, 160, M)
    config = gemm_sm90.Config(tile_m, cluster)
    y = gemm_sm90.gemm(*args, out_dtype=BF16, config=config, sms=SMS)
    assert_close(y, expected)


@pytest.mark.parametrize(
    ("N", "config"),
    [
        (136, (64, 1, 2, 1)),
        (136, (128, 1, 1, 2)),
        (128, (64, 3, 1, 2)),
        (136, (128, 3, 2, 1)),
        (200, (64, 1, 1, 3)),
    ],
)
def test_every_cut_of_the_decode_kernel(hopper, N, config):
    args, expected = operands(5, N, 768, 8)
    config = decode_sm90.Config(*config)
    y = decode_sm90.decode(*args, M=5, out_dtype=BF16, config=config, sms=SMS)
    assert_close(y, expected)


@pytest.mark.parametrize(("M", "N", "tile_n", "turns"), [(5, 64, 64, 1), (16, 192, 128, 3)])
def test_a_residual_is_added_in_the_decode_kernel(hopper, M, N, tile_n, turns):
    args, expected = operands(M, N, 384, decode_sm90.padded_tokens(M))
    residual, config = tokens((M, N)), decode_sm90.Config(tile_n, turns)
    assert decode_sm90.adds_residual(M, N, BF16, config)
    y = decode_sm90.decode(*args, residual=residual, M=M, out_dtype=BF16, config=config, sms=SMS)
    assert_close(y, expected + np.asarray(residual, np.float64))


@pytest.mark.parametrize(
    ("M", "F", "K", "blocks"),
    [
        (5, 128, 576, 1),
        (16, 384, 512, 2),  # one thread block has two tiles
        (33, 256, 512, 1),
    ],
)
def test_a_gated_product_leaves_the_bytes_of_a_product_and_a_quantization(hopper, M, F, K, blocks):
    T, config = decode_sm90.padded_tokens(M), decode_sm90.Config(128, blocks=blocks)
    args, expected = operands(M, 2 * F, K, T)
    assert decode_sm90.gates(M, 2 * F, BF16, config)
    y = decode_sm90.decode(*args, M=M, out_dtype=BF16, config=config, sms=SMS)
    assert_close(y, expected)
    qvalue, scale = decode_sm90.decode(
        *args, gated=True, M=M, out_dtype=BF16, config=config, sms=SMS
    )
    for a, like in zip((qvalue, scale), kernel_layout(M, F), strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
    h = np.asarray(SiluMul()(y))
    expected = numpy_reference.quantize_activations(h)
    assert numpy_reference.differing(qvalue[:M], expected[0]) == 0
    assert numpy_reference.differing(scale.T[:M], expected[1]) == 0


@pytest.mark.parametrize(
    ("M", "N", "dtype", "config", "gates"),
    [
        (64, 28672, BF16, (128,), True),
        (65, 28672, BF16, (128,), False),
        (16, 28672, F32, (128,), False),
        (16, 28672 + 128, BF16, (128,), False),  # half a group
        (16, 28672, BF16, (64,), False),
    ],
)
def test_what_a_gated_product_takes(M, N, dtype, config, gates):
    assert decode_sm90.gates(M, N, dtype, decode_sm90.Config(*config)) == gates


# A kernel for K in no whole groups, one for few and one for the rest.
@pytest.mark.parametrize(
    ("M", "K", "dtype"),
    [(24, 416, BF16), (24, 96, F32), (12, 1024, F32), (133, 256, BF16), (21, 1152, BF16)],
)
def test_activations_are_quantized_to_the_byte(hopper, M, K, dtype):
    x = np.array(make_weight(heavy_tailed, (M, K), dtype, 3))
    x[0], x[1, :8], x[2, 0] = 0, -0.0, 1e-12
    # Quotients halfway between two FP8 values, and beside it.
    scale = np.float32(3e-3)
    halves = np.arange(1, 31) * np.float64(scale)
    x[3, 0], x[3, 1:31] = 448 * scale, halves.astype(dtype)
    x[4:10, 1:31] = halves.astype(F32) * (1 + np.arange(-3, 3)[:, None] * 2.0**-23)
    x[4:10, 0] = 448 * scale
    x[10, 0], x[10, 1] = np.float32(1.75 - 2.0**-23), 2.0**-18  # a scale of 24 ones
    rows = round_up(M, 8)
    qvalue, scale = quantize(None, jnp.asarray(x), jnp.zeros(1, jnp.int32), K, rows)
    assert (qvalue.shape, scale.shape) == ((rows, K), (-(-K // 128), round_up(M, 64)))
    expected_qvalue, expected_scale = numpy_reference.quantize_activations(x)
    assert numpy_reference.differing(qvalue[:M], expected_qvalue) == 0
    assert numpy_reference.differing(scale.T[:M], expected_scale) == 0


def prologue_of(name: str, K: int, dtype: np.dtype = BF16) -> Any:
    if name == "rms_norm":
        return RMSNorm(tokens((3, K), dtype=dtype), eps=1e-5)
    return {"silu_mul": SiluMul(), "none": None}[name]


@pytest.mark.parametrize(
    ("M", "K", "name", "dtype"),
    [
        (131, 128, "silu_mul", F32),
        (9, 768, "silu_mul", BF16),  # few groups
        (5, 96, "silu_mul", BF16),  # by XLA, as what is in no whole groups
        (8, 160, "rms_norm", BF16),  # likewise
        (13, 1024, "rms_norm", F32),
        (3, 1152, "rms_norm", BF16),  # the last 8 groups overlap the ones before
        (2, 5120, "rms_norm", BF16),  # more tiles than warpgroups, and not a multiple
        (21, 2176, "silu_mul", BF16),  # 17 groups, which nothing divides
        (9, 1024, "silu_mul", BF16),
        (6, 1280, "none", F32),
    ],
)
def test_tokens_are_quantized_after_a_prologue(hopper, M, K, name, dtype):
    x = tokens((M, 2 * K if name == "silu_mul" else K), dtype=dtype)
    prologue, layer = prologue_of(name, K, dtype), jnp.full(1, -2, jnp.int32)
    qvalue, scale = quantize(prologue, x, layer, K, round_up(M, 8))
    assert_quantized(qvalue[:M], scale.T[:M], x if prologue is None else prologue(x, 1))


@pytest.mark.parametrize("name", ["silu_mul", "none"])
@pytest.mark.parametrize("groups", [1, 2, 6, 7])
def test_copies_begin_where_tma_can_read_and_write(monkeypatch, groups, name):
    begins = []

    def watched(copy):
        def run(*refs, **options):
            for ref in refs[:2]:
                if ref.memory_space != plgpu.SMEM:
                    continue
                for indexer in (t for t in ref.transforms if hasattr(t, "indices")):
                    strides = np.cumprod([1, *indexer.shape[:0:-1]])[::-1] * ref.dtype.itemsize
                    picked = [not isinstance(i, Slice) for i in indexer.indices]
                    begins.extend(strides[picked].tolist())
            return copy(*refs, **options)

        return run

    for copy in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
        monkeypatch.setattr(plgpu, copy, watched(getattr(plgpu, copy)))
    monkeypatch.setattr(act_quant_sm90, "_MAX_BYTES", 0)  # what is not copied takes no more
    K = 128 * groups
    x = jax.ShapeDtypeStruct((200, 2 * K if name == "silu_mul" else K), jnp.bfloat16)
    prologue, layer = prologue_of(name, K), jnp.zeros(1, jnp.int32)
    jax.eval_shape(lambda x: quantize(prologue, x, layer, K, 200), x)
    assert begins
    assert all(stride % 128 == 0 for stride in begins)


def test_tokens_that_registers_do_not_hold_are_normalized_before(hopper, monkeypatch):
    monkeypatch.setattr(act_quant_sm90, "_MAX_TILES", 0)
    x, norm = tokens((9, 1024)), prologue_of("rms_norm", 1024)
    qvalue, scale = quantize(norm, x, jnp.zeros(1, jnp.int32), 1024, 16)
    assert_quantized(qvalue[:9], scale.T[:9], norm(x, 0))


def test_more_tokens_than_offsets_reach(hopper, monkeypatch):
    monkeypatch.setattr(act_quant_sm90, "_MAX_BYTES", 8 * 1024 * 2)
    x = tokens((8, 1024))
    qvalue, scale = quantize(None, x, jnp.zeros(1, jnp.int32), 1024, 8)
    expected = numpy_reference.quantize_activations(np.asarray(x))
    assert numpy_reference.differing(qvalue, expected[0]) == 0
    assert numpy_reference.differing(scale.T[:8], expected[1]) == 0
    text = str(jax.make_jaxpr(lambda x: quantize(None, x, jnp.zeros(1, jnp.int32), 1024, 8))(x))
    assert "jaxquant_quantize_ragged" in text


def test_a_thread_block_normalizes_several_tokens(hopper, monkeypatch):
    monkeypatch.setattr(act_quant_sm90, "_RESIDENT", 4)
    x, norm = tokens((5, 1152)), prologue_of("rms_norm", 1152)
    qvalue, scale = quantize(norm, x, jnp.zeros(1, jnp.int32), 1152, 8)
    assert_quantized(qvalue[:5], scale.T[:5], norm(x, 0))


@pytest.mark.parametrize("prologue", [SiluMul(), None])
def test_scales_of_a_token_side_by_side(hopper, prologue):
    x = tokens((2, 1152 if prologue is None else 2304))
    qvalue, scale = quantize_tokens(prologue, x, 1152, 2)
    assert_quantized(qvalue, scale.reshape(2, -1), x if prologue is None else prologue(x))


def test_a_token_becomes_several_rows(hopper):
    x, places = tokens((3, 1024)), jnp.asarray([4, 0, 1, 5, 2, 3], jnp.int32)
    qvalue, scale = quantize_tokens(None, x, 1024, 8, 64, places)
    assert_quantized(qvalue[:6], scale.T[:6], x[jnp.asarray([0, 1, 2, 2, 0, 1])])


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (16, 4096, 4096, (64, 1, 2, 4)),
        (16, 4096, 14336, (64, 1, 2, 4)),
        (64, 6144, 4096, (64, 1, 1, 4)),
        (16, 28672, 4096, (128, 1, 1, 2)),
        (16, 4096, 11008, (64, 1, 2, 1)),  # a part of 43 K blocks
        (128, 1536, 4096, (64, 1, 4, 1)),
        (96, 4096, 14336, (64, 2, 2, 1)),
        (128, 4096, 14336, (64, 1, 2, 1)),  # two consumers would leave no ring
        (16, 2112, 7168, (64, 1, 2, 4)),  # 33 clusters of four leave one for a second round
    ],
)
def test_how_few_tokens_are_cut_for_132_multiprocessors(M, N, K, config):
    assert dataclasses.astuple(decode_sm90.default_config(M, N, K, 132)) == config


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (16, 28672, 4096, (128, 1, 1, 2)),
        (64, 16384, 3072, (128, 1, 2, 1)),  # sums of a cluster leave no ring of large slots
        (16, 22528, 11008, (128, 1, 1, 2)),
        (16, 28672, 5504, (128, 1, 1, 1)),  # 43 K blocks
        (16, 34816, 5120, None),  # 136 tiles: four multiprocessors would have two
        (16, 3072, 1024, (128, 1, 2, 2)),
        (16, 3072, 576, (128, 1, 1, 1)),
        (16, 3072, 1536, None),
        (65, 28672, 4096, None),
        (16, 28800, 4096, None),
    ],
)
def test_how_a_gated_product_is_cut_for_132_multiprocessors(M, N, K, config):
    found = decode_sm90.gated_config(M, N, K, 132)
    assert (found and dataclasses.astuple(found)) == config
    assert found is None or decode_sm90.gates(M, N, BF16, found)


@pytest.mark.parametrize("M", [3, 16, 33, 64, 80, 128])
@pytest.mark.parametrize("K", [32, 576, 1536, 4096, 7168, 14336, 28672, 57344])
def test_smem_has_a_ring_for_every_cut(M, K):
    width = decode_sm90.padded_tokens(M)
    for N in (8, 200, 1536, 2112, 4096, 4224, 6144, 8448, 28672, 128256):
        if decode_sm90.takes(M, N, 132):
            config = decode_sm90.default_config(M, N, K, 132)
            slot = config.blocks * ((config.tile_n + width) * 128 + 4 * 128)
            sums = config.splits * config.turns * config.tile_n * width * 4
            assert sums + 2 * config.turns * slot <= SMEM_BYTES
        if config := decode_sm90.gated_config(M, N, K, 132):
            slot = config.blocks * ((256 + width) * 128 + 4 * 128)
            sums = (config.splits - 1) * 256 * width * 4 + 128 * width * 2
            assert sums + 2 * slot <= SMEM_BYTES - 8192  # scales, and what the compiler takes


def assert_quantized(qvalue: Any, scale: Any, x: jax.Array) -> None:
    """To the byte, but for values that differ before they are rounded, in a norm or an exp."""
    expected_qvalue, expected_scale = numpy_reference.quantize_activations(np.asarray(x))
    assert numpy_reference.differing(qvalue, expected_qvalue) <= 0.002 * qvalue.size
    np.testing.assert_allclose(scale, expected_scale, rtol=2**-7)


@pytest.mark.parametrize(
    ("M", "N", "K", "config", "dtype"),
    [
        (1, 128, 1024, (64, 2, 4), BF16),
        (2, 136, 1280, (24, 2, 1), BF16),  # tiles on both sides of a scale's end
        (1, 200, 1536, (32, 4, 3), F32),  # the last tile overlaps the one before
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_every_cut_of_the_kernel_for_one_token(hopper, M, N, K, config, dtype, quantized):
    x, w, layer = tokens((M, K), dtype=dtype), weight((1, N, K)), jnp.zeros(1, jnp.int32)
    x_operands = quantize_tokens(None, x, K, M) if quantized else (x, None)
    config = gemv_sm90.Config(*config)
    y = gemv_sm90.gemv(
        *x_operands, w.qvalue, w.scale, layer, out_dtype=dtype, config=config, sms=SMS
    )
    assert y.dtype == dtype
    assert_close(y, definition(x, w.qvalue[0], w.scale[0]))


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 72, 32), (2, 136, 160), (1, 72, 576), (2, 64, 896), (1, 72, 1056), (2, 64, 1152)],
)
def test_one_token_by_rows_of_few_or_ragged_blocks(hopper, M, N, K):
    x, w, norm, residual = tokens((M, K)), weight((3, N, K)), tokens((3, K)), tokens((M, N))
    config = gemv_sm90.default_config(N, K, SMS)
    y = gemv_sm90.gemv(
        x, None, w.qvalue, w.scale, jnp.array([2]), RMSNorm(norm, 1e-5), None, residual,
        out_dtype=BF16, config=config, sms=SMS,
    )  # fmt: skip
    expected = definition(RMSNorm(norm, 1e-5)(x, 2), w.qvalue[2], w.scale[2])
    assert_close(y, expected + np.asarray(residual, np.float64))


def gated(y: jax.Array) -> np.ndarray:
    return np.asarray(SiluMul()(y), np.float64)


@pytest.mark.parametrize(
    ("M", "N", "K", "config", "dtype"),
    [
        (1, 512, 1024, (64, 4, 2), BF16),  # one thread block has two tiles
        (2, 144, 1280, (24, 2, 1), BF16),
        (1, 400, 1536, (32, 4, 3), F32),  # the last tile overlaps the one before
    ],
)
def test_every_cut_of_a_gated_product(hopper, M, N, K, config, dtype):
    x, w, bias = tokens((M, K), dtype=dtype), weight((1, N, K)), tokens((1, N), dtype=dtype)
    config = gemv_sm90.Config(*config)
    h = gemv_sm90.gemv(
        x, None, w.qvalue, w.scale, jnp.zeros(1, jnp.int32), None, bias,
        gated=True, out_dtype=dtype, config=config, sms=SMS,
    )  # fmt: skip
    y = jnp.asarray(definition(x, w.qvalue[0], w.scale[0])).astype(dtype) + bias
    assert (h.shape, h.dtype) == ((M, N // 2), dtype)
    assert_close(h, gated(y))


@pytest.mark.parametrize(
    ("M", "K", "name"),
    [(1, 1024, "rms_norm"), (2, 1280, "silu_mul"), (3, 160, "rms_norm"), (9, 256, "silu_mul"),
     (66, 128, "rms_norm")],
)  # fmt: skip
def test_what_stands_around_a_product(hopper, M, K, name):
    x = tokens((M, 2 * K if name == "silu_mul" else K))
    w, prologue = weight((3, 72, K)), prologue_of(name, K)
    bias, residual = tokens((3, 72)), tokens((M, 72))
    y = matmul(x, w, layer=1, prologue=prologue, bias=bias, residual=residual)
    xla_y = matmul(
        x, w, layer=1, prologue=prologue, bias=bias, residual=residual, implementation="xla"
    )
    assert_close(y, np.asarray(xla_y, np.float64))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Twice:
    def __call__(self, x: jax.Array, layer: Any = None) -> jax.Array:
        return 2 * x


def test_a_prologue_that_no_kernel_knows(hopper):
    x, w = tokens((1, 1024)), weight((64, 1024))
    y = matmul(x, w, prologue=Twice(), implementation="mosaic_gpu")
    assert_close(y, 2 * definition(x, w.qvalue, w.scale))


def test_vmap_over_what_stands_around(hopper):
    x, w = tokens((2, 4, 128)), weight((2, 3, 64, 128))
    norms, residual = tokens((2, 3, 128)), tokens((2, 4, 64))

    def product(x, w, norm, residual, **kwargs):
        return matmul(x, w, layer=-1, prologue=RMSNorm(norm, 1e-5), residual=residual, **kwargs)

    ys = jax.vmap(product)(x, w, norms, residual)
    for i, y in enumerate(ys):
        of = jax.tree.map(lambda a, i=i: a[i], (x, w, norms, residual))
        assert_close(y, np.asarray(product(*of, implementation="xla"), np.float64))
    shared = tokens((64,))
    ys = jax.vmap(lambda x: matmul(x, jax.tree.map(lambda a: a[0, 0], w), residual=shared))(x[0])
    assert ys.shape == (4, 64)


@pytest.mark.parametrize(
    ("N", "K", "config"),
    [
        (4096, 14336, (32, 4, 2)),
        (6144, 4096, (48, 4, 2)),
        (28672, 4096, (56, 4, 2)),
        (14336, 4096, (56, 4, 2)),
        (1536, 1536, (16, 4, 3)),
        (8, 1280, (8, 2, 1)),
        (960, 576, (8, 4, 2)),  # five K blocks
        (576, 32, (8, 4, 1)),
        (128256, 4096, (56, 4, 2)),  # not many small tiles, though these would be the most even
    ],
)
def test_how_one_token_is_cut_for_132_multiprocessors(N, K, config):
    assert dataclasses.astuple(gemv_sm90.default_config(N, K, 132)) == config


def test_a_scan_reads_each_layer_of_a_stack(hopper):
    x, w = tokens((4, 128)), weight((3, 64, 128))

    @jax.jit
    def run(x, w):
        return lax.scan(lambda _, l: (None, mosaic_gpu.matmul(x, w, l, BF16)), None, jnp.arange(3))

    ys = run(x, w)[1]
    for y, qvalue, scale in zip(ys, w.qvalue, w.scale, strict=True):
        assert_close(y, definition(x, qvalue, scale))


def test_any_batch_of_tokens(hopper):
    x, w = tokens((6, 128)), weight((64, 128))
    y = mosaic_gpu.matmul(x.reshape(2, 3, 128), w, None, BF16)
    assert_close(y.reshape(6, 64), definition(x, w.qvalue, w.scale))


def test_vmap_over_tokens(hopper):
    x, w = tokens((6, 128)), weight((64, 128))
    y = jax.vmap(lambda x: mosaic_gpu.matmul(x, w, None, BF16))(x)
    assert_close(y, definition(x, w.qvalue, w.scale))


def test_vmap_over_tokens_and_stacks(hopper):
    xs, ws = tokens((2, 4, 128)), weight((2, 3, 64, 128))
    ys = jax.vmap(lambda x, w: mosaic_gpu.matmul(x, w, -1, BF16))(xs, ws)
    for x, y, qvalue, scale in zip(xs, ys, ws.qvalue, ws.scale, strict=True):
        assert_close(y, definition(x, qvalue[2], scale[2]))


def test_vmap_over_layers(hopper):
    x, w = tokens((4, 128)), weight((3, 64, 128))
    ys = jax.vmap(lambda l: mosaic_gpu.matmul(x, w, l, BF16))(jnp.array([-1, 0, 7]))
    for y, l in zip(ys, (2, 0, 2), strict=True):
        assert_close(y, definition(x, w.qvalue[l], w.scale[l]))


def test_gradients_pass_straight_through(hopper):
    x, w = tokens((4, 128), dtype=F32), weight((2, 64, 128))
    dy = tokens((4, 64), dtype=F32)
    _, vjp = jax.vjp(lambda x: matmul(x, w, layer=1, implementation="mosaic_gpu"), x)
    dequantized = np.asarray(blocked.dequantize(w, jnp.float32))[1]
    np.testing.assert_allclose(vjp(dy)[0], np.asarray(dy) @ dequantized, rtol=1e-4, atol=1e-5)


def refusal(change: Any) -> str:
    x, w, out_dtype = change(tokens((2, 128)), weight((64, 128)), BF16)
    with pytest.raises(NotImplementedError) as caught:
        mosaic_gpu.matmul(x, w, None, out_dtype)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, w, out: (x, weight((64, 128), fmt="e5m2"), out),
            "the weight is float8_e5m2; the kernels take float8_e4m3fn",
        ),
        (
            lambda x, w, out: (x, weight((64, 128), weight_block_size=64), out),
            "block_size is (64, 64); the kernels take (128, 128)",
        ),
        (
            lambda x, w, out: (x.astype(jnp.float16), w, out),
            "x is float16; the kernels take bfloat16 and float32",
        ),
        (
            lambda x, w, out: (x, w, jnp.float16),
            "the result is float16; the kernels take bfloat16 and float32",
        ),
        (
            lambda x, w, out: (x[:0], w, out),
            "an operand is empty (x [0, 128], w [64, 128]); the kernels take others",
        ),
        (
            lambda x, w, out: (x[:, :72], weight((64, 72)), out),
            "K is 72; the kernels take multiples of 32",
        ),
        (
            lambda x, w, out: (x, weight((60, 128)), out),
            "N is 60; the kernels take multiples of 8",
        ),
    ],
)
def test_operands_it_refuses(hopper, change, message):
    assert refusal(change) == f"mosaic_gpu: {message}"


def test_a_cpu_is_refused_and_noted_once(caplog):
    hopper_module._log_once.cache_clear()
    message = "mosaic_gpu: the device is a cpu; the kernels are for Hopper GPUs"
    with caplog.at_level(logging.INFO, logger="jaxquant"):
        for _ in range(2):
            assert refusal(lambda *operands: operands) == message
    operations = "FP8 products", "quantizations of weights"
    notes = [f"{message}: {operation} run through XLA" for operation in operations]
    assert sorted(r.getMessage() for r in caplog.records) == notes


def test_a_debug_log_says_which_runs(hopper, caplog):
    x, w = tokens((2, 128)), weight((64, 128))
    with caplog.at_level(logging.DEBUG, logger="jaxquant.matmul.api"):
        matmul(x, w)
        matmul(x.astype(jnp.float16), w)
    names = ["mosaic_gpu", "xla"]
    assert [r.getMessage() for r in caplog.records] == [
        f"matmul of x [2, 128] and w [64, 128]: {name}" for name in names
    ]


def test_donated_tokens(hopper):
    x, w = tokens((8, 128)), weight((128, 128))
    expected = np.asarray(matmul(x, w))
    product = jax.jit(matmul, donate_argnums=0)
    np.testing.assert_array_equal(product(x, w), expected)


def test_matmul_prefers_the_kernels_and_falls_back_to_xla(hopper, monkeypatch):
    x, w = tokens((2, 128)), weight((64, 128))
    np.testing.assert_array_equal(matmul(x, w), matmul(x, w, implementation="mosaic_gpu"))
    x = x.astype(jnp.float16)
    np.testing.assert_array_equal(matmul(x, w), matmul(x, w, implementation="xla"))
