"""Times matrix products on a GPU: this package's FP8, cuBLASLt's blocked FP8, XLA's FP8 and BF16.

    python benchmarks/matmul.py [-m 512 4096] [-o benchmarks/results/matmul.md]

    BF16        XLA's dot of BF16 operands; from 512 tokens on by cuBLAS, which spares the tuning
    FP8 tensor  XLA's dot of FP8 operands without scales: what FP8 costs with one scale per tensor
    cuBLASLt    blocked FP8 (1x128 and 128x128 scales) by `torch.nn.functional.scaled_mm`, where
                torch with CUDA is installed; some numbers of tokens below 16 it refuses
    jaxquant    this package's kernel on the same operands: quantized activations
    with quant  `jaxquant.matmul` of BF16 activations, their quantization included; what one kernel
                does both ways has no time of its own in the column before
    weight only `jaxquant.matmul` of BF16 activations as they are

One clock for all: the durations of the kernels on the device, by CUPTI, added up; jax's profiler
of Mosaic kernels records torch's as well, since it is the process that CUPTI watches. Host time
and gaps between kernels are in none of them. Every product in a run has random operands of its
own, together more than the L2 cache holds where the shape allows it (at most 6 sets); runs follow
one another without a pause, so that the GPU has the clock it keeps under load. Medians. Rates at
which weights are read are set beside that of a sum over 1 GiB in the same run.
"""

import argparse
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jaxquant as jq
from jaxquant.matmul import api

MS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096, 8192)
# An 8B model's projections (o, down, qkv, gate and up), then DeepSeek-V3's.
NKS = (
    (4096, 4096),
    (4096, 14336),
    (6144, 4096),
    (28672, 4096),
    (4096, 7168),
    (2112, 7168),
    (7168, 2048),
    (7168, 16384),
    (24576, 1536),
    (32768, 512),
)
# From here on products are bound by the tensor cores, below by reading the weight.
PREFILL = 512
# Products with so few tokens do nothing but read the weight, if it has so many bytes.
STREAMED_TOKENS, STREAMED_BYTES = 16, 60e6
# From here on products are compared with what FP8 costs without blocks.
LARGE = 4096
ROTATED_BYTES = 150 << 20
MAX_SETS = 6
REPEATS = 5
COLUMNS = ("BF16", "FP8 tensor", "cuBLASLt", "jaxquant", "with quant", "weight only")


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's product, in BF16; of FP8 operands XLA makes an FP8 product."""
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def by_api(x: jax.Array, w: jq.QuantizedArray) -> jax.Array:
    """The product of a quantized model."""
    return api.matmul(x, w, implementation="mosaic_gpu")


def kernel(M: int, N: int, K: int) -> tuple[Callable[..., jax.Array], int, int] | None:
    """The product of quantized operands, rows of xq and columns of sx that it takes; or None."""
    from jaxquant.matmul import decode_sm90, gemm_sm90, gemv_sm90
    from jaxquant.matmul.sm90 import round_up

    sms = jax.devices()[0].core_count
    if gemv_sm90.takes(M, K):
        return None
    layer, scale_rows = np.zeros(1, np.int32), round_up(M, 64)
    args = {"out_dtype": jnp.bfloat16, "sms": sms}
    if decode_sm90.takes(M, N, sms):
        args |= {"M": M, "config": decode_sm90.default_config(M, N, K, sms)}
        run, rows = decode_sm90.decode, decode_sm90.padded_tokens(M)
    else:
        args |= {"config": gemm_sm90.default_config(M, N, K, sms)}
        run, rows = gemm_sm90.gemm, round_up(M, 8)

    def product(x, w):
        (xq, sx), (wq, sw) = x, w
        return run(xq, sx, wq[None], sw[None], layer, **args)

    return product, rows, scale_rows


@functools.cache
def maker(shape: tuple[int, ...], dtype: Any) -> Callable[[Any], jax.Array]:
    """Makes FP8 that looks like quantized activations, BF16, or positive float32 scales."""

    def make(key):
        if dtype == jnp.float32:
            return jax.random.uniform(key, shape, minval=0.5, maxval=1.5) * 1e-2
        values = jax.random.normal(key, shape, jnp.bfloat16)
        return (values * 120).astype(dtype) if dtype == jnp.float8_e4m3fn else values

    return jax.jit(make).lower(jax.eval_shape(random_key, 0)).compile()


def random_key(i: int) -> jax.Array:
    return jax.random.key(i, impl="unsafe_rbg")  # takes the least time to compile


