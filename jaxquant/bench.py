"""Timing a checkpoint end to end: load, prefill, decode, in BF16 and in FP8."""

import dataclasses
import os
import platform
import time
from typing import Any

import jax
import numpy as np

from jaxquant.array import QuantizedArray
from jaxquant.checkpoint.hub import resolve
from jaxquant.comparison import kind, timed_load
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError
from jaxquant.generation import bucket
from jaxquant.language_model import LanguageModel
from jaxquant.matmul import tuning
from jaxquant.report import format_bytes, format_table

_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """One model's times; the median of three runs, compilation apart.

    Attributes:
      name: for people.
      nbytes: of its parameters.
      load_seconds: from the page cache or disk, as it is, compilation included.
      prefill_tokens_per_second: prompt tokens of all rows.
      decode_tokens_per_second: new tokens of all rows.
      decode_step_ms: one token of each row.
    """

    name: str
    nbytes: int
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_step_ms: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """Timings that print as a table."""

    device: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"jax": jax.__version__, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        rows = [
            (
                t.name,
                format_bytes(t.nbytes),
                f"{t.load_seconds:.2f} s",
                f"{t.prefill_tokens_per_second:.0f}",
                f"{t.decode_tokens_per_second:.1f}",
                f"{t.decode_step_ms:.2f}",
            )
            for t in self.timings
        ]
        head = ("model", "size", "load", "prefill tok/s", "decode tok/s", "ms/step")
        return (
            f"{self.device}, jax {jax.__version__}, batch {self.batch}, "
            f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens\n"
            f"{format_table(head, rows)}"
        )


def bench(
    path_or_hub_id: str | os.PathLike,
    config: QuantConfig | None = None,
    *,
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    tune: bool = False,
    cache_dtype: str | None = None,
    attention_dtype: str | None = None,
) -> Bench:
    """Times a checkpoint as it is and as FP8, unless it is FP8 already and no config is given.

    With `tune`, the kernel configs of the model's products are measured first and the fastest
    go to the user's table; see `jaxquant.matmul.tuning`. With `cache_dtype`, "float8_e4m3fn", the
    FP8 model is timed once more, with keys and values in FP8 too; with `attention_dtype`, likewise,
    and it has prompts attend in FP8.

    Raises:
      JaxquantError: sizes that do not fit the model's context, or are not positive.
      CheckpointError: a checkpoint that cannot be loaded.
    """
    if batch < 1 or prompt_tokens < 1 or new_tokens < 2:
        raise JaxquantError(
            f"batch {batch}, {prompt_tokens} prompt tokens, {new_tokens} new tokens; "
            "allowed: at least 1, 1 and 2"
        )
    path = resolve(path_or_hub_id)
    timings = []
    for quantization in (None, config or QuantConfig()):
        model, seconds = timed_load(path, quantization)
        if tune and model.quant_config:
            for M in (batch, batch * bucket(prompt_tokens)):
                for weight_only, shapes in _products(model.module, M).items():
                    tuning.tune(shapes, weight_only=weight_only)
        runs: list[tuple[str, str | None, str | None]] = [(kind(model), None, None)]
        if model.quant_config and cache_dtype:
            runs.append((f"{runs[-1][0]}, FP8 cache", cache_dtype, None))
        if model.quant_config and attention_dtype:
            runs.append((f"{runs[-1][0]}, FP8 attention", cache_dtype, attention_dtype))
        for name, *dtypes in runs:
            sizes = batch, prompt_tokens, new_tokens
            timings.append(_time(name, model, seconds, *sizes, *dtypes))
        if model.quant_config and config is None:
            break
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine() if device.platform == "cpu" else ""
    return Bench(f"{device.device_kind} {cpu}".strip(), batch, prompt_tokens, new_tokens,
                 tuple(timings))  # fmt: skip


def _products(module: Any, M: int) -> dict[bool, set[tuple[int, int, int]]]:
    """(M, N, K) of the FP8 products of M tokens, by whether the weight alone is FP8."""
    products: dict[bool, set[tuple[int, int, int]]] = {}
    for leaf in jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)):
        # Experts have other kernels.
        if isinstance(leaf, QuantizedArray) and leaf.qvalue.ndim == 3:
            found = products.setdefault(leaf.activation_scheme is None, set())
            found.add((M, *leaf.qvalue.shape[-2:]))
    return products


def _time(
    name: str,
    model: LanguageModel,
    load_seconds: float,
    B: int,
    T: int,
    new: int,
    cache_dtype: str | None,
    attention_dtype: str | None,
) -> Timing:
    cfg = model.module.cfg
    if T + new > cfg.max_position:
        raise JaxquantError(
            f"{T} prompt and {new} new tokens; the context of the model is {cfg.max_position}"
        )
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T)).tolist()

    options: Any = {"cache_dtype": cache_dtype, "attention_dtype": attention_dtype}

    def run(n: int) -> float:
        start = time.perf_counter()
        model.generate(prompts, max_new_tokens=n, stop_tokens=(), **options)
        return time.perf_counter() - start

    def median(n: int) -> float:
        run(n)  # compiles
        return sorted(run(n) for _ in range(_REPEATS))[_REPEATS // 2]

    # One new token is prefill and one step; the rest is steps.
    first, total = median(1), median(new)
    step = max(total - first, 1e-9) / (new - 1)
    prefill = max(first - step, 1e-9)
    return Timing(name, model.nbytes, load_seconds, B * T / prefill, B / step, step * 1e3)
