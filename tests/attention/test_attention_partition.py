"""Attention of heads that lie on several devices, under plain `jax.jit`.

The devices are CPUs, and XLA's attention stands in for the kernels; what is looked at is how
operands are cut, and what is communicated.
"""

import json
import os
import re

import pytest
from hopper import run_apart

# How sequences and heads lie, and what is divided
CASES = {
    "whole": ("-", "-", []),
    "heads": ("-", "x", ["heads"]),
    "heads on two axes": ("-", "z", ["heads"]),
    "sequences and heads": ("y", "x", ["sequences", "heads"]),
}


@pytest.fixture(scope="module")
def results():
    return run_apart(__file__)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cache", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("what", ["prompt", "token", "quantized token", "decode"])
def test_each_device_attends_with_its_own(results, what, cache, case):
    if f"{what} {cache} {case}" not in results:
        assert (what, cache) == ("decode", "float8_e4m3fn")  # which has no kernel
        return
    error, collectives, divided = results[f"{what} {cache} {case}"]
    assert error <= 2e-3  # sums round otherwise in other shapes
    # Quantized tokens are padded, and on every device.
    needed = what == "quantized token" and "sequences" in CASES[case][-1]
    assert collectives == (["all-gather"] if needed else [])
    assert divided == [name for name in CASES[case][-1] if not (needed and name == "sequences")]


def run_all() -> dict:
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from jaxquant.attention import (
        append_and_attend,
        cache,
        decode_attention,
        decode_fp8_sm90,
        decode_sm90,
        empty,
        mosaic_gpu,
        prefill,
        prefill_sm90,
        rotate_and_fill,
        xla,
    )
    from jaxquant.blocked import quantize_activations
    from jaxquant.matmul import QuantizedTokens

    B, T, Hq, H, S, D = 4, 128, 8, 4, 256, 128
    seen = {}

    def decode(q, k, v, layer, lengths, *, config, **options):
        seen["shape"] = k.shape[1:3]
        return xla.decode_attention(q, k, v, layer[0], lengths, **options)

    def append(qkv, k, v, layer, lengths, rotation, *, quantized, config, **options):
        seen["shape"] = cache.cache_shape(k)[1:3]
        attend = functools.partial(xla.decode_attention, **options)
        y, k, v = xla.append_and_attend(qkv, k, v, layer[0], lengths, rotation, attend=attend)
        if quantized:
            tokens, scale = quantize_activations(y.reshape(len(y), -1))
            y = QuantizedTokens(tokens, scale.T, (len(y),), y.dtype)
        # In references, as the kernels do.
        leaves, structure = jax.tree.flatten((k, v))
        k, v = structure.unflatten([jax.freeze(jax.new_ref(a)) for a in leaves])
        return y, k, v

    def fill(qkv, k, v, layer, rotation, inverses):
        seen["shape"] = cache.cache_shape(k)[1:3]
        H = cache.cache_shape(k)[2]
        q, new_k, new_v = jnp.split(qkv, [qkv.shape[2] - 2 * H, qkv.shape[2] - H], axis=2)
        q, new_k = (xla.rotate_halves(x, *rotation) for x in (q, new_k))
        k, v = (cache.fill(c, x.swapaxes(1, 2), layer[0]) for c, x in ((k, new_k), (v, new_v)))
        return (q, new_k, new_v), k, v

    for kernel in (decode_sm90, decode_fp8_sm90):
        kernel.append_and_attend = append
    decode_sm90.decode, prefill_sm90.rotate_and_fill = decode, fill
    for module in (mosaic_gpu, prefill):
        module.multiprocessors = lambda x, what: 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    def put(a, *spec):
        axes = {"-": None, "x": "x", "y": "y", "z": ("x", "y")}
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*(axes[c] for c in spec))))

    def prompt(q, k, v, caches, rotation, lengths):
        return rotate_and_fill(q, k, v, *caches, 1, rotation)

    def token(q, k, v, caches, rotation, lengths, quantized=False):
        qkv, rotation = tuple(x[:, 0] for x in (q, k, v)), tuple(x[:, 0] for x in rotation)
        return append_and_attend(qkv, *caches, 1, lengths, rotation, may_quantize=quantized)

    def decode_one(q, k, v, caches, rotation, lengths):
        return decode_attention(q[:, 0], *caches, 1, lengths)

    runs = {
        "prompt": prompt,
        "token": token,
        "quantized token": functools.partial(token, quantized=True),
        "decode": decode_one,
    }
    results = {}
    q, k, v = normal(B, T, Hq, D), normal(B, T, H, D), normal(B, T, H, D)
    angles = rng.standard_normal((B, T, D // 2)).astype(np.float32)
    rotation, lengths = (np.cos(angles), np.sin(angles)), np.asarray([5, 77, 256, 1], np.int32)
    for dtype in ("bfloat16", "float8_e4m3fn"):
        caches = [empty((2, B, H, S, D), dtype, values=values) for values in (False, True)]
        caches = [cache.fill(c, normal(B, H, S, D), 1) for c in caches]
        for case, (b, h, _) in CASES.items():
            jax.clear_caches()  # what is traced already would not be seen
            args = (
                *(put(x, b, "-", h) for x in (q, k, v)),
                jax.tree.map(lambda a, b=b, h=h: put(a, "-", b, h), caches),
                *jax.tree.map(lambda a, b=b: put(a, b), (rotation, lengths)),
            )
            for name, run in runs.items():
                if (name, dtype) == ("decode", "float8_e4m3fn"):
                    continue
                compiled = jax.jit(run).lower(*args).compile()
                shape, text = seen["shape"], compiled.as_text() or ""
                got = compiled(*args)
                expected = run(*jax.tree.map(np.asarray, args))
                pairs = (
                    [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(result)]
                    for result in (got, expected)
                )
                error = max(
                    float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-9))
                    for x, y in zip(*pairs, strict=True)
                )
                names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
                found = [n for n in names if re.search(rf" {n}(-start)?\(", text)]
                sizes = zip(("sequences", "heads"), shape, (B, H), strict=True)
                divided = [what for what, n, whole in sizes if n < whole]
                results[f"{name} {dtype} {case}"] = error, found, divided
    return results


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    print(json.dumps(run_all()))
