"""Times and checks quantization on a GPU, against a copy of as many bytes.

    python benchmarks/quantize.py [-m 13 512 8192] [-o benchmarks/results/quantize-h200.md]

Activations of an 8B model: what stands before query, key and value (RMSNorm, K = 4096), before the
attention's output (nothing, 4096) and before down (SiLU times up, 14336), and two K in other
numbers of groups, in BF16. Then its weights, in 128x128 blocks, M being their rows. CUPTI time of
the kernels, median, over operands that together do not stay in L2 where there is a bandwidth to
speak of; that of the copy is of an XLA kernel that reads and writes as many bytes, half each.
Where nothing stands before it, and of weights, the bytes have to be those of `jaxquant.blocked`;
else the share that differs is shown, since a norm or an exp may differ before it is rounded.
"""

import argparse
import datetime
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant import blocked
from jaxquant.matmul import RMSNorm, SiluMul
from jaxquant.matmul.act_quant_sm90 import quantize

# Odd numbers of tokens too: what is stored in pairs or by tiles has to end where they do.
MS = (1, 5, 13, 16, 33, 64, 129, 512, 4096, 8192)
# What stands before, and K; the last two in numbers of groups that warpgroups do not share evenly.
BEFORE = (
    ("rms_norm", 4096),
    ("none", 4096),
    ("silu_mul", 14336),
    ("rms_norm", 3584),
    ("silu_mul", 1536),
)
NKS = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
ROTATED_BYTES = 150 << 20
MAX_SETS = 8
REPEATS = 5


def prologue_of(name: str, K: int) -> Any:
    """What stands before."""
    norm = RMSNorm(jax.random.normal(jax.random.key(1), (1, K), jnp.bfloat16), 1e-5)
    return {"rms_norm": norm, "silu_mul": SiluMul(), "none": None}[name]


def operands(M: int, columns: int, spread: float) -> list[jax.Array]:
    """Rows of widely different sizes, the first all zeros."""
    sets = max(1, min(MAX_SETS, ROTATED_BYTES // (M * columns * 2)))

    @jax.jit
    def make(key):
        x, size = jax.random.normal(key, (M, columns)), jax.random.normal(key, (M, 1))
        return (x * jnp.exp(spread * size)).at[0].set(0).astype("bfloat16")

    return [make(key) for key in jax.random.split(jax.random.key(M), sets)]


def differing(actual: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> int:
    """Bytes and scales that are not the same."""

    def bits(a):
        return jax.lax.bitcast_convert_type(a, jnp.uint8 if a.dtype.itemsize == 1 else jnp.uint32)

    return sum(int((bits(a) != bits(b)).sum()) for a, b in zip(actual, expected, strict=True))


def microseconds(run: Callable[[jax.Array], Any], xs: list[jax.Array]) -> float:
    """Device time of one run."""
    from jax.experimental.mosaic.gpu import profiler

    def one(x):
        times: Any
        _, times = profiler.Cupti(finalize=False).measure(run)(x)
        if times is None:
            raise RuntimeError("CUPTI saw no kernels")
        return times * 1e3

    return statistics.median(one(x) for _ in range(REPEATS) for x in xs)


def activations(M: int, name: str, K: int) -> str:
    """A line of the table."""
    prologue = prologue_of(name, K)
    xs = operands(M, K * (2 if name == "silu_mul" else 1), 4 if name == "none" else 1)
    layer, rows = jnp.zeros(1, jnp.int32), -(-M // 8) * 8
    run = jax.jit(lambda x: quantize(prologue, x, layer, K, rows)).lower(xs[0]).compile()
    qvalue, scale = run(xs[0])
    expected = blocked.quantize_activations(xs[0] if prologue is None else prologue(xs[0], 0))
    wrong = differing((qvalue[:M], scale.T[:M]), expected)
    if wrong and prologue is None:
        raise RuntimeError(f"M = {M}, {name}: {wrong} bytes or scales are not those of XLA")
    return row(M, K, name, run, xs, f"{wrong / (M * K):.1e}")


def weights(N: int, K: int) -> str:
    """A line of the table."""
    ws = operands(N, K, 1)
    run = jax.jit(blocked.quantize).lower(ws[0]).compile()
    floor, dtype = blocked.WEIGHT_AMAX_FLOOR, jnp.dtype(jnp.float8_e4m3fn)
    expected = blocked.quantize_by_xla(ws[0], (128, 128), dtype, floor, None)
    if wrong := differing((run(ws[0]).qvalue, run(ws[0]).scale), expected):
        raise RuntimeError(f"{N} x {K}: {wrong} bytes or scales are not those of XLA")
    return row(N, K, "weight", run, ws, "0.0e+00")


def row(M: int, K: int, name: str, run: Any, xs: list[jax.Array], differ: str) -> str:
    """Times `run` and a copy."""
    size = 2 * xs[0].size + M * K
    copied = [jnp.full((size // 4,), i, jnp.bfloat16) for i in range(len(xs))]
    ours, copy = microseconds(run, xs), microseconds(jax.jit(jnp.negative), copied)
    cells = [M, K, name, f"{ours:.1f}", f"{size / ours / 1e6:.2f}", f"{copy:.1f}"]
    return f"| {' | '.join(map(str, [*cells, f'{copy / ours:.2f}', differ]))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", type=int, nargs="+", default=MS)
    default = pathlib.Path(__file__).parent / "results" / "quantize-h200.md"
    parser.add_argument("-o", "--output", type=pathlib.Path, default=default)
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"benchmarks/quantize.py times GPU kernels; the device is a {device.platform}")
    lines = [
        f"{datetime.date.today()}, {device.device_kind}, jax {jax.__version__}, jaxquant "
        f"{jq.__version__}; `benchmarks/quantize.py` says what the columns are.",
        "",
        "| M | K | before | us | TB/s | copy us | of a copy | differing |",
        "|--:|--:|:-------|---:|-----:|--------:|----------:|----------:|",
    ]
    print("\n".join(lines), flush=True)
    jobs = [functools.partial(activations, M, *before) for M in args.m for before in BEFORE]
    jobs += [functools.partial(weights, *shape) for shape in NKS]
    for job in jobs:
        lines.append(job())
        print(lines[-1], flush=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
