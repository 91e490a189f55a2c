"""Weight-only products compile for an H200; see `tests/hopper.py`."""

import json

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

# M, N, K, weight, result, prologue
PRODUCTS = [
    (1, 4096, 4096, "float8_e4m3fn", "bfloat16", None),
    (3, 28672, 4096, "float8_e5m2", "float32", "rms_norm"),
    (16, 4096, 14336, "float8_e4m3fn", "bfloat16", "silu_mul"),
    (64, 6144, 4096, "float8_e4m3fn", "bfloat16", None),
    (64, 28672, 4096, "float8_e4m3fn", "bfloat16", None),
    (100, 200, 96, "float8_e5m2", "bfloat16", None),
    (130, 192, 576, "float8_e4m3fn", "float32", "rms_norm"),
    (300, 8, 32, "float8_e4m3fn", "float32", None),
    (512, 4096, 14336, "float8_e4m3fn", "bfloat16", "silu_mul"),
    (1000, 28672, 4096, "float8_e4m3fn", "bfloat16", None),
    (4096, 28672, 4096, "float8_e4m3fn", "float32", None),
]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize(("product", "i"), [(p, i) for i, p in enumerate(PRODUCTS)])
def test_a_product_compiles(compiled, product, i):
    assert "jaxquant_w8a16" in compiled[i]


def compile_all() -> list[str | None]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxquant.array import QuantizedArray
    from jaxquant.matmul import RMSNorm, SiluMul, mosaic_gpu

    sharding = h200()

    def compile_product(M, N, K, w_dtype, out_dtype, name):
        def product(x, qvalue, scale, layer, norm, bias, residual):
            w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16), None)
            prologue = {"rms_norm": RMSNorm(norm, 1e-5), "silu_mul": SiluMul(), None: None}[name]
            return mosaic_gpu.matmul(x, w, layer, out_dtype, prologue, bias, residual)

        operands = [
            ((M, 2 * K if name == "silu_mul" else K), "bfloat16"),
            ((2, N, K), w_dtype),
            ((2, -(-N // 128), -(-K // 128)), "float32"),
            ((), "int32"),
            ((2, K), "bfloat16"),
            ((2, N), out_dtype),
            ((M, N), out_dtype),
        ]
        args = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        return jax.jit(product).lower(*args).compile().as_text()

    return [compile_product(*p) for p in PRODUCTS]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
