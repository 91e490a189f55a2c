"""What the compiler makes of a Llama on two H200s: the kernels of one, and two sums a layer."""

import json
import re

import pytest
from hopper import h200s, llama, needs_plugin, quantized, run_apart

pytestmark = needs_plugin

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, SLOTS = (
    4096,
    14336,
    16,
    4,
    128,
    2,
    512,
    2048,
)
DEVICES = 2
COLLECTIVE = "(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"

KERNELS = {
    "decode 1": {"decode_attention": 1, "gemv_fp8": 4},
    "decode 16, FP8 cache": {"decode_attention_fp8": 1, "decode_fp8": 4, "quantize_normalized": 2},
    "prefill, FP8 cache": {
        "gemm_fp8": 4,
        "quantize_normalized": 2,
        "quantize_tokens": 1,
        "rotate_and_fill": 1,
    },
}


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize("program", KERNELS)
def test_each_device_runs_the_kernels_of_one(compiled, program):
    names = re.findall(r"custom-call\([^\n]*?jaxquant_(\w+)", compiled[program])
    names = [re.sub(r"_\d+$", "", name) for name in names]  # jax 0.11 numbers them
    assert {name: names.count(name) for name in sorted(names)} == KERNELS[program]


@pytest.mark.parametrize("program", KERNELS)
def test_a_layer_sums_twice_and_moves_nothing_else(compiled, program):
    found = re.findall(rf" {COLLECTIVE}(?:-start)?\(", compiled[program])
    assert found == ["all-reduce"] * 3  # and once the rows of the embedding


@pytest.mark.parametrize("program", KERNELS)
def test_no_device_has_all_heads_or_all_of_a_weight(compiled, program):
    shapes = re.findall(r"f8e4m3fn\[([\d,]+)\]", compiled[program])
    assert f"{LAYERS},{2 * WIDE},{HIDDEN}" not in shapes
    assert f"{LAYERS},{2 * WIDE // DEVICES},{HIDDEN}" in shapes
    caches = re.findall(rf"\[{LAYERS},\d+,(\d+),{SLOTS},{HEAD_DIM}\]", compiled[program])
    assert set(caches) == {str(KV_HEADS // DEVICES)}


def compile_all() -> dict[str, str | None]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxquant.models.layers import Stack

    mesh = h200s(DEVICES)
    heads = HEADS, KV_HEADS, HEAD_DIM
    family = llama(HIDDEN, WIDE, LAYERS, heads, VOCAB, SLOTS)

    def shaped(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    def parameter(path, leaf):
        name = jax.tree_util.keystr(path)
        if "_proj" not in name:
            return shaped(
                leaf.shape, leaf.dtype, *(["x"] if leaf.ndim == 2 and "norm" not in name else [])
            )
        spec = (None, None, "x") if re.search("o_proj|down_proj", name) else (None, "x")
        return quantized(leaf, lambda shape, dtype: shaped(shape, dtype, *spec))

    stack = Stack(range(LAYERS), row_alignment=128, groups=DEVICES)
    model = family.abstract_model(jnp.bfloat16, [stack])
    model = jax.tree_util.tree_map_with_path(parameter, model)

    def cache(B, dtype=None):
        empty = jax.eval_shape(lambda: model.empty_cache(B, SLOTS, dtype))
        return jax.tree.map(
            lambda a: shaped(a.shape, a.dtype, *([None, None, "x"] if a.ndim > 2 else [])), empty
        )

    def text(run, *args):
        return jax.jit(run, donate_argnums=len(args) - 1).lower(*args).compile().as_text()

    def decode(model, tokens, cache):
        return model.decode(tokens, cache)

    def prefill(model, tokens, lengths, cache):
        return model.prefill(tokens, lengths, cache)

    def numbers(*shape):
        return shaped(shape, jnp.int32)

    return {
        "decode 1": text(decode, model, numbers(1), cache(1)),
        "decode 16, FP8 cache": text(decode, model, numbers(16), cache(16, jnp.float8_e4m3fn)),
        "prefill, FP8 cache": text(
            prefill, model, numbers(1, SLOTS), numbers(1), cache(1, jnp.float8_e4m3fn)
        ),
    }


if __name__ == "__main__":
    print(json.dumps(compile_all()))
