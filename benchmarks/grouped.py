"""Times products with FP8 experts on a GPU: their kernel, a loop over tiles, dense products.

    python benchmarks/grouped.py [-t 1 512] [-o benchmarks/results/grouped-h200.md]

Each token goes to 8 experts at random. What the experts' products need at least is set beside
them: `matmul` of a dense weight as large as the experts that have tokens, by as many tokens as
these have on average, which is the same bytes and the same FLOPs.

    same bytes  the kernel of that dense product, and with the quantization of its tokens
    grouped     the kernel of all experts, and with what comes before it: every token is quantized
                once, and written for each of its experts (few tokens the kernel gathers itself)
    loop        tile by tile, each gathered, quantized and multiplied by `matmul`
    to dense    "grouped" by "same bytes", the kernels alone and with what comes before

Then a layer of Qwen3-30B-A3B's experts from the router to the weighted sum, in FP8 and in BF16,
which is a loop over tiles.

One clock for all: the durations of the kernels on the device, by CUPTI, added up; gaps between
kernels, of which a loop has many, are in none of them. Calls take turns with routings and tokens
of their own; where few experts are hit, these differ from call to call, and otherwise they are
more than the L2 cache holds. The least of the repeats.
"""

import argparse
import datetime
import math
import pathlib
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx
from jax import lax

import jaxquant as jq
from jaxquant.matmul import Routing, grouped, grouped_matmul
from jaxquant.models.layers import Stack
from jaxquant.models.moe import MoE

# Experts, N, K.
SHAPES = ((128, 1536, 4096), (64, 2816, 2048))
TOKENS = (1, 16, 64, 512, 4096)
TOP_K = 8
SETS = 4
REPEATS = 3
KERNEL = "jaxquant_grouped_fp8"
PRODUCT = re.compile("jaxquant_(gemm|decode|gemv|grouped)_fp8")
# Layers, experts, intermediate and hidden size of Qwen3-30B-A3B.
MOE_LAYER = (2, 128, 768, 2048)


