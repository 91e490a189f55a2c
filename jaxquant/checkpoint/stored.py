"""What a checkpoint's config.json says of the quantization its weights already have."""

from collections.abc import Mapping
from typing import Any

from jaxquant.config import ConfigError, QuantConfig
from jaxquant.errors import CheckpointError

# What the scales of `X.weight` add to its name: DeepSeek and transformers, llm-compressor.
SCALE_SUFFIXES = ("_scale_inv", "_scale")
_MEND = "start from the original BF16 checkpoint"


def stored_quantization(config: Mapping[str, Any], source: str) -> QuantConfig | None:
    """The QuantConfig of a checkpoint that is blocked FP8 already, or None if it is not quantized.

    Args:
      config: the parsed config.json. Its `quantization_config` may be `fp8` (DeepSeek-V3, Qwen,
        vLLM, transformers) or `compressed-tensors` with the block strategy (llm-compressor).
      source: the file, for messages.

    Raises:
      CheckpointError: any other quantization, by name.
    """
    fields = config.get("quantization_config", config.get("compression_config"))
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{source}: quantization_config is {fields!r}; allowed: an object")
    method = fields.get("quant_method")
    try:
        if method == "compressed-tensors":
            return _compressed_tensors(fields)
        if method != "fp8":
            raise CheckpointError(
                f"{source}: the checkpoint is quantized with {method!r}; allowed: fp8 or "
                f"compressed-tensors with 2-D blocks; {_MEND}"
            )
        if fields.get("weight_block_size") is None:
            raise ConfigError(
                "weight_block_size",
                None,
                "a pair of positive ints (FP8 without blocks, one scale per tensor, is not); "
                + _MEND,
            )
        return QuantConfig.from_dict(fields)
    except ConfigError as e:
        raise CheckpointError(f"{source}: {e}") from None


def _compressed_tensors(fields: Mapping[str, Any]) -> QuantConfig:
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ConfigError("config_groups", groups, "one group of 8-bit float weights in blocks")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    wanted = {"num_bits": 8, "type": "float", "strategy": "block"}
    strategy = weights.get("strategy") if isinstance(weights, Mapping) else None
    if isinstance(strategy, str) and strategy in ("tensor", "channel"):
        field, allowed = "config_groups.weights.strategy", '"block" (one scale per '
        raise ConfigError(field, strategy, f"{allowed}{strategy} is not); {_MEND}")
    if not isinstance(weights, Mapping) or any(weights.get(k) != v for k, v in wanted.items()):
        allowed = f"{wanted} with block_structure; {_MEND}"
        raise ConfigError("config_groups.weights", weights, allowed)
    activations = group.get("input_activations")
    dynamic = isinstance(activations, Mapping) and activations.get("dynamic") is True
    if activations is not None and not dynamic:
        raise ConfigError("config_groups.input_activations", activations, "null or dynamic")
    return QuantConfig(
        weight_block_size=weights.get("block_structure") or (0, 0),  # missing: refused
        activation_scheme="dynamic" if dynamic else None,
    )
