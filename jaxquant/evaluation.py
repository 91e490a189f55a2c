"""Perplexity of a model on a text, and its KL divergence from another model."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxquant.errors import JaxquantError
from jaxquant.generation import ATTENTION_DTYPES, check_dtype
from jaxquant.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
      tokens: how many were predicted: all but the first of each window.
      perplexity: exp of the mean negative log likelihood, in nats.
      kl: mean KL(reference || model) in nats, or None without a reference.
      agreement: share of tokens for which both models' most likely one is the same, or None.
    """

    tokens: int
    perplexity: float
    kl: float | None = None
    agreement: float | None = None


def windows(tokens: Sequence[int], size: int = 1024, count: int | None = None) -> np.ndarray:
    """Cuts a text into windows `[count, size]` int32, each read with nothing before it.

    Raises:
      JaxquantError: the text is shorter than two tokens, or than count * size; size is less than
        2, or count less than 1.
    """
    if size < 2 or (count is not None and count < 1):
        raise JaxquantError(
            f"{count} windows of {size} tokens; allowed: at least 1 window of at least 2 tokens"
        )
    length = min(size, len(tokens))
    have = len(tokens) // length if length > 1 else 0
    count = count or max(have, 1)
    if count > have:
        raise JaxquantError(
            f"the text has {len(tokens)} tokens; {count} windows of {size} tokens need more text"
        )
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


def evaluate(
    model: LanguageModel,
    tokens: Int[np.ndarray, "count size"],
    reference: LanguageModel | None = None,
    attention_dtype: str | None = None,
) -> Evaluation:
    """Scores a model on windows of tokens, one window at a time.

    Args:
      model: the model.
      tokens: from `windows`.
      reference: what to compare with, usually the model that is not quantized.
      attention_dtype: what the model attends in: None, its dtype, or "float8_e4m3fn"; see
        `jaxquant.attention.fp8`.

    Raises:
      JaxquantError: windows longer than a model's context, token ids outside its vocabulary, or
        models of different vocabularies; another attention_dtype.
    """
    check_dtype("attention_dtype", attention_dtype, ATTENTION_DTYPES)
    _check(model, tokens)
    if reference is not None:
        _check(reference, tokens)
        sizes = model.module.cfg.vocab_size, reference.module.cfg.vocab_size
        if sizes[0] != sizes[1]:
            raise JaxquantError(
                f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens; "
                "a reference has the same one"
            )
    totals = np.zeros(3)
    for window in tokens:
        modules = model.module, reference and reference.module
        scores = _score(*modules, window[None], attention_dtype)
        totals += np.asarray(jax.device_get(scores), np.float64)
    n = tokens.shape[0] * (tokens.shape[1] - 1)
    nll, kl, agreement = totals / n
    compared = (float(kl), float(agreement)) if reference is not None else (None, None)
    return Evaluation(n, math.exp(nll), *compared)


def _check(model: LanguageModel, tokens: np.ndarray) -> None:
    cfg = model.module.cfg
    if tokens.shape[1] > cfg.max_position:
        raise JaxquantError(
            f"{model.path}: a window has {tokens.shape[1]} tokens; the context of the model is "
            f"{cfg.max_position}"
        )
    if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
        raise JaxquantError(
            f"{model.path}: token ids are {tokens.min()} to {tokens.max()}; "
            f"allowed: 0 to {cfg.vocab_size - 1}"
        )


@functools.partial(jax.jit, static_argnames="attention_dtype")
def _score(
    module: Any, reference: Any, tokens: Array, attention_dtype: str | None
) -> tuple[Array, Array, Array]:
    """Sums over a window: negative log likelihood, KL divergence, equal most likely tokens."""
    logits = module(tokens, attention_dtype)[:, :-1]
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).sum()
    if reference is None:
        return nll, jnp.zeros(()), jnp.zeros(())
    ref_logp = jax.nn.log_softmax(reference(tokens)[:, :-1])
    kl = (jnp.exp(ref_logp) * (ref_logp - logp)).sum()
    same = (jnp.argmax(logp, -1) == jnp.argmax(ref_logp, -1)).sum()
    return nll, kl, same.astype(jnp.float32)
