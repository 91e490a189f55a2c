"""The compressed-tensors layout of blocked FP8, as llm-compressor writes it (its FP8_BLOCK).

The bytes are those of the fp8 layout; scales are called `X_scale` instead of `X_scale_inv`, and
config.json says the same in other words.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxquant.checkpoint.shard_files import TensorSource
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError


def check_layout(config: QuantConfig) -> None:
    """Raises JaxquantError if the layout has no words for a config."""
    for field, allowed in (("fmt", "e4m3"), ("scale_fmt", None)):
        if getattr(config, field) != allowed:
            raise JaxquantError(
                f"layout 'compressed-tensors': {field} is {getattr(config, field)!r}; allowed: "
                f"{allowed!r}; take layout 'fp8'"
            )


def renamed(tensors: Iterable[TensorSource]) -> list[TensorSource]:
    """Tensors of the fp8 layout under the names of this one."""

    def rename(name: str) -> str:
        return name.removesuffix("_inv") if name.endswith("_scale_inv") else name

    return [dataclasses.replace(tensor, name=rename(tensor.name)) for tensor in tensors]


def quantization_config(config: QuantConfig, kept: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `kept` are the linear modules that are not FP8."""
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    blocks = {"strategy": "block", "block_structure": list(config.weight_block_size)}
    groups = {"strategy": "group", "group_size": config.weight_block_size[1]}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, **blocks, "dynamic": False},
                "input_activations": {**eight_bits, **groups, "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
    }
