"""What the compiler makes of `fp8` for an H200: no copy of a weight, dequantized or moved."""

import json
import math
import re

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

HIDDEN, HEADS, HEAD_DIM, WIDE, LAYERS, EXPERTS = 640, 6, 128, 1152, 3, 4
# Every weight has more elements than this, and nothing else has.
SMALLEST_WEIGHT = HIDDEN * HEADS * HEAD_DIM
TOKENS = 24
PROGRAMS = ("unrolled", "scanned", "while", "heads of matrices", "changed")


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


def large(hlo: str) -> list[tuple[str, str]]:
    """(dtype, opcode) of each instruction whose result is as large as a weight."""
    instructions = re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", hlo)
    return [
        (dtype, opcode)
        for dtype, shape, opcode in instructions
        if math.prod(int(n) for n in shape.split(",") if n) >= SMALLEST_WEIGHT
    ]


@pytest.mark.parametrize("program", PROGRAMS[:-1])
def test_no_weight_is_dequantized_or_copied(compiled, program):
    hlo = compiled[program]
    assert "jaxquant_decode_fp8" in hlo
    found = large(hlo)
    assert {dtype for dtype, _ in found} == {"f8e4m3fn"}
    assert {opcode for _, opcode in found} <= {"parameter", "bitcast", "get-tuple-element"}


def test_a_program_that_dequantizes_is_seen(compiled):
    assert any(dtype in ("bf16", "f32") for dtype, _ in large(compiled["changed"]))


def compile_all() -> dict[str, str | None]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import jaxquant as jq

    sharding = h200()

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                HEADS, HIDDEN, HEADS * HEAD_DIM, use_bias=False, decode=False, rngs=rngs
            )
            self.up, self.gate, self.down = (
                nnx.Linear(*sizes, use_bias=False, rngs=rngs)
                for sizes in ((HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN))
            )

        def __call__(self, x):
            x = x + self.attention(self.norm(x)[None])[0]
            h = self.norm(x)
            return x + self.down(nnx.silu(self.gate(h)) * self.up(h))

    def layers(keys):
        return nnx.vmap(lambda key: Block(nnx.Rngs(key)))(keys)

    graph, stacked = nnx.split(layers(jax.random.split(jax.random.key(0), LAYERS)))
    rules = [
        jq.Rule("(query|key|value)/kernel", contracting=(-3,)),
        jq.Rule("out/kernel", contracting=(-3, -2)),
        "kernel",
    ]

    def quantize(params, rules=rules):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return jq.quantize_tree(params, rules=rules)[0]

    one = jax.tree.map(lambda x: x[0], stacked)
    heads = jnp.ones((LAYERS, HEADS, HIDDEN, HEAD_DIM))
    matrix = quantize({"w": heads}, [jq.Rule("w", transposed=True)])["w"]
    block = quantize(one)

    def unrolled(blocks, x):
        for state in blocks:
            x = nnx.merge(graph, state)(x)
        return x

    def scanned(stack, x):
        return jax.lax.scan(lambda x, state: (nnx.merge(graph, state)(x), None), x, stack)[0]

    def while_(state, x):
        def step(_, carry):
            state, x = carry
            return state, nnx.merge(graph, state)(x)

        return jax.lax.fori_loop(0, 3, step, (state, x))[1]

    def heads_of_matrices(w, x):
        return jax.lax.scan(lambda c, w: (c, jnp.einsum("tk,hkd->thd", x, w)), 0, w)[1]

    def changed(w, x):
        return jnp.einsum("tk,hkd->thd", x, w[0] + 1)

    x = jnp.ones((TOKENS, HIDDEN), jnp.bfloat16)
    programs = ((unrolled, [block] * LAYERS), (scanned, quantize(stacked)), (while_, block))
    programs += ((heads_of_matrices, matrix), (changed, matrix))

    def compile_one(fn, params):
        args = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (params, x)
        )
        return jax.jit(jq.fp8(fn)).lower(*args).compile().as_text()

    texts = (compile_one(fn, params) for fn, params in programs)
    return dict(zip(PROGRAMS, texts, strict=True))


if __name__ == "__main__":
    print(json.dumps(compile_all()))
