"""Products with experts compile for an H200, every tile by a kernel; see `tests/hopper.py`."""

import json
import math
import re

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

L, E, N, K = 2, 16, 1536, 4096
# Rows, and the kernels of their tiles.
ROWS = [
    (8, ["gemv_fp8"]),
    (128, ["quantize_tokens", "decode_fp8"]),
    (4096, ["quantize_tokens", "decode_fp8"]),
]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize(("i", "kernels"), [(i, kernels) for i, (_, kernels) in enumerate(ROWS)])
def test_experts_are_read_in_place(compiled, i, kernels):
    assert all(f"jaxquant_{kernel}" in compiled[i] for kernel in kernels)
    instructions = re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", compiled[i])
    large = {
        (dtype, opcode)
        for dtype, shape, opcode in instructions
        if math.prod(int(n) for n in shape.split(",") if n) >= E * N * K
    }
    assert {dtype for dtype, _ in large} == {"f8e4m3fn"}
    assert {opcode for _, opcode in large} <= {"parameter", "bitcast", "get-tuple-element"}


def compile_all() -> list[str]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxquant.array import QuantizedArray
    from jaxquant.matmul import grouped_matmul

    sharding = h200()

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    w = QuantizedArray(
        shaped((L, E, N, K), jnp.float8_e4m3fn),
        shaped((L, E, N // 128, K // 128), jnp.float32),
        (128, 128),
        np.dtype(jnp.bfloat16),
    )

    def compile_rows(T):
        operands = shaped((T, K), jnp.bfloat16), w, shaped((E,), jnp.int32), shaped((), jnp.int32)
        product = jax.jit(lambda x, w, sizes, layer: grouped_matmul(x, w, sizes, layer=layer))
        return product.lower(*operands).compile().as_text()

    return [compile_rows(T) for T, _ in ROWS]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
