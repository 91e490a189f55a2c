"""Times `jaxquant.attention.decode_attention` on a GPU: its kernel against the XLA reference.

    python benchmarks/attention.py [-o benchmarks/results/attention-h200.md]

An 8B model's heads (32, 8 for the cache, of 128 dims) in BF16, random data, and enough layers
that the cache does not stay in L2 from one to the next. Two clocks, microseconds per layer:

    kernels  the device times of a layer's kernels, added up (CUPTI)
    elapsed  wall-clock time of a jitted scan over the layers, over their number: with the gaps
             between kernels and what the scan itself takes

Medians. The rate is that of the filled slots' bytes by the kernels' time.
"""

import argparse
import datetime
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax

import jaxquant as jq
from jaxquant.attention import decode_attention

HQ, H, D = 32, 8, 128
# Batch, slots, filled slots.
SHAPES = (
    (1, 1536, 1088),
    (4, 1536, 1088),
    (16, 1536, 1088),
    (64, 1536, 1088),
    (256, 1536, 1088),
    (1, 8192, 8192),
    (4, 8192, 8192),
    (1, 131072, 131072),
)
ROTATED_BYTES = 80 << 20
REPEATS = 5


def operands(B: int, S: int, filled: int) -> tuple[jax.Array, ...]:
    """q, k, v and lengths."""
    slot_bytes = 4 * B * H * D
    L = max(4, ROTATED_BYTES // (slot_bytes * filled))

    @jax.jit
    def make(key):
        keys = jax.random.split(key, 3)
        shapes = (B, HQ, D), (L, B, H, S, D), (L, B, H, S, D)
        return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]

    return *make(jax.random.key(0)), jnp.full((B,), filled, jnp.int32)


def kernel_microseconds(attend: Callable[..., jax.Array], q: Any, k: Any, *rest: Any) -> float:
    """Device time of one layer's kernels."""
    from jax.experimental.mosaic.gpu import profiler

    layers = [jnp.int32(l) for l in range(len(k))]

    def all_layers(q, k, v, lengths, layers):
        return [attend(q, k, v, lengths, l) for l in layers]

    run = jax.jit(all_layers).lower(q, k, *rest, layers).compile()
    times: Any
    cupti = profiler.Cupti(finalize=False)
    _, times = cupti.measure(run, iterations=REPEATS)(q, k, *rest, layers)
    if not times:
        raise RuntimeError("CUPTI saw no kernels")
    return statistics.median(times) * 1e3 / len(layers)


def elapsed_microseconds(attend: Callable[..., jax.Array], q: Any, k: Any, *rest: Any) -> float:
    """Wall-clock time of one layer, several scans in flight."""

    @jax.jit
    def run(q, k, *rest):
        return lax.scan(lambda q, l: (attend(q, k, *rest, l), None), q, jnp.arange(len(k)))[0]

    calls = 5
    jax.block_until_ready(run(q, k, *rest))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([run(q, k, *rest) for _ in range(calls)])
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6 / (calls * len(k))


def measure(B: int, S: int, filled: int) -> dict[str, tuple[float, float]]:
    """(kernels, elapsed) in microseconds, by implementation."""
    args = operands(B, S, filled)
    times = {}
    for implementation in ("xla", "mosaic_gpu"):

        def attend(q, k, v, lengths, layer, implementation=implementation):
            return decode_attention(q, k, v, layer, lengths, implementation=implementation)

        times[implementation] = (
            kernel_microseconds(attend, *args),
            elapsed_microseconds(attend, *args),
        )
    return times


HEADER = """\
| B | S | filled | XLA | kernel | speed | TB/s | XLA elapsed | kernel elapsed | elapsed speed |
|--:|--:|-------:|----:|-------:|------:|-----:|------------:|---------------:|--------------:|"""


def row(B: int, S: int, filled: int, times: dict[str, tuple[float, float]]) -> str:
    """One line of the table."""
    (x, x_wall), (m, m_wall) = times["xla"], times["mosaic_gpu"]
    rate = 4 * B * H * D * filled / m / 1e6
    cells = [B, S, filled, f"{x:.1f}", f"{m:.1f}", f"{x / m:.2f}", f"{rate:.2f}"]
    cells += [f"{x_wall:.1f}", f"{m_wall:.1f}", f"{x_wall / m_wall:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = pathlib.Path(__file__).parent / "results" / "attention-h200.md"
    parser.add_argument("-o", "--output", type=pathlib.Path, default=default)
    args = parser.parse_args()

    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"benchmarks/attention.py times GPU kernels; the device is a {device.platform}")
    title = (
        f"# Decode attention, microseconds per layer\n\n{device.device_kind}, "
        f"{datetime.date.today().isoformat()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"jaxquant {jq.__version__}. {HQ} query heads, {H} for the cache, {D} dims, BF16, random "
        "data. Kernel times by CUPTI; elapsed: wall clock of a scan over the layers, over their "
        "number. TB/s: the filled slots' bytes by the kernel's time.\n"
    )
    lines = [title, HEADER]
    print("\n".join(lines), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        lines.append(row(*shape, measure(*shape)))
        print(lines[-1], flush=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
