"""BF16 beside FP8: size, load time, perplexity, KL."""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.checkpoint.folder import CONFIG_NAME, read_json_object
from jaxquant.checkpoint.hub import resolve
from jaxquant.checkpoint.stored import stored_quantization
from jaxquant.config import QuantConfig
from jaxquant.evaluation import Evaluation, evaluate, windows
from jaxquant.language_model import LanguageModel, from_pretrained
from jaxquant.report import format_bytes, format_table
from jaxquant.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Attributes:
      name: for people.
      nbytes: of its parameters.
      load_seconds: what loading took, compilation included.
      evaluation: its scores; KL and agreement are against the first row's model.
    """

    name: str
    nbytes: int
    load_seconds: float
    evaluation: Evaluation


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows that print as a table, the reference first."""

    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        def number(x: float | None, spec: str) -> str:
            return "" if x is None else format(x, spec)

        table = format_table(
            ("model", "size", "load", "perplexity", "KL", "same top token"),
            [
                (
                    row.name,
                    format_bytes(row.nbytes),
                    f"{row.load_seconds:.1f} s",
                    f"{row.evaluation.perplexity:.3f}",
                    number(row.evaluation.kl, ".4f"),
                    number(row.evaluation.agreement, ".1%"),
                )
                for row in self.rows
            ],
        )
        return f"{table}\n{self.rows[0].evaluation.tokens} tokens predicted"


def compare(
    path_or_hub_id: str | os.PathLike,
    text: str,
    config: QuantConfig | None = None,
    *,
    against: str | os.PathLike | None = None,
    dtype: Any = jnp.bfloat16,
    window: int = 1024,
    count: int | None = None,
    attention_dtype: str | None = None,
) -> Comparison:
    """Loads a checkpoint as it is and as FP8, and scores both on a text.

    Args:
      path_or_hub_id: the checkpoint to quantize; or, with `against`, one that is FP8 already.
      text: what to predict.
      config: how to quantize; default `QuantConfig()`, or as it is if it is FP8 already.
      against: the reference; default the same checkpoint, not quantized.
      dtype: of activations.
      window: tokens read at once.
      count: how many windows; default all of the text.
      attention_dtype: "float8_e4m3fn" scores the last model once more, attending in FP8.

    Raises:
      JaxquantError: the text is too short.
      CheckpointError: a checkpoint that cannot be loaded as asked.
    """
    path = resolve(path_or_hub_id)
    tokens = Tokenizer.from_folder(path).encode(text, add_special_tokens=False)
    tokens = windows(tokens, window, count)
    reference, seconds = timed_load(against or path, None, dtype)
    rows = [Row(kind(reference), reference.nbytes, seconds, evaluate(reference, tokens))]
    model = reference
    source = path / CONFIG_NAME
    stored = stored_quantization(read_json_object(source), str(source))
    if config or against or not stored:
        model, seconds = timed_load(path, config or (None if stored else QuantConfig()), dtype)
        scores = evaluate(model, tokens, reference)
        rows.append(Row(kind(model), model.nbytes, seconds, scores))
    if attention_dtype:
        scores = evaluate(model, tokens, reference, attention_dtype)
        rows.append(Row(f"{kind(model)}, FP8 attention", model.nbytes, seconds, scores))
    return Comparison(tuple(rows))


def kind(model: LanguageModel) -> str:
    """What a model computes in, for people: `bfloat16`, `FP8 W8A8` or `FP8 W8A16`."""
    if model.quant_config is None:
        return jnp.dtype(model.module.embed_tokens.weight.get_value().dtype).name
    return "FP8 W8A8" if model.quant_config.activation_scheme else "FP8 W8A16"


def timed_load(
    path_or_hub_id: str | os.PathLike, config: QuantConfig | None, dtype: Any = jnp.bfloat16
) -> tuple[LanguageModel, float]:
    """A model, and the seconds that loading it took."""
    start = time.perf_counter()
    model = from_pretrained(path_or_hub_id, config, dtype)
    jax.block_until_ready(model.module)
    return model, time.perf_counter() - start