def random_experts(shape: tuple[int, ...]) -> jq.QuantizedArray:
    """A quantized weight `[..., N, K]` of random bytes."""
    *lead, N, K = shape

    @jax.jit
    def make(key):
        def matrix(key):
            return (jax.random.normal(key, (N, K), jnp.bfloat16) * 100).astype(jnp.float8_e4m3fn)

        return lax.map(matrix, jax.random.split(key, math.prod(lead))).reshape(shape)

    scale = jnp.full((*lead, -(-N // 128), -(-K // 128)), 1e-2)
    return jq.QuantizedArray(make(jax.random.key(0)), scale, (128, 128), np.dtype(jnp.bfloat16))


def routing(tokens: int, E: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many tokens each expert has, which, sorted by expert, and where each token is then."""
    scores = np.random.default_rng((tokens, seed)).random((tokens, E))
    chosen = np.argpartition(scores, TOP_K - 1, axis=1)[:, :TOP_K].ravel()
    order = np.argsort(chosen, kind="stable")
    sizes, places = np.bincount(chosen, minlength=E), np.argsort(order).reshape(tokens, TOP_K)
    return sizes.astype(np.int32), (order // TOP_K).astype(np.int32), places.astype(np.int32)


def joined(w: jq.QuantizedArray, experts: int) -> jq.QuantizedArray:
    """A stack of matrices, each of so many experts one below the other."""
    n = w.qvalue.shape[0] // experts
    return jax.tree.map(lambda leaf: leaf[: n * experts].reshape(n, -1, leaf.shape[-1]), w)


def kernel_microseconds(run: Any, calls: list[tuple[Any, ...]]) -> dict[str, float]:
    """Device time of a call by kernel: the mean over the calls, in the fastest of the repeats."""
    from jax._src.lib import mosaic_gpu  # its public face, `profiler.Cupti`, takes jitted functions

    cupti: Any = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore

    def all_calls() -> None:
        jax.block_until_ready([run(*call) for call in calls])

    all_calls()
    repeats = []
    for _ in range(REPEATS):
        cupti._cupti_init()
        try:
            all_calls()
        finally:
            kernels = cupti._cupti_get_timings(False)
        by_name: dict[str, float] = {}
        for name, ms in [*kernels, ("all", sum(ms for _, ms in kernels))]:
            by_name[name] = by_name.get(name, 0) + ms * 1e3 / len(calls)
        repeats.append(by_name)
    least = min(repeats, key=lambda by_name: by_name["all"])
    if not least["all"]:
        raise RuntimeError("CUPTI saw no kernels")
    return least


def dense(x: jax.Array, w: jq.QuantizedArray, layer: jax.Array) -> jax.Array:
    return jq.matmul(x, w, layer=layer)


def experts(
    x: jax.Array, w: jq.QuantizedArray, sizes: jax.Array, rows: jax.Array, places: jax.Array
) -> jax.Array:
    return grouped_matmul(x, w, sizes, rows=rows, places=places)


def loop(
    x: jax.Array, w: jq.QuantizedArray, sizes: jax.Array, rows: jax.Array, _: jax.Array
) -> jax.Array:
    return grouped.tiled(x[rows], w, sizes, None, x.dtype, None)


def jobs_of(w: jq.QuantizedArray, tokens: int) -> tuple[int, dict[str, tuple[Any, list[Any]]]]:
    """The mean number of experts that are hit; a function and its calls by column."""
    E, _, K = w.qvalue.shape
    T = tokens * TOP_K
    routings = [routing(tokens, E, seed) for seed in range(SETS)]
    hit = round(np.mean([(sizes > 0).sum() for sizes, *_ in routings]))
    keys = jax.random.split(jax.random.key(1), SETS)
    mean = -(-T // hit)
    xs = [jax.random.normal(key, (max(tokens, mean), K), jnp.bfloat16) for key in keys]
    calls = [(x[:tokens], w, *map(jnp.asarray, of)) for x, of in zip(xs, routings, strict=True)]
    stack = joined(w, hit)
    same_bytes = [(x[:mean], stack, jnp.int32(i)) for i, x in enumerate(xs)]
    return hit, {
        "same bytes": (dense, same_bytes),
        "grouped": (experts, calls),
        "loop": (loop, calls),
    }


def compiled(run: Any, calls: list[tuple[Any, ...]]) -> Any:
    return jax.jit(run).lower(*calls[0]).compile()


def measure(runs: dict[str, Any], jobs: dict[str, tuple[Any, list[Any]]]) -> dict[str, Any]:
    """Microseconds by column: of the product's kernel, and of all."""
    us = {}
    for name, run in runs.items():
        by_kernel = kernel_microseconds(run, jobs[name][1])
        product = sum(us for kernel, us in by_kernel.items() if PRODUCT.match(kernel))
        us[name] = product, by_kernel["all"]
    return us


HEADER = """\
| tokens | experts hit | same bytes | with quant | grouped | with quant | loop | to dense | with quant | TB/s | TFLOP/s |
|-------:|------------:|-----------:|-----------:|--------:|-----------:|-----:|---------:|-----------:|-----:|--------:|"""  # noqa: E501


def table_row(N: int, K: int, tokens: int, hit: int, us: dict[str, Any]) -> str:
    """One line of the table."""
    least, kernel = us["same bytes"], us["grouped"]
    times = [f"{t:.1f}" for t in (*least, *kernel, us["loop"][1])]
    ratios = [f"{a / b:.2f}" for a, b in zip(kernel, least, strict=True)]
    bandwidth, rate = hit * N * K / kernel[0] / 1e6, 2 * tokens * TOP_K * N * K / kernel[0] / 1e6
    cells = [str(tokens), str(hit), *times, *ratios, f"{bandwidth:.2f}", f"{rate:.0f}"]
    return f"| {' | '.join(cells)} |"


BLOCK_HEADER = """
## A layer of Qwen3-30B-A3B, router to weighted sum

| tokens | FP8 | of it the experts | BF16 | to BF16 |
|-------:|----:|------------------:|-----:|--------:|"""


def moe_layer(shape: tuple[int, ...], fp8: bool) -> tuple[Any, Any]:
    """A function of a state, tokens and a layer, and the state: `[L, E, 2 W, H]` experts."""
    L, E, W, H = shape
    config: Any = types.SimpleNamespace(
        routing=Routing(E, TOP_K), hidden_size=H, moe_intermediate_size=W, correction=False
    )
    moe = MoE(config, Stack(range(L)), jnp.bfloat16)

    @jax.jit
    def widened(w):  # matrix by matrix: a stack in float32 is large
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), w)
        return lax.map(jq.dequantize, flat).reshape(w.shape)

    for linear, N, K in ((moe.experts.gate_up_proj, 2 * W, H), (moe.experts.down_proj, H, W)):
        w: Any = random_experts((L, E, N, K))
        linear.weight.set_value(w if fp8 else widened(w))
    moe.gate.weight.set_value(jax.random.normal(jax.random.key(2), (L, E, H), jnp.bfloat16))
    definition, state = nnx.split(moe)
    return lambda state, x, l: nnx.merge(definition, state)(x[None], l), state


def measure_layer(tokens: list[int]) -> list[str]:
    """The lines of the table of a whole layer."""
    times: dict[bool, list[dict[str, float]]] = {}
    L, *sizes = MOE_LAYER
    for fp8 in (True, False):
        run, state = moe_layer((L, *sizes), fp8)
        times[fp8] = []
        for T in tokens:
            keys = jax.random.split(jax.random.key(3), SETS)
            xs = [jax.random.normal(key, (T, sizes[-1]), jnp.bfloat16) for key in keys]
            calls = [(state, x, jnp.int32(i % L)) for i, x in enumerate(xs)]
            times[fp8].append(kernel_microseconds(jax.jit(run), calls))
        del state
    lines = []
    for T, fp8, bf16 in zip(tokens, times[True], times[False], strict=True):
        kernels = sum(us for name, us in fp8.items() if name.startswith(KERNEL))
        cells = [f"{us:.1f}" for us in (fp8["all"], kernels, bf16["all"])]
        lines.append(f"| {T} | {' | '.join(cells)} | {bf16['all'] / fp8['all']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = pathlib.Path(__file__).parent / "results" / "grouped-h200.md"
    parser.add_argument("-t", "--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("-o", "--output", type=pathlib.Path, default=default)
    args = parser.parse_args()

    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"benchmarks/grouped.py times GPU kernels; the device is a {device.platform}")
    lines = [
        "# Products with FP8 experts, microseconds\n",
        f"{device.device_kind}, {datetime.date.today().isoformat()}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}, jaxquant {jq.__version__}. Top {TOP_K} of random routing, "
        "BF16 activations. Kernel times by CUPTI; columns: see `benchmarks/grouped.py`.",
    ]
    print("\n".join(lines), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:  # what is measured last compiles meanwhile
        work = []
        for E, N, K in SHAPES:
            w = random_experts((E, N, K))
            for tokens in args.tokens:
                hit, jobs = jobs_of(w, tokens)
                runs = {name: pool.submit(compiled, *job) for name, job in jobs.items()}
                work.append(((E, N, K), tokens, hit, jobs, runs))
        for (E, N, K), tokens, hit, jobs, runs in work:
            new = [f"\n## {E} experts of {N} x {K}\n", HEADER] if tokens == args.tokens[0] else []
            us = measure({name: run.result() for name, run in runs.items()}, jobs)
            new.append(table_row(N, K, tokens, hit, us))
            print("\n".join(new), flush=True)
            lines += new
            args.output.write_text("\n".join(lines) + "\n")
    lines += [BLOCK_HEADER, *measure_layer(args.tokens)]
    print("\n".join(lines[-1 - len(args.tokens) :]), flush=True)
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
