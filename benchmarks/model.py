"""Prefill and decode of a Llama-shaped model with random weights, in BF16 and in FP8.

    python benchmarks/model.py [--shape 8b] [--batch 1 16 64] [--context 1024] [--save NAME]

Timed are the functions that generation runs: the prefill of a prompt, and steps of the decode
loop on the device (attention over the cache and the LM head included; greedy). BF16 runs with one
stack per layer, since XLA copies the slice of a stack in front of a dot; FP8 runs with one stack,
and the LM head in BF16 or, in a row of its own, in FP8.
Times are medians of the wall clock around a call of many steps; the first call is compile time.
"""

import argparse
import datetime
import functools
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxquant as jq
from jaxquant import generation
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import Stack
from jaxquant.models.registry import Family
from jaxquant.tree import path_name

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "8b": {"hidden": 4096, "mlp": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256},
    "1b": {"hidden": 2048, "mlp": 8192, "layers": 16, "heads": 16, "kv": 8, "vocab": 32768},
    "tiny": {"hidden": 256, "mlp": 512, "layers": 2, "heads": 2, "kv": 1, "vocab": 512},
}
STEPS = 64


def build(shape: str, config: jq.QuantConfig | None):
    """The module with random weights, made on the device layer by layer; BF16 without a config."""
    s = SHAPES[shape]
    family = Family(
        HFConfig(
            {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": s["hidden"],
                "intermediate_size": s["mlp"],
                "num_hidden_layers": s["layers"],
                "num_attention_heads": s["heads"],
                "num_key_value_heads": s["kv"],
                "head_dim": 128,
                "vocab_size": s["vocab"],
                "max_position_embeddings": 65536,
                "rope_theta": 500000.0,
            }
        )
    )
    stacks = None if config else [Stack(range(l, l + 1)) for l in range(s["layers"])]
    model = family.abstract_model(jnp.bfloat16, stacks)
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    values = []
    for number, (path, leaf) in enumerate(leaves):
        name, key = path_name(path), jax.random.key(number)
        values.append(_random(key, leaf.shape, "norm" in name, _config(name, config)))
    return jax.block_until_ready(jax.tree_util.tree_unflatten(structure, values))


def _config(name: str, config: jq.QuantConfig | None) -> jq.QuantConfig | None:
    quantized = "_proj" in name or (config and config.quantize_head and "lm_head" in name)
    return config if quantized else None


def _random(key: Array, shape: tuple[int, ...], ones: bool, config: jq.QuantConfig | None):
    if ones:
        return jnp.ones(shape, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=1)
    def make(keys: Array, shape: tuple[int, ...]):
        def one(key: Array):
            w = jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02)
            return jq.quantize(w, config) if config else w

        return jax.lax.map(one, keys)

    if len(shape) < 3:
        return jax.tree.map(lambda a: a[0], make(key[None], shape))
    return make(jax.random.split(key, shape[0]), shape[1:])


def median(run, n: int) -> float:
    times = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def time_decode(model, B: int, context: int, cache_dtype=None) -> tuple[float, float]:
    """Milliseconds per step, and seconds of the first call."""
    knobs = generation._Knobs.of(generation.Sampling())
    stops = np.full(8, -1, np.int32)
    cache = model.empty_cache(B, generation.bucket(context + 8 * STEPS), cache_dtype)
    cache.lengths = jnp.full((B,), context, jnp.int32)
    logits = jax.random.normal(jax.random.key(0), (B, model.cfg.vocab_size))
    state = generation._State(
        cache, logits, jnp.zeros(logits.shape, bool), jnp.zeros(B, bool), jnp.zeros((), jnp.int32)
    )

    def run(n: int) -> None:
        nonlocal state
        state, out, _ = generation._decode(model, state, knobs, stops, n)
        jax.block_until_ready(out)

    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    return median(lambda: run(STEPS), 5) / STEPS * 1e3, first


def time_prefill(model, T: int, cache_dtype=None) -> float:
    """Tokens per second of one prompt of T tokens."""
    tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, T)).astype(np.int32)

    def run() -> None:
        cache = model.empty_cache(1, T, cache_dtype)
        lengths, done = np.full(1, T, np.int32), np.zeros(1, bool)
        jax.block_until_ready(generation._prefill(model, tokens, lengths, done, cache).logits)

    run()
    return T / median(run, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--save", metavar="NAME", help="write NAME.md under benchmarks/results")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    head = [
        *(f"decode M={B} ms" for B in args.batch),
        *(f"prefill {T} tok/s" for T in args.prefill),
    ]
    lines = [
        f"{datetime.date.today()}, {device}, jax {jax.__version__}, Python "
        f"{platform.python_version()}; {args.shape} shape, random weights, context {args.context}",
        "",
        f"| weights | {' | '.join(head)} | first decode call s |",
        "|---" * (len(head) + 2) + "|",
    ]
    configs = {
        "BF16": None,
        "FP8 W8A8": jq.QuantConfig(),
        "FP8 W8A8, head too": jq.QuantConfig(quantize_head=True),
        "FP8 W8A8, cache too": jq.QuantConfig(),
    }
    print("\n".join(lines), flush=True)
    for name, config in configs.items():
        model = build(args.shape, config)
        cache_dtype = "float8_e4m3fn" if "cache" in name else None
        decode = [time_decode(model, B, args.context, cache_dtype) for B in args.batch]
        prefill = [time_prefill(model, T, cache_dtype) for T in args.prefill]
        cells = [*(f"{ms:.2f}" for ms, _ in decode), *(f"{rate:.0f}" for rate in prefill)]
        lines.append(f"| {name} | {' | '.join(cells)} | {decode[0][1]:.1f} |")
        print(lines[-1], flush=True)
        del model
        if args.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{args.save}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
