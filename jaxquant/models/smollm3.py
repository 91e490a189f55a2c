"""SmolLM3: a Llama in which every fourth layer is told nothing of positions."""

import dataclasses
from typing import Any

from jaxquant.models.dense import DenseConfig, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "SmolLM3Config":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        hf.require("use_sliding_window", (False, None), default=False)
        sizes: Any = read_sizes(hf, num_kv_heads=4, max_position=32768, tied=True)
        bias = hf.flag("attention_bias", default=False)
        return SmolLM3Config(
            **sizes,
            layer_kinds=_layer_kinds(hf, sizes),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=hf.flag("mlp_bias", default=False),
        )


def _layer_kinds(hf: HFConfig, sizes: dict[str, Any]) -> tuple[LayerKind, ...]:
    n, rotated = sizes["num_layers"], hf.fields.get("no_rope_layers")
    interval = hf.size("no_rope_layer_interval", default=4)
    if rotated is None:
        rotated = [int((l + 1) % interval != 0) for l in range(n)]
    if not isinstance(rotated, list) or len(rotated) != n or any(r not in (0, 1) for r in rotated):
        raise hf.error("no_rope_layers", f"{n} of 0 (without) and 1 (with rotary embedding)")
    hf.layer_types(n, default=("full_attention",) * n, allowed=("full_attention",))
    rope = hf.rope(sizes["head_dim"], theta=2000000.0)
    return tuple(LayerKind(rope if r else None) for r in rotated)


class SmolLM3(Llama):
    """A Llama with such layers."""
