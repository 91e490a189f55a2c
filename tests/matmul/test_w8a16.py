"""Weight-only products on Hopper, run by Pallas's interpreter, against the definition in float64.

What of it is for the GPU alone, FP8 to BF16 in registers, `test_w8a16_aot.py` compiles, and
`make test-gpu` runs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hopper import FLOAT32, on_hopper
from jax import lax
from numpy_reference import BF16, heavy_tailed, make_weight, normal, zero_blocks

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.config import QuantConfig
from jaxquant.matmul import RMSNorm, SiluMul, mosaic_gpu, w8a16_sm90
from jaxquant.matmul.api import matmul
from jaxquant.matmul.w8a16_sm90 import Config

# Few, so that a thread block goes through several tiles.
SMS = 2
F32 = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    with on_hopper(monkeypatch, mosaic_gpu, sms=SMS):
        yield


def weight(shape: tuple[int, ...], kind: Any = normal, fmt: str = "e4m3") -> QuantizedArray:
    config = QuantConfig(fmt=fmt, activation_scheme=None)
    return blocked.quantize(jnp.asarray(make_weight(kind, shape, BF16, 0)), config)


def tokens(shape: tuple[int, ...], kind: Any = normal) -> jax.Array:
    return jnp.asarray(make_weight(kind, shape, BF16, 1))


def definition(x: Any, qvalue: Any, scale: Any) -> np.ndarray:
    w = numpy_reference.dequantize(np.asarray(qvalue), np.asarray(scale), (128, 128))
    return np.asarray(x, np.float64) @ w.T


def assert_close(y: Any, expected: np.ndarray) -> None:
    # What rounding the result costs; the sums in float32 are far closer.
    tolerance = 3e-3 if y.dtype == BF16 else FLOAT32
    error = np.linalg.norm(np.asarray(y, np.float64) - expected)
    assert error <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("M", "N", "K", "fmt", "out_dtype"),
    [
        (1, 64, 1024, "e4m3", BF16),
        (3, 72, 96, "e5m2", F32),
        (13, 200, 160, "e4m3", BF16),
        (75, 136, 288, "e4m3", F32),
        (130, 320, 128, "e5m2", BF16),
    ],
)
def test_a_product_is_the_definitions(M, N, K, fmt, out_dtype):
    x, w = tokens((M, K)), weight((N, K), fmt=fmt)
    y = mosaic_gpu.matmul(x, w, None, out_dtype)
    assert (y.shape, y.dtype) == ((M, N), out_dtype)
    assert_close(y, definition(x, w.qvalue, w.scale))


@pytest.mark.parametrize(("M", "kind"), [(2, zero_blocks), (80, heavy_tailed)])
def test_values_that_are_hard(M, kind):
    x, w = tokens((M, 256), kind), weight((128, 256), kind)
    y = mosaic_gpu.matmul(x, w, None, BF16)
    assert_close(y, definition(x, w.qvalue, w.scale))


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (5, 192, 512, Config(8, 64, groups=1, turns=2, splits=2)),
        (5, 136, 256, Config(8, 128, groups=2)),
        (24, 320, 160, Config(16, 256, groups=2)),
        (24, 264, 256, Config(32, 128, groups=2, turns=2)),
    ],
)
@pytest.mark.parametrize("out_dtype", [BF16, F32])
def test_every_cut(M, N, K, config, out_dtype):
    x, w = tokens((M, K)), weight((2, N, K))
    y = w8a16_sm90.product(
        x, w.qvalue, w.scale, jnp.ones(1, jnp.int32), out_dtype=out_dtype, config=config, sms=SMS
    )
    assert_close(y, definition(x, w.qvalue[1], w.scale[1]))


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (1, 28672, 4096, (8, 256, 4, 1, 1)),
        (16, 6144, 4096, (16, 64, 1, 4, 1)),
        (16, 4096, 14336, (16, 64, 1, 4, 2)),
        (64, 28672, 4096, (64, 256, 2, 1, 1)),
        (1, 4096, 4096, (8, 64, 1, 2, 2)),
        (64, 4096, 4096, (64, 64, 1, 2, 2)),
        (512, 4096, 14336, (128, 128, 2, 1, 1)),
        (4096, 28672, 4096, (128, 128, 2, 1, 1)),
        (3, 8, 160, (8, 64, 1, 1, 2)),
    ],
)
def test_how_products_are_cut_for_132_multiprocessors(M, N, K, config):
    assert dataclasses.astuple(w8a16_sm90.default_config(M, N, K, 132)) == config


@pytest.mark.parametrize(
    ("M", "N", "K", "out_dtype", "dequantizes"),
    [
        (4096, 28672, 4096, BF16, True),
        (1024, 4096, 14336, BF16, True),
        (1024, 6144, 4096, BF16, False),
        (512, 28672, 4096, BF16, False),
        (4096, 28672, 4096, F32, False),
    ],
)
def test_which_products_dequantize(M, N, K, out_dtype, dequantizes):
    assert w8a16_sm90.dequantizes(M, N, K, out_dtype) == dequantizes


@pytest.mark.parametrize(("M", "name"), [(3, "rms_norm"), (9, "silu_mul")])
def test_what_stands_around_a_product(M, name):
    K = 160
    x = tokens((M, 2 * K if name == "silu_mul" else K))
    prologue = RMSNorm(tokens((3, K)), eps=1e-5) if name == "rms_norm" else SiluMul()
    around = {"prologue": prologue, "bias": tokens((3, 72)), "residual": tokens((M, 72))}
    w = weight((3, 72, K))
    y = matmul(x, w, layer=1, implementation="mosaic_gpu", **around)
    assert_close(y, np.asarray(matmul(x, w, layer=1, implementation="xla", **around), np.float64))


@pytest.mark.parametrize("out_dtype", [BF16, F32])
def test_many_tokens_multiply_a_dequantized_weight(monkeypatch, out_dtype):
    monkeypatch.setattr(w8a16_sm90, "_DEQUANTIZED_TOKENS", 40)
    monkeypatch.setattr(w8a16_sm90, "_DEQUANTIZED_WORK", 40 * 72 * 288)
    kernels, product = [], w8a16_sm90.product

    def watched(*args, **kwargs):
        kernels.append(args)
        return product(*args, **kwargs)

    monkeypatch.setattr(w8a16_sm90, "product", watched)
    x, w = tokens((40, 288)), weight((3, 72, 288))
    y = mosaic_gpu.matmul(x, w, -1, out_dtype)
    assert_close(y, definition(x, w.qvalue[2], w.scale[2]))
    assert bool(kernels) == (out_dtype == F32)  # which is not rounded on the way


def test_a_scan_reads_each_layer_of_a_stack():
    x, w = tokens((4, 128)), weight((3, 64, 128))

    @jax.jit
    def run(x, w):
        return lax.scan(lambda _, l: (None, mosaic_gpu.matmul(x, w, l, BF16)), None, jnp.arange(3))

    for y, qvalue, scale in zip(run(x, w)[1], w.qvalue, w.scale, strict=True):
        assert_close(y, definition(x, qvalue, scale))


def test_vmap_over_tokens_and_stacks():
    xs, ws = tokens((2, 4, 128)), weight((2, 3, 64, 128))
    ys = jax.vmap(lambda x, w: matmul(x, w, layer=-1, implementation="mosaic_gpu"))(xs, ws)
    for x, y, qvalue, scale in zip(xs, ys, ws.qvalue, ws.scale, strict=True):
        assert_close(y, definition(x, qvalue[2], scale[2]))


def test_gradients():
    x, w, dy = tokens((4, 128)), weight((2, 64, 128)), tokens((4, 64))
    _, vjp = jax.vjp(lambda x: matmul(x, w, layer=1, implementation="mosaic_gpu"), x)
    dequantized = np.asarray(blocked.dequantize(w, jnp.float32))[1]
    assert_close(vjp(dy)[0], np.asarray(dy, np.float64) @ dequantized)


def test_the_same_bytes_on_repeat():
    x, w = tokens((4, 512)), weight((64, 512))
    results = [np.asarray(matmul(x, w, implementation="mosaic_gpu")).tobytes() for _ in range(2)]
    assert results[0] == results[1]


def test_activations_in_float32_are_refused():
    with pytest.raises(NotImplementedError) as caught:
        mosaic_gpu.matmul(jnp.ones((2, 128)), weight((64, 128)), None, F32)
    assert str(caught.value) == "mosaic_gpu: x is float32; the kernels take bfloat16"
