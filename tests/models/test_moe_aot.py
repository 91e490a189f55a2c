"""A layer of experts compiles for an H200; see `tests/hopper.py`."""

import json
import re

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

TOKENS = [1, 512]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize("i", range(len(TOKENS)))
def test_experts_are_two_products_and_their_quantization(compiled, i):
    kernels = re.findall(r"jaxquant_(\w+?)_mosaic_gpu", compiled[i])
    assert kernels.count("grouped_fp8") == 2
    assert sum(kernel.startswith("quantize") for kernel in kernels) == 2
    assert " while(" not in compiled[i]


def compile_all() -> list[str]:
    import types
    from typing import Any

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxquant.array import QuantizedArray
    from jaxquant.models.layers import Stack
    from jaxquant.models.moe import MoE, Routing

    L, E, H, W = 2, 16, 2048, 768
    sharding = h200()
    config: Any = types.SimpleNamespace(
        routing=Routing(E, 8), hidden_size=H, moe_intermediate_size=W, correction=False
    )
    definition, state = nnx.split(MoE(config, Stack(range(L)), jnp.bfloat16))

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def quantized(leaf):
        if len(leaf.shape) != 4:  # the router
            return shaped(leaf.shape, leaf.dtype)
        *lead, N, K = leaf.shape
        qvalue = shaped(leaf.shape, jnp.float8_e4m3fn)
        scale = shaped((*lead, N // 128, K // 128), jnp.float32)
        return QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))

    state = jax.tree.map(quantized, state)
    run = jax.jit(lambda state, x, l: nnx.merge(definition, state)(x, l))
    layer = shaped((), jnp.int32)
    return [
        run.lower(state, shaped((1, T, H), jnp.bfloat16), layer).compile().as_text() for T in TOKENS
    ]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