def sets_of(N: int, K: int) -> int:
    """How many sets of operands a run goes through."""
    return min(MAX_SETS, 2 + ROTATED_BYTES // (N * K))


def compiled(product: Callable[..., jax.Array], x: Any, w: Any, sets: int, **options: Any) -> Any:
    """Compiles; what is returned makes operands and gives a function that runs all products."""
    one = jax.jit(product)
    run = jax.jit(lambda xs, ws: [one(x, w) for x, w in zip(xs, ws, strict=True)])
    like = [x] * sets, [w] * sets
    run = run.lower(*like).compile(compiler_options=options)
    leaves, tree = jax.tree.flatten(like)
    makers = [maker(leaf.shape, leaf.dtype) for leaf in leaves]

    def start():
        args = tree.unflatten([make(random_key(i)) for i, make in enumerate(makers)])
        return lambda: jax.block_until_ready(run(*args))

    return start


def compile_tuned(M: int, N: int, K: int) -> dict[str, Callable[[], Any]]:
    """What XLA may tune: its products, and weight-only ones of many tokens. Meanwhile nothing else
    may run, nor be timed.
    """

    def start(dtype, **options):
        x, w = jax.ShapeDtypeStruct((M, K), dtype), jax.ShapeDtypeStruct((N, K), dtype)
        return compiled(dot, x, w, sets_of(N, K), **options)

    fp8 = start(jnp.float8_e4m3fn, xla_gpu_enable_triton_gemm=False)
    weight_only = dataclasses.replace(fp8_weight(N, K), activation_scheme=None)
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    return {
        "BF16": start(jnp.bfloat16, xla_gpu_enable_triton_gemm=M < PREFILL),
        "FP8 tensor": fp8,
        "weight only": compiled(by_api, x, weight_only, sets_of(N, K)),
    }


def fp8_weight(N: int, K: int) -> jq.QuantizedArray:
    """The shapes of a weight in blocked FP8."""
    shape = jax.ShapeDtypeStruct
    scale = shape((-(-N // 128), -(-K // 128)), jnp.float32)
    values = shape((N, K), jnp.float8_e4m3fn)
    return jq.QuantizedArray(values, scale, (128, 128), np.dtype(jnp.bfloat16))


def compile_ours(M: int, N: int, K: int) -> dict[str, Callable[[], Any]]:
    """This package's products. Nothing runs on the GPU: others are timed meanwhile."""
    shape, w, sets = jax.ShapeDtypeStruct, fp8_weight(N, K), sets_of(N, K)
    runs = {"with quant": compiled(by_api, shape((M, K), jnp.bfloat16), w, sets)}
    if (found := kernel(M, N, K)) is not None:
        product, rows, scale_rows = found
        x = shape((rows, K), w.qvalue.dtype), shape((-(-K // 128), scale_rows), jnp.float32)
        runs["jaxquant"] = compiled(product, x, (w.qvalue, w.scale), sets)
    return runs


def cublaslt_run(M: int, N: int, K: int) -> Callable[[], Any] | None:
    """Runs cuBLASLt on every set of operands, or None where torch has it not or it refuses."""
    try:
        import torch  # pyright: ignore
        from torch.nn.functional import ScalingType, scaled_mm  # pyright: ignore
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    def fp8(*shape):
        values = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 120
        return values.to(torch.float8_e4m3fn)

    def scales(rows, columns, padded):
        values = torch.zeros(rows, padded, device="cuda")
        values[:, :columns] = (torch.rand(rows, columns, device="cuda") + 0.5) * 1e-2
        return values

    steps = -(-K // 128)
    operands = [(fp8(M, K), fp8(N, K)) for _ in range(sets_of(N, K))]
    sx = scales(steps, M, M).t()
    sw = scales(-(-N // 128), steps, -(-steps // 4) * 4).t()  # rows of whole 16 bytes

    def run():
        for x, w in operands:
            scaled_mm(
                x, w.t(), scale_a=sx, scale_recipe_a=ScalingType.BlockWise1x128, scale_b=sw,
                scale_recipe_b=ScalingType.BlockWise128x128, output_dtype=torch.bfloat16,
            )  # fmt: skip
        torch.cuda.synchronize()

    try:
        run()
    except (RuntimeError, ValueError):  # so few tokens
        return None
    return run


def kernel_microseconds(run: Callable[[], Any], products: int) -> float:
    """Device time of one product's kernels."""
    from jax._src.lib import mosaic_gpu  # its public face, `profiler.Cupti`, takes jitted functions

    cupti: Any = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore
    run()
    run()
    cupti._cupti_init()
    try:
        for _ in range(REPEATS):
            run()
    finally:
        times = [milliseconds for _, milliseconds in cupti._cupti_get_timings(False)]
    if not times or len(times) % REPEATS:
        raise RuntimeError(f"CUPTI saw {len(times)} kernels in {REPEATS} runs")
    kernels = len(times) // REPEATS
    totals = [sum(times[i : i + kernels]) for i in range(0, len(times), kernels)]
    return statistics.median(totals) * 1e3 / products


def measure(M: int, N: int, K: int, starts: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds by column."""
    times = {name: kernel_microseconds(start(), sets_of(N, K)) for name, start in starts.items()}
    if (run := cublaslt_run(M, N, K)) is not None:
        times["cuBLASLt"] = kernel_microseconds(run, sets_of(N, K))
    return times


def read_bandwidth() -> float:
    """Bytes per second at which a sum reads memory."""
    total = jax.jit(jnp.sum)
    values = jnp.ones((1 << 14, 1 << 14), jnp.int32)
    seconds = kernel_microseconds(lambda: jax.block_until_ready(total(values)), 1) * 1e-6
    return values.nbytes / seconds


def ours(times: dict[str, float]) -> float:
    """The product's time; with quantization, where one kernel does both."""
    return times.get("jaxquant", times["with quant"])


def speed(times: dict[str, float]) -> float | None:
    """Ours over cuBLASLt's."""
    return times["cuBLASLt"] / ours(times) if "cuBLASLt" in times else None


def row(M: int, N: int, K: int, times: dict[str, float]) -> str:
    """One line of the table."""
    cells = [M, N, K, *(f"{times[c]:.1f}" if c in times else "" for c in COLUMNS)]
    ratio = speed(times)
    cells.append("" if ratio is None else f"{ratio:.2f}")
    cells += [f"{times['BF16'] / times[c]:.2f}" for c in ("with quant", "weight only")]
    return f"| {' | '.join(map(str, cells))} |"


RATIOS = ("jaxquant / cuBLASLt speed", "with quant / BF16 speed", "weight only / BF16 speed")
HEADER = f"""\
| M | N | K | {" | ".join(COLUMNS + RATIOS)} |
|--:|--:|--:|{"--:|" * len(COLUMNS + RATIOS)}"""


def summary(results: dict[tuple[int, int, int], dict[str, float]], bandwidth: float) -> str:
    """Geometric means against others, and the rate at which weights are read.

    Args:
      results: microseconds by column, by M, N and K.
      bandwidth: bytes per second of a read.
    """
    groups: dict[str, list[float]] = {}

    def add(name: str, ratio: float) -> None:
        groups.setdefault(name, []).append(ratio)

    for (M, N, K), times in results.items():
        if (ratio := speed(times)) is not None:
            add(f"over cuBLASLt, M {'>=' if M >= PREFILL else '<'} {PREFILL}", ratio)
            add(f"over cuBLASLt, M = {M}", ratio)
        if M < PREFILL:
            other = min(times[c] for c in ("BF16", "cuBLASLt") if c in times)
            add(f"over the faster of BF16 and cuBLASLt, M < {PREFILL}", other / ours(times))
            add(
                f"over the faster of BF16 and cuBLASLt, M < {PREFILL}, quantization included",
                other / times["with quant"],
            )
        if M >= LARGE:
            add(f"over FP8 tensor, M >= {LARGE}", times["FP8 tensor"] / ours(times))
        if M <= STREAMED_TOKENS and N * K >= STREAMED_BYTES:
            add(
                f"weight read, of {bandwidth / 1e12:.2f} TB/s, M <= {STREAMED_TOKENS}, "
                f"{STREAMED_BYTES / 1e6:.0f} MB or more",
                N * K / (ours(times) * 1e-6) / bandwidth,
            )
    lines = []
    for name in sorted(groups, key=lambda name: "M = " in name):  # as they came, one M last
        ratios = groups[name]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        least, most = min(ratios), max(ratios)
        lines.append(f"- {name}: {mean:.3f}, {least:.3f} to {most:.3f} ({len(ratios)})")
    return "\n".join(["", "Speed, geometric mean, least and most (shapes):", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    date = datetime.date.today().isoformat()
    default = pathlib.Path(__file__).parent / "results" / f"matmul-{date}.md"
    parser.add_argument("-o", "--output", type=pathlib.Path, default=default)
    parser.add_argument("-m", "--tokens", type=int, nargs="+", default=MS, metavar="M")
    parser.add_argument("-n", "--shapes", type=int, default=len(NKS), help="of NxK, the first n")
    args = parser.parse_args()

    # As one CUDA graph, independent products would run at the same time.
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_enable_command_buffer="
    os.environ["XLA_FLAGS"] = " ".join(flags)
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"benchmarks/matmul.py times GPU kernels; the device is a {device.platform}")
    title = (
        f"# Matrix products, microseconds\n\n{device.device_kind}, {date}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}, jaxquant {jq.__version__}. Times of kernels by CUPTI; "
        "random data; results in BF16. `benchmarks/matmul.py` says what the columns are.\n"
    )
    lines = [title, HEADER]
    print("\n".join(lines), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    bandwidth = read_bandwidth()
    shapes = {M: [(M, N, K) for N, K in NKS[: args.shapes]] for M in args.tokens}
    with ThreadPoolExecutor() as pool, ThreadPoolExecutor() as ahead:
        futures = {
            shape: ahead.submit(compile_ours, *shape) for of_m in shapes.values() for shape in of_m
        }
        for of_m in shapes.values():
            # Side by side; XLA lets one kernel alone run while it measures it.
            others = list(pool.map(lambda shape: compile_tuned(*shape), of_m))
            for shape, other in zip(of_m, others, strict=True):
                results[shape] = measure(*shape, futures.pop(shape).result() | other)
                lines.append(row(*shape, results[shape]))
                print(lines[-1], flush=True)
                args.output.write_text("\n".join(lines) + "\n")
    lines.append(summary(results, bandwidth))
    print(lines[-1])
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
