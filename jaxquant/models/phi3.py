"""Phi-3 (4k) and Phi-4: a Llama whose checkpoint has q, k, v as one tensor, and gate, up."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxquant.models.dense import DenseConfig, LayerKind, read_sizes
from jaxquant.models.fused import FusedRows
from jaxquant.models.glm import Glm
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class Phi3Config(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "Phi3Config":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        for section in map(hf.section, ("rope_parameters", "rope_scaling")):
            for field in ("rope_type", "type"):  # others mean longrope here, whatever they say
                section.require(field, ("default", None), default=None)
        sizes: Any = read_sizes(hf, max_position=4096, eps=("rms_norm_eps", 1e-5))
        kind = LayerKind(
            hf.rope(sizes["head_dim"], partial=1.0), hf.optional_size("sliding_window")
        )
        return Phi3Config(**sizes, layer_kinds=(kind,) * sizes["num_layers"])


class Phi3(Llama):
    """A Llama under Phi-3's names."""

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        f"self_attn/{name}_proj": f"self_attn/qkv_proj/{name}_proj" for name in "qkv"
    } | {**Glm.checkpoint_names}

    @staticmethod
    def fused(cfg: Phi3Config) -> Mapping[str, FusedRows]:
        """Where q, k, v lie in `qkv_proj`, and gate, up in `gate_up_proj`."""
        D, wide = cfg.head_dim, cfg.intermediate_size
        q, kv = cfg.num_heads * D, cfg.num_kv_heads * D
        return {
            "qkv_proj": FusedRows({"q_proj": q, "k_proj": kv, "v_proj": kv}),
            "gate_up_proj": FusedRows({"gate_proj": wide, "up_proj": wide}),
        }
