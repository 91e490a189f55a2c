"""Prefill and decode of a Llama-shaped model with random weights: FP8, BF16, and transformers.

    python benchmarks/model.py [--rows fp8 torch] [--shape 8b] [--batch 1 16 64] [--context 1024]
                               [--single-steps] [--save NAME]

Timed are the functions that generation runs: the prefill of a prompt, and steps of the decode loop
on the device (attention over the cache and the LM head included; greedy). FP8 runs with one stack
of layers, and the LM head, the cache and the attention of prompts in BF16 or, in rows of their own,
in FP8. BF16 runs with one stack per layer, since XLA copies the slice of a stack in front of a dot,
and, to show that, with one.
transformers runs the same model where it and PyTorch with CUDA are installed: SDPA attention, a
static cache of as many slots, decode steps as one CUDA graph or as `torch.compile` makes them.

Times are medians of the wall clock around a call of 64 steps, the first of them at `--context`;
with `--single-steps` around 64 calls of one step, as a serving loop makes them, ahead of the GPU. A
row has the GPU to itself, in a process of its own, with an empty compilation cache. The first
decode call is timed there, and again in another process, which finds the cache filled.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
# hidden and intermediate size, layers, heads, key/value heads, dims of a head, vocabulary.
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),  # Llama 3.1 8B
    "1b": (2048, 8192, 16, 16, 8, 128, 32768),
    "135m": (576, 1536, 30, 9, 3, 64, 49152),  # SmolLM2-135M
    "tiny": (256, 512, 2, 2, 1, 128, 512),
}
ROWS = {
    "fp8": "FP8 W8A8",
    "fp8-head": "FP8 W8A8, head too",
    "fp8-cache": "FP8 W8A8, head and cache too",
    "fp8-attention": "FP8 W8A8, head, cache and attention of prompts too",
    "torch": "transformers, BF16",
    "torch-compile": "transformers, BF16, compiled",
    "bf16": "BF16",
    "bf16-stacked": "BF16, one stack",
}
STEPS = 64
DECODES, PREFILLS = 5, 3
# After so many seconds a row is left as it is.
ROW_SECONDS = 300

# Starts what is timed: steps at a batch size, or the prefill of a prompt.
Start = Callable[[int], Callable[..., None]]


def llama(shape: str) -> dict[str, Any]:
    """config.json."""
    hidden, mlp, layers, heads, kv, dim, vocab = SHAPES[shape]
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "vocab_size": vocab,
        "max_position_embeddings": 65536,
    }


def cache_slots(context: int) -> int:
    """What a call's decode steps fill, and more."""
    return generation.bucket(context + STEPS)


# jaxquant ----------------------------------------------------------------------------------------


def build(shape: str, config: jq.QuantConfig | None, stacked: bool = True) -> Any:
    """The module with random weights, made on the device layer by layer; BF16 without a config."""
    hf = {"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, **llama(shape)}
    layers = range(hf["num_hidden_layers"])
    stacks = None if stacked else [Stack(range(l, l + 1)) for l in layers]
    model = Family(HFConfig(hf)).abstract_model(jnp.bfloat16, stacks)
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
    if len(shape) < 3:
        return jax.tree.map(lambda a: a[0], _random_stack(key[None], shape, config))
    return _random_stack(jax.random.split(key, shape[0]), shape[1:], config)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_stack(keys: Array, shape: tuple[int, ...], config: jq.QuantConfig | None):
    def one(key: Array):
        w = jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02)
        return jq.quantize(w, config) if config else w

    return jax.lax.map(one, keys)


def start_jaxquant(row: str, shape: str, context: int, single: bool) -> tuple[Start, Start, str]:
    config = jq.QuantConfig(quantize_head=row != "fp8") if "fp8" in row else None
    model = build(shape, config, stacked=row != "bf16")
    cache_dtype = "float8_e4m3fn" if row in ("fp8-cache", "fp8-attention") else None
    attention_dtype = "float8_e4m3fn" if row == "fp8-attention" else None

    def decode_singly(B: int) -> Callable[[int], None]:
        cache = model.empty_cache(B, cache_slots(context), cache_dtype)
        logits = jax.random.normal(jax.random.key(0), (B, model.cfg.vocab_size))

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def step(model: Any, logits: Array, cache: Any) -> tuple[Array, Any]:
            return model.decode(jnp.argmax(logits, axis=-1).astype(jnp.int32), cache)

        def run(steps: int) -> None:
            nonlocal logits, cache
            cache.lengths = jnp.full((B,), context, jnp.int32)
            for _ in range(steps):
                logits, cache = step(model, logits, cache)
            jax.block_until_ready(logits)

        return run

    def decode(B: int) -> Callable[[int], None]:
        knobs = generation._Knobs.of(generation.Sampling())
        stops = np.full(8, -1, np.int32)
        cache = model.empty_cache(B, cache_slots(context), cache_dtype)
        logits = jax.random.normal(jax.random.key(0), (B, model.cfg.vocab_size))
        none, zero = jnp.zeros(logits.shape, bool), jnp.zeros((), jnp.int32)
        state = generation._State(cache, logits, none, jnp.zeros(B, bool), zero)
        state = jax.block_until_ready(state)

        def run(steps: int) -> None:
            nonlocal state
            state.cache.lengths = jnp.full((B,), context, jnp.int32)
            state, out, _ = generation._decode(model, state, knobs, stops, steps)
            jax.block_until_ready(out)

        return run

    def prefill(T: int) -> Callable[[], None]:
        tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, T), np.int32)

        def run() -> None:
            lengths, done = np.full(1, T, np.int32), np.zeros(1, bool)
            dtypes = cache_dtype, attention_dtype
            state = generation._prefill(model, tokens, lengths, done, T, *dtypes)
            jax.block_until_ready(state.logits)

        return run

    steps = decode_singly if single else decode
    return steps, prefill, f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


