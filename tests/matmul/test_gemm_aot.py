"""Every tile of the prefill kernel compiles for an H200; see `tests/hopper.py`."""

import json

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

# M, N, K, result, tile_m, cluster, tile_n, and whether it is gated
GEMMS = [
    (512, 2112, 7168, "bfloat16", 128, False, 64, False),
    (512, 6144, 4096, "float32", 128, False, 96, False),
    (1000, 200, 1024, "bfloat16", 128, True, 112, False),
    (512, 4096, 14336, "bfloat16", 128, False, 128, False),
    (512, 4096, 128, "bfloat16", 128, True, 144, False),
    (136, 8, 96, "float32", 128, True, 160, False),  # K in no whole blocks
    (4096, 32768, 512, "bfloat16", 128, True, 192, False),
    (72, 28672, 4096, "bfloat16", 64, False, 128, False),
    (4096, 6144, 4096, "float32", 192, True, 128, False),
    (512, 6144, 4096, "bfloat16", 256, False, 96, False),
    (512, 7168, 2048, "bfloat16", 256, True, 112, False),
    (8192, 28672, 4096, "bfloat16", 256, True, 128, False),
    (8192, 28672, 4096, "float32", 256, True, 128, False),
    (8192, 28672, 4096, "bfloat16", 128, True, 256, False),
    (8192, 28672, 4096, "bfloat16", 128, True, 256, True),
    (1000, 512, 160, "bfloat16", 128, True, 256, True),
]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize(("gemm", "i"), [(g, i) for i, g in enumerate(GEMMS)])
def test_a_tile_compiles(compiled, gemm, i):
    assert "jaxquant_gemm_fp8" in compiled[i]


def compile_all() -> list[str]:
    import jax

    from jaxquant.matmul import gemm_sm90

    sharding = h200()

    def compile_gemm(M, N, K, out_dtype, tile_m, cluster, tile_n, gated):
        config = gemm_sm90.Config(tile_m, cluster, tile_n)
        operands = [
            ((M, K), "float8_e4m3fn"),
            ((-(-K // 128), -(-M // 64) * 64), "float32"),
            ((2, N, K), "float8_e4m3fn"),
            ((2, -(-N // 128), -(-K // 128)), "float32"),
            ((1,), "int32"),
        ]
        args = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        gemm = jax.jit(
            lambda *args: gemm_sm90.gemm(
                *args, gated=gated, out_dtype=out_dtype, config=config, sms=132
            )
        )
        return gemm.lower(*args).compile().as_text()

    return [compile_gemm(*g) for g in GEMMS]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
