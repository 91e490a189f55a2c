"""What the compiler makes of a Llama for an H200: which kernels run, and no copies of the large."""

import json
import math
import re

import pytest
from hopper import h200, llama, needs_plugin, quantized, run_apart

pytestmark = needs_plugin

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, SLOTS = 1024, 2816, 8, 2, 128, 6, 512, 512
CACHE = rf"(?:bf16|f8e4m3fn)\[{LAYERS},\d+,{KV_HEADS},{SLOTS},{HEAD_DIM}\]"
PROGRAMS = ["decode 1", "decode 16", "prefill", "decode 16, FP8 cache", "prefill, FP8 cache"]
# The keys of one sequence, less than any stack of weights; activations are smaller.
LARGE = LAYERS * KV_HEADS * SLOTS * HEAD_DIM


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


def kernels(hlo: str) -> dict[str, int]:
    """The package's kernels, and how often each stands in the program."""
    names = re.findall(r"custom-call\([^\n]*?(jaxquant_\w+)", hlo)
    return {name: names.count(name) for name in sorted(set(names))}


def test_a_decode_step_of_one_token_is_five_products_and_attention(compiled):
    assert kernels(compiled["decode 1"]) == {
        "jaxquant_decode_attention": 1,
        "jaxquant_gemv_fp8": 5,
    }


@pytest.mark.parametrize(
    ("program", "attention"),
    [("decode 16", "decode_attention"), ("decode 16, FP8 cache", "decode_attention_fp8")],
)
def test_attention_and_the_gate_leave_several_tokens_quantized(compiled, program, attention):
    assert kernels(compiled[program]) == {
        f"jaxquant_{attention}": 1,
        "jaxquant_decode_fp8": 5,
        "jaxquant_quantize_normalized": 3,
    }


def test_layers_of_a_decode_step_are_five_launches_and_numbered_together(compiled):
    (body,) = (
        part
        for part in re.split(r"\n(?=%|ENTRY)", compiled["decode 1, two layers in a turn"])
        if "jaxquant_decode_attention" in part
    )
    launches = re.findall(r"= .+? (?:fusion|custom-call|copy|scatter|dot|reduce)\(", body)
    # Four products and attention, twice; the layers' numbers, and two counters of turns.
    assert len(launches) == 2 * 5 + 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_stack_of_weights_and_no_cache_is_copied(compiled, program):
    instructions = re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", compiled[program])
    large = {
        (dtype, opcode)
        for dtype, shape, opcode in instructions
        if math.prod(int(n) for n in shape.split(",") if n) >= LARGE
    }
    assert {opcode for dtype, opcode in large if dtype == "f8e4m3fn"} <= {
        "parameter", "bitcast", "get-tuple-element"
    }  # fmt: skip
    # A cache in another layout than the program's would be transposed, there and back.
    layouts = set(re.findall(CACHE + r"{([\d,]*)}", compiled[program]))
    assert layouts == {"4,3,2,1,0"}
    assert "copy" not in {opcode for _, opcode in large}


@pytest.mark.parametrize("program", ["prefill", "prefill, FP8 cache"])
def test_a_prefill_writes_the_cache_in_its_own_layout(compiled, program):
    transposed = re.findall(r"= \w+\[([\d,]*)\]\S* transpose\(", compiled[program])
    assert LARGE not in [math.prod(map(int, shape.split(","))) for shape in transposed]


@pytest.mark.parametrize("program", ["new cache", "new FP8 cache"])
def test_a_prompt_has_zeros_only_behind_it(compiled, program):
    text = compiled[f"prefill, {program}"]
    buffers = re.findall(r"= (\S+) custom-call\(\)[^\n]*AllocateBuffer", text)
    assert len(buffers) == (4 if "FP8" in program else 2)
    made = re.findall(r"= \w+\[([\d,]*)\]\S* (?:broadcast|copy)\(", text)
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in made]
    assert LARGE * LAYERS not in sizes


def compile_all() -> dict[str, str]:
    import jax
    import jax.numpy as jnp

    from jaxquant.models import decoder
    from jaxquant.models.attention import Cache
    from jaxquant.models.layers import Stack

    sharding = h200()
    heads = HEADS, KV_HEADS, HEAD_DIM
    family = llama(HIDDEN, WIDE, LAYERS, heads, VOCAB, SLOTS)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def parameter(path, leaf):
        if not re.search("_proj|lm_head", jax.tree_util.keystr(path)):
            return shaped(leaf.shape, leaf.dtype)
        return quantized(leaf, shaped)

    model = family.abstract_model(jnp.bfloat16, [Stack(range(LAYERS), row_alignment=128)])
    model = jax.tree_util.tree_map_with_path(parameter, model)

    def cache(B):
        kv = shaped((LAYERS, B, KV_HEADS, SLOTS, HEAD_DIM), jnp.bfloat16)
        return Cache(kv, kv, shaped((B,), jnp.int32))

    def fp8_cache(B):
        empty = jax.eval_shape(lambda: model.empty_cache(B, SLOTS, jnp.float8_e4m3fn))
        return jax.tree.map(lambda a: shaped(a.shape, a.dtype), empty)

    def text(run, *args):
        return jax.jit(run, donate_argnums=len(args) - 1).lower(*args).compile().as_text()

    def decode(model, tokens, cache):
        return model.decode(tokens, cache)

    def prefill(model, tokens, lengths, cache):
        return model.prefill(tokens, lengths, cache)

    def prefill_new(model, tokens, lengths, dtype):
        cache = model.empty_cache(1, SLOTS, dtype, tokens.shape[1])
        return model.prefill(tokens, lengths, cache)

    def decode_in_turns(model, tokens, cache):
        decoder._unrolled = lambda devices: 2
        logits = model.decode(tokens, cache)
        decoder._unrolled = lambda devices: 1
        return logits

    return {
        "decode 1, two layers in a turn": text(
            decode_in_turns, model, shaped((1,), jnp.int32), cache(1)
        ),
        **{f"decode {B}": text(decode, model, shaped((B,), jnp.int32), cache(B)) for B in (1, 16)},
        "decode 16, FP8 cache": text(decode, model, shaped((16,), jnp.int32), fp8_cache(16)),
        **{
            name: text(prefill, model, shaped((1, 256), jnp.int32), shaped((1,), jnp.int32), cache)
            for name, cache in (("prefill", cache(1)), ("prefill, FP8 cache", fp8_cache(1)))
        },
        **{
            f"prefill, {name}": jax.jit(prefill_new, static_argnums=3)
            .lower(model, shaped((1, 256), jnp.int32), shaped((1,), jnp.int32), dtype)
            .compile()
            .as_text()
            for name, dtype in (("new cache", None), ("new FP8 cache", "float8_e4m3fn"))
        },
    }


if __name__ == "__main__":
    print(json.dumps(compile_all()))
