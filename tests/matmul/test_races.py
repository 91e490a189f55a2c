"""No two threads of a Hopper kernel race, as far as Pallas's interpreter sees.

It knows of copies, barriers and SMEM; each of several thread blocks goes through several tiles and
rounds of its ring. Two writes are a race to it even if they write the same, as those of tiles that
overlap do, so shapes are such that none overlap. The prefill kernel's tiles are in `test_gemm.py`.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hopper import on_hopper
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from numpy_reference import BF16, make_weight, normal

from jaxquant import blocked
from jaxquant.config import QuantConfig
from jaxquant.matmul import RMSNorm, SiluMul, decode_sm90, gemv_sm90, mosaic_gpu
from jaxquant.matmul.act_quant_sm90 import quantize
from jaxquant.matmul.api import matmul


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    with on_hopper(monkeypatch, mosaic_gpu, detect_races=True):
        yield


def random(*shape):
    return jnp.asarray(make_weight(normal, shape, BF16, 1))


def assert_no_races():
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("M", "N", "K", "scheme"),
    [
        (1, 256, 4096, "dynamic"),
        (2, 256, 4096, "dynamic"),
        (13, 256, 640, "dynamic"),
        (80, 256, 640, "dynamic"),
        # What follows a tile's last block is read ahead too, and dropped: a tile for each.
        (1, 128, 2560, None),
        (13, 128, 2560, None),
        (80, 128, 1280, None),
    ],
)
def test_products(M, N, K, scheme):
    config = QuantConfig(activation_scheme=scheme)
    w = blocked.quantize(jnp.asarray(make_weight(normal, (2, N, K), BF16, 0)), config)
    x, residual = random(M, K), random(M, N)
    args = {"layer": 1, "prologue": RMSNorm(random(2, K), 1e-5), "residual": residual}
    y = matmul(x, w, implementation="mosaic_gpu", **args)
    expected = matmul(x, w, implementation="xla", **args)
    assert np.linalg.norm(y - expected) < 1e-2 * np.linalg.norm(expected)
    assert_no_races()


@pytest.mark.parametrize("M", [1, 2])
def test_a_gated_product(M):
    w = blocked.quantize(jnp.asarray(make_weight(normal, (1, 512, 2048), BF16, 0)))
    norm, layer = RMSNorm(random(1, 2048), 1e-5), jnp.zeros(1, jnp.int32)
    config = gemv_sm90.Config(rows=64, slot_blocks=4, consumers=2)
    gemv_sm90.gemv(
        random(M, 2048), None, w.qvalue, w.scale, layer, norm,
        gated=True, out_dtype=BF16, config=config, sms=2,
    )  # fmt: skip
    assert_no_races()


@pytest.mark.parametrize("M", [13, 33])
def test_a_gated_product_of_several_tokens(M):
    w = blocked.quantize(jnp.asarray(make_weight(normal, (1, 1024, 1024), BF16, 0)))
    layer, rows = jnp.zeros(1, jnp.int32), decode_sm90.padded_tokens(M)
    xq, sx = quantize(None, random(M, 1024), layer, 1024, rows)
    decode_sm90.decode(
        xq, sx, w.qvalue, w.scale, layer,
        gated=True, M=M, out_dtype=BF16, config=decode_sm90.Config(128), sms=2,
    )  # fmt: skip
    assert_no_races()


@pytest.mark.parametrize("name", ["none", "rms_norm", "silu_mul"])
@pytest.mark.parametrize(("M", "K"), [(2, 2048), (24, 1024), (24, 416), (136, 256)])
def test_quantization_of_activations(M, K, name):
    prologue = {"none": None, "rms_norm": RMSNorm(random(2, K), 1e-5), "silu_mul": SiluMul()}[name]
    x = random(M, 2 * K if name == "silu_mul" else K)
    quantize(prologue, x, jnp.ones(1, jnp.int32), K, M)
    assert_no_races()
