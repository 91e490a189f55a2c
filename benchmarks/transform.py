"""A transformer in plain `nnx.Linear`, run on FP8 weights through `jq.fp8`.

    python benchmarks/transform.py [--shape 8b] [--form unrolled] [--batch 1 16] [--prefill 2048]

The model below knows nothing of quantization. Three programs are timed, which differ in their
linear layers: BF16 as it is; `jq.fp8` of the same function on FP8 weights; and the same code with
each linear layer written as a call of `jq.matmul`, on the same weights. A decode step attends to a
static cache and picks the likeliest token; steps run in a loop on the device. Times are medians of
the wall clock; "trace" is `jax.jit(...).trace`, "compile" what follows until the program can run.
"""

import argparse
import dataclasses
import datetime
import functools
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "8b": {"hidden": 4096, "mlp": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256},
    "1b": {"hidden": 2048, "mlp": 8192, "layers": 16, "heads": 16, "kv": 8, "vocab": 32768},
    "tiny": {"hidden": 256, "mlp": 512, "layers": 2, "heads": 2, "kv": 1, "vocab": 512},
}
HEAD_DIM = 128
STEPS, REPEATS = 16, 5
BF16: Any = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


# The model ----------------------------------------------------------------------------------------


def rope(x, positions):
    angle = positions[:, None] / 500000.0 ** (jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, s, linear, rngs):
        linear = functools.partial(linear, use_bias=False, rngs=rngs, **BF16)
        hidden, q, kv = s["hidden"], s["heads"] * HEAD_DIM, s["kv"] * HEAD_DIM
        self.attention_norm = nnx.RMSNorm(hidden, rngs=rngs, **BF16)
        self.q_proj, self.o_proj = linear(hidden, q), linear(q, hidden)
        self.k_proj, self.v_proj = linear(hidden, kv), linear(hidden, kv)
        self.mlp_norm = nnx.RMSNorm(hidden, rngs=rngs, **BF16)
        self.gate_proj, self.up_proj = linear(hidden, s["mlp"]), linear(hidden, s["mlp"])
        self.down_proj = linear(s["mlp"], hidden)

    def __call__(self, x, cache, start):
        positions = start + jnp.arange(x.shape[1])
        h = self.attention_norm(x)
        q, k, v = (
            proj(h).reshape(*x.shape[:2], -1, HEAD_DIM)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        new = jnp.stack([rope(k, positions), v])
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=2)
        seen = jnp.arange(cache.shape[2]) <= positions[:, None]
        y = jax.nn.dot_product_attention(rope(q, positions), *cache, mask=seen[None, None])
        x = x + self.o_proj(y.reshape(*x.shape[:2], -1))
        h = self.mlp_norm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h)), cache


class Ends(nnx.Module):
    """What stands around the blocks."""

    def __init__(self, s, rngs):
        self.embed = nnx.Embed(s["vocab"], s["hidden"], rngs=rngs, **BF16)
        self.norm = nnx.RMSNorm(s["hidden"], rngs=rngs, **BF16)
        self.lm_head = nnx.Linear(s["hidden"], s["vocab"], use_bias=False, rngs=rngs, **BF16)


def abstract(module, *args):
    """Structure and shapes of a module."""
    return nnx.split(nnx.eval_shape(lambda: module(*args, nnx.Rngs(0))))


def at(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def make_forward(s, linear=nnx.Linear, at=at):
    """A function from parameters, tokens, caches and a position to logits and caches."""
    (ends_graph, _), (block_graph, _) = abstract(Ends, s), abstract(Block, s, linear)

    def forward(params, tokens, caches, start):
        ends = nnx.merge(ends_graph, params["ends"])
        x = ends.embed(tokens)
        if isinstance(caches, list):
            caches = list(caches)
            for i, state in enumerate(params["layers"]):
                x, caches[i] = nnx.merge(block_graph, state)(x, caches[i], start)
        else:

            def body(x, xs):
                i, cache = xs
                return nnx.merge(block_graph, at(params["layers"], i))(x, cache, start)

            x, caches = jax.lax.scan(body, x, (jnp.arange(s["layers"]), caches))
        return ends.lm_head(ends.norm(x[:, -1])), caches

    return forward


def decode(forward, params, tokens, caches, start):
    """STEPS greedy steps."""

    def step(i, carry):
        tokens, caches = carry
        logits, caches = forward(params, tokens, caches, start + i)
        return jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32), caches

    return jax.lax.fori_loop(0, STEPS, step, (tokens, caches))


