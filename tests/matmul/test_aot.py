"""The Hopper kernels compile for an H200, on a machine that has no GPU."""

import json
import sys

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

# M, N, K, x, y, and the kernel that multiplies
PRODUCTS = [
    (1, 4096, 4096, "bfloat16", "bfloat16", "decode"),  # K is split
    (5, 576, 1536, "float32", "bfloat16", "decode"),
    (64, 28672, 4096, "bfloat16", "float32", "decode"),
    (100, 200, 96, "bfloat16", "bfloat16", "decode"),
    (130, 192, 576, "bfloat16", "float32", "gemm"),
    (300, 8, 32, "float32", "float32", "gemm"),
    (512, 4096, 14336, "bfloat16", "bfloat16", "gemm"),
    (4096, 28672, 4096, "bfloat16", "bfloat16", "gemm"),  # in clusters
]


@pytest.fixture(scope="module")
def compiled():
    """The program of each product."""
    return run_apart(__file__, PRODUCTS)


@pytest.mark.parametrize(("product", "i"), [(p, i) for i, p in enumerate(PRODUCTS)])
def test_a_product_compiles(compiled, product, i):
    assert "jaxquant_quantize_activations" in compiled[i]
    assert f"jaxquant_{product[-1]}_fp8" in compiled[i]


def compile_for_h200(products: list) -> list[str | None]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxquant.array import QuantizedArray
    from jaxquant.matmul import mosaic_gpu

    sharding = h200()

    def compile_product(M, N, K, x_dtype, out_dtype, _):
        def product(x, qvalue, scale, layer):
            w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))
            return mosaic_gpu.matmul(x, w, layer, out_dtype)

        scale_shape = (2, -(-N // 128), -(-K // 128))
        operands = [
            ((M, K), x_dtype),
            ((2, N, K), "float8_e4m3fn"),
            (scale_shape, "float32"),
            ((), "int32"),
        ]
        args = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        return jax.jit(product).lower(*args).compile().as_text()

    return [compile_product(*p) for p in products]


if __name__ == "__main__":
    print(json.dumps(compile_for_h200(json.loads(sys.argv[1]))))
