"""The prefill kernel and cuDNN's FP8 attention compile for an H200; see `tests/hopper.py`."""

import json
import re

import pytest
from hopper import h200, in_place_in_fusions, needs_plugin, run_apart

pytestmark = needs_plugin

# B, T, Hq, H, D, S, FP8 cache, FP8 attention
SHAPES = [
    (1, 8192, 32, 8, 128, 8192, True, False),
    (1, 8192, 32, 8, 128, 8192, True, True),
    (1, 8192, 32, 8, 128, 8192, False, False),
    (2, 256, 9, 3, 64, 392, False, True),
    (3, 128, 5, 1, 256, 384, True, False),
]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


def launches(hlo: str) -> list[str]:
    return re.findall(r"= .+? (fusion|custom-call|copy|transpose)\(", hlo)


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_all_that_stands_before_attention_is_one_kernel(compiled, i):
    assert "jaxquant_rotate_and_fill" in compiled[i]
    assert launches(compiled[i]) == ["custom-call"]
    assert "output_to_operand_aliasing={{" in compiled[i]


def test_attention_in_fp8_is_cudnns(compiled):
    assert launches(compiled[-1]) == ["custom-call"]
    assert "__cudnn$fmhaSoftmaxF8" in compiled[-1]


def test_units_of_fp8_are_two_kernels(compiled):
    assert launches(compiled[-2]) == ["custom-call"] * 2


def test_a_vmap_does_not_make_part_of_a_fusion_of_the_kernel(compiled):
    assert not in_place_in_fusions(compiled[len(SHAPES)])


def compile_all() -> list[str | None]:
    import jax
    import jax.numpy as jnp
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from jaxquant.attention import fp8, prefill
    from jaxquant.attention.cache import FP8, empty

    sharding = h200()

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def split(qkv, B, T, Hq, H, D):
        heads = jnp.split(qkv, [Hq * D, (Hq + H) * D], axis=-1)
        return [x.reshape(B, T, -1, D) for x in heads]

    def compile_fill(B, T, Hq, H, D, S, fp8_cache, in_fp8):
        def run(qkv, k, v, layer, rotation, units):
            return prefill._kernel(*split(qkv, B, T, Hq, H, D), k, v, layer, rotation, units)

        def caches():
            dtype = FP8 if fp8_cache else jnp.bfloat16
            return [empty((2, B, H, S, D), dtype, values=values) for values in (False, True)]

        stacks = jax.tree.map(lambda a: shaped(a.shape, a.dtype), jax.eval_shape(caches))
        qkv, table = shaped((B, T, (Hq + 2 * H) * D), "bfloat16"), shaped((B, T, D // 2), "float32")
        units = (shaped((), "float32"),) * 3 if in_fp8 else None
        args = qkv, *stacks, shaped((), "int32"), (table, table), units
        return jax.jit(run, donate_argnums=(1, 2)).lower(*args).compile().as_text()

    def compile_vmap():
        cache = [empty((2, 1, 1, 128, 64), FP8, values=values) for values in (False, True)]
        q, k = shaped((3, 1, 128, 2, 64), "bfloat16"), shaped((3, 1, 128, 1, 64), "bfloat16")
        table = shaped((1, 128, 32), "float32")

        def run(q, k, v, table):
            def one(q, k, v):
                return prefill._kernel(q, k, v, *cache, jnp.int32(1), (table, table), None)

            return jax.vmap(one)(q, k, v)

        return jax.jit(run).lower(q, k, k, table).compile().as_text()

    def compile_units(B, T, Hq, H, D):
        def run(qkv):
            return fp8._units_by_kernel(*split(qkv, B, T, Hq, H, D), 1.0)

        return jax.jit(run).lower(shaped((B, T, (Hq + 2 * H) * D), "bfloat16")).compile().as_text()

    def compile_attention(B, T, Hq, H, D):
        # The library itself is not asked for anything before it runs.
        cudnn.check_cudnn_version = lambda: 91000
        heads = [shaped((B, T, n, D), FP8) for n in (Hq, H, H)]
        options = {"scale": 0.1, "window": None, "softcap": None}
        run = jax.jit(lambda *args: fp8._cudnn(*args, **options))
        return run.lower(*heads, (shaped((), "float32"),) * 3).compile().as_text()

    return [
        *(compile_fill(*s) for s in SHAPES),
        compile_vmap(),
        compile_units(1, 8192, 32, 8, 128),
        compile_attention(1, 256, 8, 2, 128),
    ]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