# The same with direct calls -----------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix of a stack."""

    stack: Any
    index: Any


class DirectLinear(nnx.Linear):
    def __call__(self, inputs):
        w = self.kernel.get_value()
        if isinstance(w, Layer):
            return jq.matmul(inputs, w.stack, layer=w.index)
        return jq.matmul(inputs, w)


def is_quantized(x):
    return isinstance(x, jq.QuantizedArray)


def direct_at(tree, i):
    return jax.tree.map(
        lambda a: Layer(a, i) if is_quantized(a) else a[i], tree, is_leaf=is_quantized
    )


# Weights and timing -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def normal(key, shape):
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02)


def make_params(s, form, config=None):
    """Random weights of the whole model, in FP8 where a config is given and rules allow it."""
    count = iter(range(10**6))

    def make(leaf, *lead):
        shape = (*lead, *leaf.shape)
        if leaf.ndim == 1:  # of a norm
            return jnp.ones(shape, leaf.dtype)
        return normal(jax.random.key(next(count)), shape)

    def layers(*lead):
        state = jax.tree.map(lambda leaf: make(leaf, *lead), block)
        return state if config is None else jq.quantize_tree(state, config)[0]

    (_, ends), (_, block) = abstract(Ends, s), abstract(Block, s, nnx.Linear)
    return {
        "ends": jax.tree.map(make, ends),
        "layers": layers(s["layers"])
        if form == "scanned"
        else [layers() for _ in range(s["layers"])],
    }


def make_caches(s, form, B, S):
    shape = (2, B, S, s["kv"], HEAD_DIM)
    if form == "scanned":
        return jnp.zeros((s["layers"], *shape), jnp.bfloat16)
    return [jnp.zeros(shape, jnp.bfloat16) for _ in range(s["layers"])]


def measure(fn, params, tokens, caches, start):
    """Seconds of a call, of tracing and of compiling; `fn` gives back the caches last."""
    begin = time.perf_counter()
    traced = jax.jit(fn, donate_argnums=2).trace(params, tokens, caches, start)
    trace = time.perf_counter() - begin
    run = traced.lower().compile()
    compilation = time.perf_counter() - begin - trace
    out, caches = run(params, tokens, caches, start)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        _, caches = jax.block_until_ready(run(params, tokens, caches, start))
        times.append(time.perf_counter() - begin)
    return float(np.median(times)), trace, compilation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--form", choices=["unrolled", "scanned"], default="unrolled")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048])
    parser.add_argument("--save", metavar="NAME", help="write NAME.md under benchmarks/results")
    args = parser.parse_args()
    s, start = SHAPES[args.shape], jnp.int32(args.context)
    lines = [
        f"{datetime.date.today()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, Python "
        f"{platform.python_version()}; {args.shape} shape, {args.form}, random weights, context "
        f"{args.context}",
        "",
        "| program | what | time | trace s | compile s |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    plain, direct = make_forward(s), make_forward(s, DirectLinear, direct_at)
    for config, programs in (
        (None, {"BF16": plain}),
        (jq.QuantConfig(), {"FP8, `jq.fp8`": jq.fp8(plain), "FP8, direct calls": direct}),
    ):
        params = jax.block_until_ready(make_params(s, args.form, config))
        for name, forward in programs.items():
            rows = []
            for B in args.batch:
                caches = make_caches(s, args.form, B, args.context + STEPS)
                tokens = jnp.zeros((B, 1), jnp.int32)
                run = functools.partial(decode, forward)
                seconds, *rest = measure(run, params, tokens, caches, start)
                rows.append((f"decode M={B}", f"{seconds / STEPS * 1e3:.2f} ms", *rest))
            for T in args.prefill:
                caches = make_caches(s, args.form, 1, T)
                tokens = jnp.arange(T, dtype=jnp.int32)[None] % s["vocab"]
                seconds, *rest = measure(forward, params, tokens, caches, jnp.int32(0))
                rows.append((f"prefill {T}", f"{T / seconds:.0f} tok/s", *rest))
            for what, figure, trace, compilation in rows:
                lines.append(f"| {name} | {what} | {figure} | {trace:.1f} | {compilation:.1f} |")
                print(lines[-1], flush=True)
        del params
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.save}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
