"""The decode attention kernels compile for an H200; see `tests/hopper.py`."""

import json
import re

import pytest
from hopper import h200, in_place_in_fusions, needs_plugin, run_apart

pytestmark = needs_plugin

# B, H, G, S, D, window, softcap
SHAPES = [
    (1, 8, 4, 1536, 128, None, None),  # in clusters of 8
    (1, 8, 4, 32768, 128, None, None),  # in larger tiles
    (64, 8, 4, 1536, 128, None, None),
    (3, 32, 1, 1000, 64, 100, None),
    (2, 4, 5, 1000, 80, None, None),
    (2, 32, 1, 4096, 96, 2048, None),
    (1, 4, 2, 4096, 256, 1024, 50.0),
    (1, 1, 64, 4096, 128, None, None),
    (1, 1, 64, 4096, 256, None, None),
]
APPENDS = [
    (1, 8, 4, 1536, 128, None, None),
    (64, 8, 4, 1536, 128, None, None),
    (1, 4, 2, 4096, 256, 1024, 50.0),
    (3, 32, 1, 1000, 64, 100, None),
    (1, 2, 16, 4096, 128, None, None),
]


FP8_APPENDS = [
    (1, 8, 4, 1536, 128, None, None),
    (64, 8, 4, 1536, 128, None, None),
    (1, 4, 2, 4096, 256, 1024, 50.0),
    (3, 32, 1, 1024, 64, 100, None),
    (1, 8, 64, 4096, 128, None, None),
    (1, 8, 64, 4096, 256, None, None),
]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize(("shape", "i"), [(s, i) for i, s in enumerate(SHAPES)])
def test_attention_compiles_and_copies_no_cache(compiled, shape, i):
    assert "jaxquant_decode_attention" in compiled[i]
    B, H, _, S, D, *_ = shape
    assert f"bf16[{B},{H},{S},{D}]" not in compiled[i]
    assert not [line for line in compiled[i].splitlines() if "copy(" in line]


ALL_APPENDS = APPENDS + FP8_APPENDS


@pytest.mark.parametrize(("shape", "i"), [(s, i) for i, s in enumerate(ALL_APPENDS, len(SHAPES))])
def test_an_append_compiles_and_is_one_kernel(compiled, shape, i):
    launches = re.findall(r"= .+? (fusion|custom-call|copy|scatter)\(", compiled[i])
    # Over FP8 the token; over BF16 two tables, which layers have in common.
    rotated_ahead = 0 if shape[4] % 128 == 0 else 1 if shape in FP8_APPENDS else 2
    heads_dropped = shape[2] == 64  # which were computed as 72
    assert launches == ["fusion"] * rotated_ahead + ["custom-call"] + ["fusion"] * heads_dropped
    assert "output_to_operand_aliasing={{" in compiled[i]


@pytest.mark.parametrize("i", [-2, -1])
def test_a_scan_over_caches_does_not_make_part_of_a_fusion_of_an_append(compiled, i):
    assert not in_place_in_fusions(compiled[i])


def compile_all() -> list[str | None]:
    import jax
    import jax.numpy as jnp

    from jaxquant.attention import append_and_attend, decode_attention
    from jaxquant.attention.cache import quantize_keys, quantize_values

    sharding = h200()

    def compile_shape(B, H, G, S, D, window, softcap):
        def attend(q, k, v, layer, lengths):
            return decode_attention(
                q, k, v, layer, lengths, window=window, softcap=softcap, implementation="mosaic_gpu"
            )

        cache = (2, B, H, S, D), jnp.bfloat16
        operands = [((B, H * G, D), jnp.bfloat16), cache, cache, ((), "int32"), ((B,), "int32")]
        args = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        return jax.jit(attend).lower(*args).compile().as_text()

    def compile_append(B, H, G, S, D, window, softcap, fp8=False):
        def append(qkv, k, v, layer, lengths, rotation):
            return append_and_attend(
                qkv,
                k,
                v,
                layer,
                lengths,
                rotation,
                window=window,
                softcap=softcap,
                implementation="mosaic_gpu",
            )

        cache, table = ((2, B, H, S, D), jnp.bfloat16), ((B, D // 2), jnp.float32)
        operands = [((B, H * (G + 2), D), jnp.bfloat16), cache, cache, ((), "int32")]
        operands += [((B,), "int32"), table, table]
        *args, cos, sin = [jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands]
        if fp8:
            args[1:3] = (
                jax.tree.map(
                    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
                    jax.eval_shape(quantize, a),
                )
                for quantize, a in zip((quantize_keys, quantize_values), args[1:3], strict=True)
            )
        run = jax.jit(append, donate_argnums=(1, 2))
        return run.lower(*args, (cos, sin)).compile().as_text()

    def compile_scan(fp8):
        """Each layer's cache is a slice, and so is what a step gives of it."""

        def scan(rotation, *layers):
            def step(_, of_layer):
                qkv, k, v, lengths = of_layer
                k, v = (jax.tree.map(lambda a: a[None], c) for c in (k, v))
                return None, append_and_attend(
                    qkv, k, v, 0, lengths, rotation, implementation="mosaic_gpu"
                )

            return jax.lax.scan(step, None, layers)

        def caches():
            k = v = jnp.zeros((3, 1, 2, 2, 256, 128), jnp.bfloat16)
            return (jax.vmap(quantize_keys)(k), jax.vmap(quantize_values)(v)) if fp8 else (k, v)

        k, v = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((a.shape[0], *a.shape[2:]), a.dtype, sharding=sharding),
            jax.eval_shape(caches),
        )
        operands = ((3, 2, 8, 128), jnp.bfloat16), ((3, 2), "int32"), ((2, 64), jnp.float32)
        qkv, lengths, table = (jax.ShapeDtypeStruct(*o, sharding=sharding) for o in operands)
        return jax.jit(scan).lower((table, table), qkv, k, v, lengths).compile().as_text()

    texts = [compile_shape(*s) for s in SHAPES] + [compile_append(*s) for s in APPENDS]
    texts += [compile_append(*s, fp8=True) for s in FP8_APPENDS]
    return texts + [compile_scan(fp8) for fp8 in (False, True)]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