# transformers ------------------------------------------------------------------------------------


def start_transformers(row: str, shape: str, context: int, _: bool) -> tuple[Start, Start, str]:
    import torch  # pyright: ignore
    import transformers  # pyright: ignore

    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda")
    config = transformers.LlamaConfig(
        **llama(shape), attn_implementation="sdpa", tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config).eval()

    def decode(B: int) -> Callable[[int], None]:
        cache = transformers.StaticCache(config, max_cache_len=cache_slots(context))
        heads, dim, on = config.num_key_value_heads, config.head_dim, torch.device("cuda")
        cache.early_initialization(B, heads, dim, dtype=torch.bfloat16, device=on)
        ids, options = torch.zeros(B, 1, dtype=torch.int64), {"past_key_values": cache}

        def greedy(ids):
            return model(ids, **options).logits[:, -1:].argmax(-1)

        if row == "torch-compile":
            greedy = torch.compile(greedy, mode="reduce-overhead", dynamic=False)

            def step():
                ids.copy_(greedy(ids))
        else:
            graph = None

            def step():
                nonlocal graph
                if graph is None:  # what is lazily set up must be before the capture
                    ids.copy_(greedy(ids))
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        ids.copy_(greedy(ids))
                graph.replay()

        def run(steps: int) -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)
            for _ in range(steps):
                step()
            torch.cuda.synchronize()

        return run

    def prefill(T: int) -> Callable[[], None]:
        tokens = torch.randint(0, config.vocab_size, (1, T))

        def run() -> None:
            cache = transformers.StaticCache(config, max_cache_len=T)
            model(tokens, past_key_values=cache, logits_to_keep=1)
            torch.cuda.synchronize()

        return run

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return decode, prefill, f"{torch.cuda.get_device_name()}, {versions}"


# The table ---------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Prints what is measured of one row as it comes, a line of JSON each."""

    def say(name: str, value: Any) -> None:
        print(json.dumps([name, value]), flush=True)

    by_torch = args.measure.startswith("torch")
    start = start_transformers if by_torch else start_jaxquant
    try:
        decode, prefill, on = start(args.measure, args.shape, args.context, args.single_steps)
    except ImportError as e:
        say("on", str(e))
        return
    say("on", on)
    decodes = [decode(args.batch[0])]
    say("first", seconds(lambda: decodes[0](1)))
    if args.first:
        return
    decodes += [decode(B) for B in args.batch[1:]]
    prefills = [prefill(T) for T in args.prefill]
    # First calls are compilation for the most part. PyTorch captures one graph at a time.
    calls = [*(functools.partial(run, 1) for run in decodes[1:]), *prefills]
    if by_torch:
        for call in calls:
            call()
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda call: call(), calls))
    for B, run in zip(args.batch, decodes, strict=True):
        call = functools.partial(run, STEPS)
        say(f"decode {B}", median(call, DECODES) / STEPS * 1e3)
    for T, call in zip(args.prefill, prefills, strict=True):
        say(f"prefill {T}", T / median(call, PREFILLS))


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(run: Callable[[], None], n: int) -> float:
    return float(np.median([seconds(run) for _ in range(n)]))


def apart(row: str, cache: str, *options: str) -> dict[str, Any]:
    """What another process prints of a row, or as much as it got to."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", row, *options]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    try:
        out = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, text=True, timeout=ROW_SECONDS
        ).stdout
    except subprocess.TimeoutExpired as e:
        out = (e.stdout or b"").decode()
    return dict(json.loads(line) for line in out.splitlines() if line.startswith("["))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument(
        "--single-steps", action="store_true", help="each decode step a call of its own"
    )
    parser.add_argument("--save", metavar="NAME", help="write NAME.md under benchmarks/results")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    head = [
        *(f"decode M={B} ms" for B in args.batch),
        *(f"prefill {T} tok/s" for T in args.prefill),
        "first decode call s",
        "again s",
    ]
    lines = [
        f"{datetime.date.today()}, Python {platform.python_version()}; {args.shape} shape, random "
        f"weights, context {args.context}",
        "",
        f"| weights | {' | '.join(head)} | on |",
        "|---" * (len(head) + 2) + "|",
    ]
    print("\n".join(lines), flush=True)
    columns = [
        *((f"decode {B}", ".2f") for B in args.batch),
        *((f"prefill {T}", ".0f") for T in args.prefill),
        ("first", ".1f"),
        ("again", ".1f"),
    ]
    for row in args.rows:
        with tempfile.TemporaryDirectory() as cache:
            found = apart(row, cache)
            if not row.startswith("torch"):
                found["again"] = apart(row, cache, "--first").get("first")
        cells = [format(found[c], spec) if found.get(c) else "" for c, spec in columns]
        lines.append(f"| {ROWS[row]} | {' | '.join(cells)} | {found.get('on', '')} |")
        print(lines[-1], flush=True)
        if args.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{args.save}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
