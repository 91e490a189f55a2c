"""The prefill kernel of Hopper: every tile, by Pallas's interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hopper import FLOAT32, on_hopper
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from numpy_reference import BF16, heavy_tailed, make_weight, normal, zero_blocks

from jaxquant import blocked
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError
from jaxquant.matmul import SiluMul, act_quant_sm90, gemm_sm90, gemm_wgmma_sm90, tuning
from jaxquant.matmul.gemm_sm90 import Config

# Few, so that a thread block goes through several tiles.
SMS = 2
F32 = np.dtype(np.float32)


@pytest.fixture
def hopper(monkeypatch):
    with on_hopper(monkeypatch):
        yield


def operands(M, N, K, kind=normal, layers=1):
    """What the kernel takes, and the product of each layer."""
    x = make_weight(kind, (M, K), BF16, 1)
    w = blocked.quantize(jnp.asarray(make_weight(kind, (layers, N, K), BF16, 0)), QuantConfig())
    xq, sx = numpy_reference.quantize_activations(x)
    a = numpy_reference.dequantize(xq, sx, (1, 128))
    b = numpy_reference.dequantize(np.asarray(w.qvalue), np.asarray(w.scale), (128, 128))
    sx = np.pad(sx.T, ((0, 0), (0, -M % 64)))
    return (jnp.asarray(xq), jnp.asarray(sx), w.qvalue, w.scale), a @ np.swapaxes(b, -1, -2)


def run(args, config, layer=0, out_dtype=BF16, residual=None):
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    options = {"out_dtype": out_dtype, "config": config, "sms": SMS}
    return gemm_sm90.gemm(*args, layer, residual=residual, **options)


def assert_close(y, expected):
    # What rounding the result costs; the sums in float32 are far closer.
    tolerance = 3e-3 if y.dtype == BF16 else FLOAT32
    error = np.linalg.norm(np.asarray(y, np.float64) - expected)
    assert error <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("tile_m", "cluster", "tile_n"),
    [
        (64, False, 128),
        (128, False, 64),
        (128, True, 112),
        (128, False, 144),
        (128, True, 192),
        (128, True, 256),
        (192, True, 128),
        (256, False, 96),
        (256, True, 112),
        (256, True, 128),
    ],
)
def test_every_kind_of_tile(hopper, tile_m, cluster, tile_n):
    args, expected = operands(136, 264, 160)
    assert_close(run(args, Config(tile_m, cluster, tile_n)), expected[0])


@pytest.mark.parametrize("K", [32, 384])  # less than a pair of blocks, and a pair and one
@pytest.mark.parametrize("config", [Config(128, False), Config(256, True)])
def test_any_number_of_blocks(hopper, config, K):
    args, expected = operands(16, 136, K)
    assert_close(run(args, config, out_dtype=F32), expected[0])


@pytest.mark.parametrize("kind", [zero_blocks, heavy_tailed])
def test_values_that_are_hard(hopper, kind):
    args, expected = operands(72, 200, 256, kind)
    assert_close(run(args, Config(128, True, 192)), expected[0])


# Tiles that end inside the result and outside it; less than a pair of blocks, a pair, more.
@pytest.mark.parametrize(
    ("config", "K"),
    [
        (Config(64, False), 672),
        (Config(128, False), 128),
        (Config(128, False), 256),
        (Config(128, False), 672),
        (Config(128, True, 192), 672),
        (Config(256, True), 128),
        (Config(256, True), 672),
    ],
)
def test_a_residual_is_added_to_the_rounded_product(hopper, config, K):
    args, _ = operands(136, 320, K)
    residual = jnp.asarray(make_weight(normal, (136, 320), BF16, 2))
    assert gemm_sm90.can_add_residual(136, 320, BF16, config)
    expected = run(args, config) + residual
    assert numpy_reference.differing(run(args, config, residual=residual), expected) == 0


@pytest.mark.parametrize(
    ("M", "N", "out_dtype"), [(12, 256, BF16), (16, 264, BF16), (16, 64, BF16), (16, 256, F32)]
)
def test_a_residual_that_copies_do_not_fit_is_left_to_xla(M, N, out_dtype):
    assert not gemm_sm90.can_add_residual(M, N, out_dtype, Config(256, True))


def test_a_residual_is_added_where_that_was_measured():
    measured, other = Config(128, True, 192), Config(128, False, 64)
    assert gemm_sm90.adds_residual(8192, 4096, BF16, measured)
    assert gemm_sm90.adds_residual(8192, 4096, BF16, Config(256, True))
    assert gemm_sm90.adds_residual(512, 4096, BF16, Config(128, False))
    assert not gemm_sm90.adds_residual(8192, 4096, BF16, other)
    assert not gemm_sm90.adds_residual(8191, 4096, BF16, measured)


def gate(args):
    layer = jnp.zeros(1, jnp.int32)
    options = {"out_dtype": BF16, "config": gemm_sm90.GATED, "sms": SMS}
    return gemm_sm90.gemm(*args, layer, gated=True, **options)


# Tokens in part of a tile and in several; ragged blocks of K; one group and more.
@pytest.mark.parametrize(
    ("M", "N", "K", "kind"),
    [
        (16, 256, 160, normal),
        (136, 768, 384, normal),
        (264, 512, 128, heavy_tailed),
        (72, 512, 256, zero_blocks),
    ],
)
def test_a_gated_product_has_the_bytes_of_what_is_quantized_after_it(hopper, M, N, K, kind):
    args, _ = operands(M, N, K, kind)
    qvalue, scale = gate(args)
    product = run(args, Config(128, False))
    expected = act_quant_sm90.quantize(SiluMul(), product, jnp.zeros(1, jnp.int32), N // 2, M)
    assert (qvalue.shape, scale.shape) == tuple(a.shape for a in expected)
    assert numpy_reference.differing(qvalue, expected[0]) == 0
    assert numpy_reference.differing(scale[:, :M], expected[1][:, :M]) == 0


def test_products_are_gated_where_that_is_the_faster():
    assert all(gemm_sm90.gates(M, 28672, 4096, BF16, 132) for M in (1024, 2048, 4096, 8192))
    # Four waves of tiles for what fills three and a half.
    assert not gemm_sm90.gates(512, 28672, 4096, BF16, 132)


def test_what_can_be_gated():
    assert gemm_sm90.can_gate(28672, BF16)
    assert not gemm_sm90.can_gate(28672, F32)  # more than SMEM holds
    assert not gemm_sm90.can_gate(28672 + 128, BF16)  # half a group


def test_few_columns(hopper):
    args, expected = operands(16, 8, 160)
    assert_close(run(args, Config(256, True)), expected[0])


def test_a_traced_layer_of_a_stack(hopper):
    args, expected = operands(72, 64, 128, layers=3)
    config = Config(128, False, 64)
    scan = jax.jit(lambda: lax.scan(lambda _, l: (None, run(args, config, l)), None, jnp.arange(3)))
    for y, layer in zip(scan()[1], expected, strict=True):
        assert_close(y, layer)


@pytest.mark.parametrize("config", [Config(128, False), Config(256, True)])
def test_no_two_threads_race(monkeypatch, config):
    args, expected = operands(16, 320, 512)
    residual = jnp.asarray(make_weight(normal, (16, 320), BF16, 2))
    with on_hopper(monkeypatch, detect_races=True):
        y = run(args, config, residual=residual)
        found = gpu_callbacks.get_races().races_found
    assert_close(y, expected[0] + np.asarray(residual, np.float64))
    assert not found


def test_no_two_threads_race_where_a_product_is_gated(monkeypatch):
    args, _ = operands(136, 768, 512)
    with on_hopper(monkeypatch, detect_races=True):
        gate(args)
        assert not gpu_callbacks.get_races().races_found


def test_a_tile_that_registers_do_not_hold_is_refused():
    with pytest.raises(JaxquantError) as caught:
        Config(256, True, 192)
    message = str(caught.value)
    assert message.startswith("tile 256x192; allowed: 64x128, 128x64, ")
    assert message.endswith(", 256x128")


def test_the_prediction_fills_waves():
    # One wave of 132 tiles; two scales in a tile; the most work per byte.
    assert gemm_sm90.default_config(512, 2112, 7168, 132) == Config(128, False, 64)
    assert gemm_sm90.default_config(512, 6144, 4096, 132).tile_n == 192
    assert gemm_sm90.default_config(8192, 4096, 14336, 132) == Config(256, True, 128)


def test_the_prediction_of_a_tile_grows_with_its_waves():
    config = Config(128, False, 128)
    one, two = (gemm_sm90.microseconds(config, M, 4096, 4096, 128) for M in (512, 513))
    assert two == 2 * one


def test_a_tuned_config_comes_first(monkeypatch):
    monkeypatch.setattr(
        tuning, "lookup", lambda *shape: {"tile_m": 64, "cluster": True, "tile_n": 128}
    )
    assert gemm_sm90.default_config(8192, 4096, 14336, 132) == Config(64, True, 128)


def test_the_ptx_of_a_block():
    ptx = gemm_wgmma_sm90._multiply_ptx(8, 1024, 2048).split("\n")
    products = [line for line in ptx if line.startswith("wgmma.mma_async")]
    assert (
        products
        == ["wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {$0,$1,$2,$3}, a, b, add, 1, 1;"]
        * 4
    )
    # The first overwrites; each goes 32 bytes on.
    assert [line for line in ptx if line.startswith("setp")] == [
        f"setp.ne.b32 add, {i}, 0;" for i in range(4)
    ]
    assert "add.s64 a, a0, 6; add.s64 b, b0, 6;" in ptx
    # From the first slot, in units of 16 bytes.
    assert "mul.wide.u32 a0, $10, 64; add.s64 a0, a0, $8;" in ptx
    assert "mul.wide.u32 b0, $10, 128; add.s64 b0, b0, $9;" in ptx
