"""Times quantization on a GPU against a copy: the bytes that it reads and writes, per second.

    python benchmarks/quantize.py [-o benchmarks/results/quantize-h200.md]

    copy         XLA's copy of BF16 data of the size of the input: read once, written once
    activations  1x128 groups, by the kernel that stands before a product
    RMSNorm      the same with the norm before it
    SiLU * up    the same with the gated activation before it, whose input is twice as wide
    weight       `jaxquant.quantize` in 128x128 blocks

Random data, operands rotated past the L2 cache, durations of the kernels on the device by CUPTI,
medians. `of a copy` is the rate over that of the copy beside it.
"""

import argparse
import datetime
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

import jaxquant as jq
from jaxquant.matmul import RMSNorm, SiluMul

MS = (16, 64, 512, 4096, 8192)
KS = (4096, 14336)
NKS = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
ROTATED_BYTES = 200 << 20
REPEATS = 5


@jax.jit(static_argnums=1)
def random(key: Any, shape: tuple[int, ...]) -> jax.Array:
    """BF16 of a normal distribution."""
    return jax.random.normal(key, shape, jnp.bfloat16)


def microseconds(run: Callable[..., Any], shape: tuple[int, ...]) -> float:
    """Device time of the kernels of `run(x)`, x random of that shape."""
    from jax.experimental.mosaic.gpu import profiler

    sets = max(2, ROTATED_BYTES // (2 * shape[0] * shape[1]))
    xs = [random(jax.random.key(i), shape) for i in range(min(sets, 32))]
    # Nothing is shared, and nothing dropped: each result is one of the program's.
    program = jax.jit(lambda xs: [run(x) for x in xs]).lower(xs).compile()
    jax.block_until_ready(program(xs))
    cupti: Any = profiler.Cupti(finalize=False)
    _, times = cupti.measure(program, iterations=REPEATS)(xs)
    if not times:
        raise RuntimeError("CUPTI saw no kernels")
    return statistics.median(times) * 1e3 / len(xs)


def quantize_with(prologue: Any) -> Callable[[jax.Array], Any]:
    """What quantizes the activations of a product."""
    from jaxquant.matmul.act_quant_sm90 import quantize_activations, quantize_tokens
    from jaxquant.matmul.sm90 import round_up

    def run(x: jax.Array) -> Any:
        M, A = x.shape
        if prologue is None:
            return quantize_activations(x, M, round_up(M, 64))
        K = A // 2 if isinstance(prologue, SiluMul) else A
        return quantize_tokens(prologue, x, jnp.zeros(1, jnp.int32), K, M, round_up(M, 64))

    return run


def rows() -> Any:
    """What, shape, bytes and microseconds of everything."""

    def copy(shape: tuple[int, ...]) -> Any:
        # A plain copy XLA would leave out; the sign bit costs nothing beside the memory.
        return "copy", shape, 4 * shape[0] * shape[1], microseconds(jnp.negative, shape)

    for K in KS:
        for M in MS:
            yield copy((M, K))
            quantized = M * K + 4 * M * (K // 128)
            yield (
                "activations",
                (M, K),
                2 * M * K + quantized,
                microseconds(quantize_with(None), (M, K)),
            )
            norm = RMSNorm(random(jax.random.key(99), (1, K)), 1e-5)
            yield (
                "RMSNorm",
                (M, K),
                2 * M * K + quantized,
                microseconds(quantize_with(norm), (M, K)),
            )
            yield (
                "SiLU * up",
                (M, K),
                4 * M * K + quantized,
                microseconds(quantize_with(SiluMul()), (M, 2 * K)),
            )
    for N, K in NKS:
        yield copy((N, K))
        nbytes = 3 * N * K + N * K // 4096
        yield "weight", (N, K), nbytes, microseconds(jq.quantize, (N, K))


HEADER = """\
| what | rows | columns | microseconds | TB/s | of a copy |
|------|-----:|--------:|-------------:|-----:|----------:|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = pathlib.Path(__file__).parent / "results" / "quantize-h200.md"
    parser.add_argument("-o", "--output", type=pathlib.Path, default=default)
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"benchmarks/quantize.py times GPU kernels; the device is a {device.platform}")
    title = (
        f"# Quantization against a copy\n\n{device.device_kind}, "
        f"{datetime.date.today().isoformat()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"jaxquant {jq.__version__}. BF16 in, random data; kernel times by CUPTI. "
        "`benchmarks/quantize.py` says what the rows are.\n"
    )
    lines = [title, HEADER]
    print("\n".join(lines), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    copied = 1.0
    for what, (M, K), nbytes, time in rows():
        rate = nbytes / time / 1e6
        if what == "copy":
            copied = rate
        lines.append(f"| {what} | {M} | {K} | {time:.1f} | {rate:.2f} | {rate / copied:.2f} |")
        print(lines[-1], flush=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
