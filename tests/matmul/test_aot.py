"""Products compile for an H200, each with its kernels; see `tests/hopper.py`."""

import json
import re

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

# M, N, K, x, y, prologue, and the kernels
PRODUCTS = [
    (1, 4096, 4096, "bfloat16", "bfloat16", None, ["gemv_fp8"]),
    (1, 28672, 4096, "bfloat16", "bfloat16", "rms_norm", ["gemv_fp8"]),
    (1, 4096, 14336, "bfloat16", "float32", "silu_mul", ["quantize_tokens", "gemv_fp8"]),
    (2, 1536, 1280, "float32", "float32", "rms_norm", ["gemv_fp8"]),
    (1, 960, 576, "bfloat16", "bfloat16", "rms_norm", ["gemv_fp8"]),
    (2, 72, 96, "float32", "bfloat16", None, ["gemv_fp8"]),
    (16, 960, 576, "bfloat16", "bfloat16", "rms_norm", ["quantize_normalized", "decode_fp8"]),
    (3, 4096, 4096, "bfloat16", "bfloat16", None, ["quantize_tokens", "decode_fp8"]),
    (16, 4096, 14336, "bfloat16", "bfloat16", "silu_mul", ["quantize_tokens", "decode_fp8"]),
    (5, 576, 1536, "float32", "bfloat16", None, ["quantize_tokens", "decode_fp8"]),
    (64, 28672, 4096, "bfloat16", "float32", "rms_norm", ["quantize_normalized", "decode_fp8"]),
    (128, 1536, 4096, "bfloat16", "bfloat16", None, ["quantize_tokens", "decode_fp8"]),
    (128, 4096, 14336, "bfloat16", "bfloat16", "silu_mul", ["quantize_tokens", "decode_fp8"]),
    (64, 2048, 512, "bfloat16", "bfloat16", None, ["quantize_short", "decode_fp8"]),
    (100, 200, 96, "bfloat16", "bfloat16", None, ["quantize_ragged", "decode_fp8"]),
    (130, 192, 576, "bfloat16", "float32", "rms_norm", ["quantize_normalized", "gemm_fp8"]),
    (300, 8, 32, "float32", "float32", None, ["quantize_ragged", "gemm_fp8"]),
    (200, 576, 1536, "bfloat16", "bfloat16", "silu_mul", ["quantize_tokens", "gemm_fp8"]),
    (512, 4096, 14336, "bfloat16", "bfloat16", "silu_mul", ["quantize_tokens", "gemm_fp8"]),
    (4096, 28672, 4096, "bfloat16", "bfloat16", "rms_norm", ["quantize_normalized", "gemm_fp8"]),
]

# M, F, K of gated products
GATED = [(3, 14336, 4096), (16, 8192, 3072), (64, 14336, 4096), (64, 8192, 3072)]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize(("product", "i"), [(p, i) for i, p in enumerate(PRODUCTS)])
def test_a_product_compiles(compiled, product, i):
    for kernel in product[-1]:
        assert f"jaxquant_{kernel}" in compiled[i]
    assert ("jaxquant_quantize" in compiled[i]) == (len(product[-1]) > 1)


@pytest.mark.parametrize("i", range(len(GATED)))
def test_a_gated_product_compiles(compiled, i):
    text = compiled[len(PRODUCTS) + i]
    assert "jaxquant_decode_fp8" in text
    assert "jaxquant_quantize" not in text


@pytest.mark.parametrize("i", [0, 1])
def test_xla_rounds_to_fp8_on_a_gpu(compiled, i):
    assert re.search(r"= f8e4m3fn\[[\d,]+\]\S* convert\(", compiled[len(PRODUCTS) + len(GATED) + i])


def compile_all() -> list[str]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxquant.array import QuantizedArray
    from jaxquant.blocked import quantize
    from jaxquant.config import QuantConfig
    from jaxquant.matmul import RMSNorm, SiluMul, decode_sm90, mosaic_gpu, xla

    sharding = h200()

    def compile_product(M, N, K, x_dtype, out_dtype, name, _):
        def product(x, qvalue, scale, layer, norm, bias, residual):
            w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))
            prologue = {"rms_norm": RMSNorm(norm, 1e-5), "silu_mul": SiluMul(), None: None}[name]
            return mosaic_gpu.matmul(x, w, layer, out_dtype, prologue, bias, residual)

        scale_shape = (2, -(-N // 128), -(-K // 128))
        operands = [
            ((M, 2 * K if name == "silu_mul" else K), x_dtype),
            ((2, N, K), "float8_e4m3fn"),
            (scale_shape, "float32"),
            ((), "int32"),
            ((2, K), x_dtype),
            ((2, N), out_dtype),
            ((M, N), out_dtype),
        ]
        args = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        return jax.jit(product).lower(*args).compile().as_text()

    def compile_gated(M, F, K):
        config = decode_sm90.gated_config(M, 2 * F, K, 132)
        assert config is not None

        def product(*operands):
            return decode_sm90.decode(
                *operands, gated=True, M=M, out_dtype=jnp.bfloat16, config=config, sms=132
            )

        operands = [
            ((decode_sm90.padded_tokens(M), K), "float8_e4m3fn"),
            ((K // 128, 64), "float32"),
            ((2, 2 * F, K), "float8_e4m3fn"),
            ((2, F // 64, K // 128), "float32"),
            ((1,), "int32"),
        ]
        args = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        return jax.jit(product).lower(*args).compile().as_text()

    def compile_reference(M, N, K):
        def product(x, qvalue, scale):
            w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))
            return xla.matmul(x, w, None, x.dtype)

        operands = ((M, K), "bfloat16"), ((N, K), "float8_e4m3fn"), ((1, 1), "float32")
        args = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        return jax.jit(product).lower(*args).compile().as_text()

    def compile_there_and_back():
        config = QuantConfig(weight_block_size=(64, 64))
        w = jax.ShapeDtypeStruct((128, 128), "bfloat16", sharding=sharding)
        return jax.jit(lambda w: quantize(w, config).dequantize()).lower(w).compile().as_text()

    products = [compile_product(*p) for p in PRODUCTS]
    gated = [compile_gated(*g) for g in GATED]
    jax.default_backend = lambda: "gpu"
    return [*products, *gated, compile_reference(1, 64, 128), compile_there_and_back()]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
