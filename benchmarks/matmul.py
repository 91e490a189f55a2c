"""Times `jaxquant.matmul` on a GPU against XLA's BF16 dot and against the XLA reference.

    python benchmarks/matmul.py [-m 1 4096] [-o benchmarks/results/matmul.md]

A time is that of everything one product launches, the quantization of its activations included,
by two clocks:

    kernels  the device times of its kernels, added up (CUPTI)
    elapsed  wall-clock time of a jitted function of several products, over their number: with
             the gaps between kernels and what the host takes to launch them

Each product in that function has operands of its own, random, together more than the L2 cache
holds where the shape allows it (at most 6 sets). Medians.
"""

import argparse
import datetime
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

import jaxquant as jq
from jaxquant.matmul import api

MS = (1, 16, 64, 512, 4096)
# An 8B model's projections (o, down, qkv, gate and up), then a small model's ragged ones.
NKS = (
    (4096, 4096),
    (4096, 14336),
    (6144, 4096),
    (28672, 4096),
    (576, 1536),
    (1536, 576),
    (192, 576),
)
ROTATED_BYTES = 200 << 20
MAX_SETS = 6
REPEATS = 5


def bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of an unquantized model."""
    return api.matmul(x, w)


def mosaic_gpu(x: jax.Array, w: jq.QuantizedArray) -> jax.Array:
    """FP8 by this package's kernels."""
    return api.matmul(x, w, implementation="mosaic_gpu")


def xla(x: jax.Array, w: jq.QuantizedArray) -> jax.Array:
    """FP8 by the XLA reference."""
    return api.matmul(x, w, implementation="xla")


def operands(M: int, N: int, K: int) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
    """Sets of x `[M, K]`, w `[N, K]` in BF16 and w quantized."""
    sets = min(MAX_SETS, 2 + ROTATED_BYTES // (N * K))

    @jax.jit
    def make(key):
        x_key, w_key = jax.random.split(key)
        x = jax.random.normal(x_key, (M, K), jnp.bfloat16)
        w = jax.random.normal(w_key, (N, K), jnp.bfloat16)
        return x, w, jq.quantize(w)

    made = [make(jax.random.key(i)) for i in range(sets)]
    xs, ws, qs = zip(*made, strict=True)
    return list(xs), list(ws), list(qs)


def each(product: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """The product of every set of operands."""

    def run(xs, ws):
        return [product(x, w) for x, w in zip(xs, ws, strict=True)]

    return run


def kernel_microseconds(run: Any, args: Sequence[Any], products: int) -> float:
    """Device time of one product's kernels."""
    from jax.experimental.mosaic.gpu import profiler

    times: Any
    _, times = profiler.Cupti(finalize=False).measure(run, iterations=REPEATS)(*args)
    if not times:
        raise RuntimeError("CUPTI saw no kernels")
    return statistics.median(times) * 1e3 / products


def elapsed_microseconds(run: Any, args: Sequence[Any], products: int) -> float:
    """Wall-clock time of one product, several calls in flight."""
    calls = 10
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([run(*args) for _ in range(calls)][-1])
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6 / (calls * products)


def measure(M: int, N: int, K: int) -> dict[str, tuple[float, float]]:
    """(kernels, elapsed) in microseconds, by implementation."""
    xs, ws, qs = operands(M, N, K)
    times = {}
    for product, weights in ((bf16, ws), (mosaic_gpu, qs), (xla, qs)):
        run = jax.jit(each(product)).lower(xs, weights).compile()
        timed = run, (xs, weights), len(xs)
        times[product.__name__] = (kernel_microseconds(*timed), elapsed_microseconds(*timed))
    return times


HEADER = """\
| M | N | K | BF16 | FP8 | FP8 / BF16 speed | XLA FP8 | BF16 elapsed | FP8 elapsed | elapsed speed |
|--:|--:|--:|-----:|----:|-----------------:|--------:|-------------:|------------:|--------------:|"""


def row(M: int, N: int, K: int, times: dict[str, tuple[float, float]]) -> str:
    """One line of the table."""
    (b, b_wall), (f, f_wall), (x, _) = (times[n] for n in ("bf16", "mosaic_gpu", "xla"))
    cells = [M, N, K, f"{b:.1f}", f"{f:.1f}", f"{b / f:.2f}", f"{x:.1f}"]
    cells += [f"{b_wall:.1f}", f"{f_wall:.1f}", f"{b_wall / f_wall:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    date = datetime.date.today().isoformat()
    default = pathlib.Path(__file__).parent / "results" / f"matmul-{date}.md"
    parser.add_argument("-o", "--output", type=pathlib.Path, default=default)
    parser.add_argument("-m", "--tokens", type=int, nargs="+", default=MS, metavar="M")
    args = parser.parse_args()

    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"benchmarks/matmul.py times GPU kernels; the device is a {device.platform}")
    title = (
        f"# Matrix products, microseconds\n\n{device.device_kind}, {date}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}, jaxquant {jq.__version__}. FP8 is W8A8 with the "
        "quantization of BF16 activations included; results in BF16; random data. Kernel times by "
        "CUPTI; elapsed: wall clock of many products in one jitted function, over their number.\n"
    )
    lines = [title, HEADER]
    print("\n".join(lines), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for M in args.tokens:
        for N, K in NKS:
            lines.append(row(M, N, K, measure(M, N, K)))
            print(lines[-1], flush=True)
            args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
