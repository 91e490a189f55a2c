"""Products with experts compile for an H200, as one kernel; see `tests/hopper.py`."""

import json
import math
import re

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

L, E, N, K = 2, 16, 1536, 4096
ROWS = [1, 8, 128, 512, 4096]
# Of tokens that go to 8 experts each: loaded at once, tile by tile, and written to their places.
TOKENS = [1, 100, 512]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_experts_are_read_in_place(compiled, i):
    assert "jaxquant_grouped_fp8" in compiled[i]
    assert " while(" not in compiled[i]
    instructions = re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", compiled[i])
    large = {
        (dtype, opcode)
        for dtype, shape, opcode in instructions
        if math.prod(int(n) for n in shape.split(",") if n) >= E * N * K
    }
    assert {dtype for dtype, _ in large} == {"f8e4m3fn"}
    assert {opcode for _, opcode in large} <= {"parameter", "bitcast", "get-tuple-element"}


@pytest.mark.parametrize("i", range(len(TOKENS)))
def test_tokens_are_gathered_by_the_kernels(compiled, i):
    text = compiled[len(ROWS) + i]
    assert "jaxquant_grouped_fp8" in text
    assert " gather(" not in text


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

    def compile_tokens(S):
        order = shaped((S * 8,), jnp.int32), shaped((S, 8), jnp.int32)
        operands = shaped((S, K), jnp.bfloat16), w, shaped((E,), jnp.int32), shaped((), jnp.int32)

        def product(x, w, sizes, layer, rows, places):
            return grouped_matmul(x, w, sizes, rows=rows, places=places, layer=layer)

        return jax.jit(product).lower(*operands, *order).compile().as_text()

    return [compile_rows(T) for T in ROWS] + [compile_tokens(S) for S in TOKENS]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
