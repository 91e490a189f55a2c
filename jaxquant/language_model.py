"""LanguageModel: a loaded checkpoint that computes logits and generates."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int

from jaxquant import generation
from jaxquant.array import QuantizedArray, nbytes
from jaxquant.checkpoint import export
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.hub import resolve
from jaxquant.checkpoint.loader import load
from jaxquant.checkpoint.plan import make_plan
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError, JaxquantError
from jaxquant.report import QuantReport


class LanguageModel:
    """A model loaded by `from_pretrained`.

    Attributes:
      module: the Flax NNX module, with its parameters.
      path: the checkpoint's folder.
      hf_config: its config.json.
      generation_config: its generation_config.json, or {}.
      quant_config: how it is quantized, or None.
      report: what became of each tensor.
    """

    def __init__(
        self,
        module: Any,
        path: Path,
        hf_config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        quant_config: QuantConfig | None,
        report: QuantReport,
    ):
        self.module = module
        self.path = path
        self.hf_config = hf_config
        self.generation_config = generation_config
        self.quant_config = quant_config
        self.report = report

    def __call__(
        self, tokens: Int[Array | np.ndarray, "batch seq"]
    ) -> Float32[Array, "batch seq vocab"]:
        """Logits of every token, float32. Compiled once per shape."""
        return _logits(self.module, jnp.asarray(tokens, jnp.int32))

    def generate(
        self,
        tokens: Int[Array | np.ndarray, "batch seq"] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        stop_tokens: Sequence[int] | None = None,
        cache_dtype: str | None = None,
        attention_dtype: str | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Continues prompts.

        Args:
          tokens: token ids; prompts of a sequence of sequences may differ in length.
          max_new_tokens: per prompt, at most.
          stop_tokens: ids that end a sequence; default the checkpoint's end-of-sequence tokens.
          cache_dtype: "float8_e4m3fn" keeps keys and values in FP8; default the model's dtype.
          attention_dtype: "float8_e4m3fn" has prompts attend in FP8; default the model's dtype.
          **sampling: `temperature` (0, the default, is greedy), `top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `seed`; see `jaxquant.generation.Sampling`.

        Returns:
          The new tokens of each prompt, the stop token included if there was one.

        Raises:
          JaxquantError: a prompt that is empty or too long, or a value out of range.
        """
        return generation.generate(
            self.module,
            np.asarray(tokens).tolist() if isinstance(tokens, jax.Array | np.ndarray) else tokens,
            generation.Sampling(**sampling),
            max_new_tokens=max_new_tokens,
            stop_tokens=self.stop_tokens if stop_tokens is None else stop_tokens,
            cache_dtype=cache_dtype,
            attention_dtype=attention_dtype,
        )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The end-of-sequence ids of generation_config.json, or of config.json."""
        ids = self.generation_config.get("eos_token_id", self.hf_config.get("eos_token_id"))
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int for i in ids):
            raise CheckpointError(
                f"{self.path}: eos_token_id is {ids!r}; allowed: a token id or a list of them"
            )
        return tuple(ids)

    def save_pretrained(self, directory: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Writes the model as a checkpoint in the layout of transformers, vLLM and SGLang.

        Tokenizer files and generation_config.json come along. The folder appears whole or not at
        all.

        Raises:
          CheckpointError: the folder exists (unless `overwrite`), or the disk is full.
        """
        with CheckpointFolder(self.path) as folder:
            files = folder.other_files()
        return export.save_model(
            self.module,
            self.hf_config,
            self.quant_config,
            Path(directory),
            files,
            overwrite=overwrite,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, scales included."""
        leaves = jax.tree.leaves(self.module, is_leaf=lambda x: isinstance(x, QuantizedArray))
        return sum(map(nbytes, leaves))

    def __repr__(self) -> str:
        kind = "unquantized" if self.quant_config is None else self.quant_config.describe()
        return f"LanguageModel({self.path.name!r}, {kind}, {self.nbytes / 1e6:.1f} MB)"


def from_pretrained(
    path_or_hub_id: str | os.PathLike,
    quant_config: QuantConfig | Mapping[str, Any] | None = None,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    *,
    progress: bool | None = None,
) -> LanguageModel:
    """Loads a checkpoint, quantizing it on the way if asked to.

    Each tensor is quantized when it is read, so the model never exists whole in BF16.

    Args:
      path_or_hub_id: a folder with config.json and safetensors files, or 'org/name' on the
        Hugging Face hub (the local cache is used first).
      quant_config: how to quantize, or Hugging Face's `quantization_config`; None takes the
        checkpoint as it is, blocked FP8 included.
      dtype: of activations and of what is not quantized.
      mesh: devices to divide the weights among, along its only axis or the one named "model"; a
        process reads what its own devices hold. None loads everything onto the default device.
      progress: whether to show a bar; None shows it on a terminal.

    Raises:
      CheckpointError: a checkpoint that cannot be loaded as asked; names file, tensor or field.
      JaxquantError: an argument that is none of those above.
    """
    if isinstance(quant_config, Mapping):
        quant_config = QuantConfig.from_dict(quant_config)
    if quant_config is not None and not isinstance(quant_config, QuantConfig):
        raise JaxquantError(f"quant_config is {quant_config!r}; allowed: None or a QuantConfig")
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise JaxquantError(f"dtype is {dtype.name}; allowed: bfloat16, float16, float32")
    path = resolve(path_or_hub_id)
    with CheckpointFolder(path) as folder:
        plan = make_plan(folder, quant_config)
        module, report = load(folder, plan, dtype, mesh, progress=progress)
        return LanguageModel(
            module, path, folder.config, folder.generation_config, plan.config, report
        )


def save_pretrained(
    model_or_params: Any, directory: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Writes a LanguageModel as a Hugging Face checkpoint, or any parameter tree as safetensors.

    See `LanguageModel.save_pretrained` and `jaxquant.checkpoint.export.save_params`.
    """
    if isinstance(model_or_params, LanguageModel):
        return model_or_params.save_pretrained(directory, overwrite=overwrite)
    return export.save_params(model_or_params, Path(directory), overwrite=overwrite)


@jax.jit
def _logits(module: Any, tokens: Array) -> Array:
    return module(tokens)
