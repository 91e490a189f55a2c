"""Times `jaxquant.attention.append_and_attend` on a GPU, over a cache in BF16 and one in FP8.

    python benchmarks/attention.py [-o benchmarks/results/attention-h200.md]

An 8B model's heads (32, 8 for the cache, of 128 dims), random data, sequences of one length, and
enough layers that the cache does not stay in L2 from one to the next. A step rotates the new
token, appends it and attends to the filled slots. Two clocks, microseconds per layer:

    BF16, FP8  the device time of the kernel, which is all of a step (CUPTI)
    wall       wall-clock time of a jitted loop over the layers, over their number: with the gaps
               between kernels and what counts the layers

Medians. The rate is that of the filled slots' bytes, scales included, by the kernel's time.
"""

import argparse
import datetime
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax

import jaxquant as jq
from jaxquant.attention import append_and_attend, decode_attention, empty, xla

HQ, H, D = 32, 8, 128
# Batch, slots, filled slots.
SHAPES = (
    (1, 1536, 1024),
    (4, 1536, 1024),
    (16, 1536, 1024),
    (64, 1536, 1024),
    (256, 1536, 1024),
    (1, 8192, 8192),
    (16, 8192, 8192),
    (1, 131072, 131072),
)
BY_XLA = functools.partial(
    xla.append_and_attend, attend=functools.partial(decode_attention, implementation="xla")
)
BY_KERNEL = functools.partial(append_and_attend, implementation="mosaic_gpu")
# The cache and what runs.
PROGRAMS = {
    "XLA": ("bfloat16", BY_XLA),
    "BF16": ("bfloat16", BY_KERNEL),
    "FP8": ("float8_e4m3fn", BY_KERNEL),
}
ROTATED_BYTES = 120 << 20
REPEATS = 5


def slot_bytes(dtype: str) -> int:
    """Bytes of a filled slot of all heads."""
    return 2 * H * (D * jnp.dtype(dtype).itemsize + (4 if dtype.startswith("float8") else 0))


def program(B: int, S: int, filled: int, dtype: str, run: Callable) -> tuple[Any, Any, int]:
    """A compiled step of all layers, the cache donated; what makes its operands; the layers."""
    L = max(2, -(-ROTATED_BYTES // (B * filled * slot_bytes(dtype))))

    def make() -> tuple:
        keys = jax.random.split(jax.random.key(0), 3)
        qkv = jax.random.normal(keys[0], (B, HQ + 2 * H, D), jnp.bfloat16)
        cache = [empty((L, B, H, S, D), dtype, values=values) for values in (False, True)]

        def random(a: jax.Array, key: jax.Array) -> jax.Array:
            if a.dtype == jnp.float32:
                return jnp.full(a.shape, 0.01, a.dtype)
            # Bits of positive and negative numbers below 2.
            unsigned = {1: jnp.uint8, 2: jnp.uint16}[a.dtype.itemsize]
            mask = {1: 0xBF, 2: 0xBFFF}[a.dtype.itemsize]
            bits = jax.random.bits(key, a.shape, unsigned) & unsigned(mask)
            return lax.bitcast_convert_type(bits, a.dtype)

        k, v = (
            jax.tree.map(lambda a, key=key: random(a, key), part)
            for part, key in zip(cache, keys[1:], strict=True)
        )
        angles = jnp.ones((B, D // 2), jnp.float32)
        return k, v, qkv, jnp.full((B,), filled, jnp.int32), (jnp.cos(angles), jnp.sin(angles))

    def step(k: Any, v: Any, *rest: Any) -> tuple:
        qkv, lengths, rotation = rest

        def layer(l: Any, carry: tuple) -> tuple:
            _, k, v = carry
            return run(qkv, k, v, l, lengths, rotation)

        return lax.fori_loop(0, L, layer, (qkv[:, :HQ], k, v))

    make = jax.jit(make)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*jax.eval_shape(make)).compile()
    return compiled, make, L


def measure(run: Any, make: Callable[[], tuple], L: int) -> tuple[float | None, float]:
    """(kernel or None if no kernel of ours runs, wall) in microseconds per layer."""
    from jax._src.lib import mosaic_gpu  # whose CUPTI has no public name that donates

    k, v, *rest = make()

    def steps() -> float:
        nonlocal k, v
        start = time.perf_counter()
        for _ in range(REPEATS):
            _, k, v = run(k, v, *rest)
        jax.block_until_ready(k)
        return (time.perf_counter() - start) * 1e6 / (REPEATS * L)

    steps()
    wall = statistics.median(steps() for _ in range(REPEATS))
    cupti: Any = mosaic_gpu._mosaic_gpu_ext
    cupti._cupti_init()
    steps()
    kernels = [ms * 1e3 for name, ms in cupti._cupti_get_timings(False) if "jaxquant" in name]
    return statistics.median(kernels) if kernels else None, wall


HEADER = """\
| B | S | filled | XLA wall | BF16 wall | FP8 wall | BF16 | TB/s | FP8 | TB/s |
|--:|--:|-------:|---------:|----------:|---------:|-----:|-----:|----:|-----:|"""


def row(shape: tuple[int, int, int], times: dict[str, tuple[float | None, float]]) -> str:
    """One line of the table."""
    B, _, filled = shape
    cells = [str(n) for n in shape] + [f"{wall:.1f}" for _, wall in times.values()]
    for name, (kernel, _) in times.items():
        if kernel is not None:
            rate = B * filled * slot_bytes(PROGRAMS[name][0]) / kernel / 1e6
            cells += [f"{kernel:.1f}", f"{rate:.2f}"]
    return f"| {' | '.join(cells)} |"


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
        f"jaxquant {jq.__version__}. {HQ} query heads, {H} for the cache, {D} dims; "
        "`benchmarks/attention.py` says what the columns are.\n"
    )
    lines = [title, HEADER]
    print("\n".join(lines), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # All ahead of what is measured, since tracing keeps the interpreter from launching.
    with ThreadPoolExecutor() as pool:
        jobs = [[pool.submit(program, *shape, *of) for of in PROGRAMS.values()] for shape in SHAPES]
    for shape, programs in zip(SHAPES, jobs, strict=True):
        times = [measure(*job.result()) for job in programs]
        lines.append(row(shape, dict(zip(PROGRAMS, times, strict=True))))
        print(lines[-1], flush=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
