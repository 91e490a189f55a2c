"""Qwen2, Qwen2.5 and Qwen3: a Llama with biases on q, k, v, or with normalized queries and keys."""

import dataclasses
from typing import Any

from jaxquant.models.dense import DenseConfig, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class QwenConfig(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "QwenConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        qwen3 = hf.model_type == "qwen3"
        sizes: Any = read_sizes(
            hf, head_dim=128 if qwen3 else None, num_kv_heads=32, max_position=32768
        )
        bias = hf.flag("attention_bias", default=False) if qwen3 else False
        return QwenConfig(
            **sizes,
            layer_kinds=_layer_kinds(hf, sizes),
            qkv_bias=bias or not qwen3,
            out_bias=bias,
            qk_norm="head" if qwen3 else None,
        )


def _layer_kinds(hf: HFConfig, sizes: dict[str, Any]) -> tuple[LayerKind, ...]:
    rope, n = hf.rope(sizes["head_dim"]), sizes["num_layers"]
    full = LayerKind(rope)
    if not hf.flag("use_sliding_window", default=False):
        # A window that is written down all the same is not used.
        hf.layer_types(n, default=("full_attention",) * n, allowed=("full_attention",))
        return (full,) * n
    window = hf.optional_size("sliding_window", default=4096)
    if window is None:
        return (full,) * n
    first = hf.count("max_window_layers", default=28)
    default = tuple("sliding_attention" if l >= first else "full_attention" for l in range(n))
    sliding = LayerKind(rope, window)
    kinds = {"full_attention": full, "sliding_attention": sliding}
    return tuple(kinds[kind] for kind in hf.layer_types(n, default=default, allowed=tuple(kinds)))


class Qwen(Llama):
    """A Llama with Qwen's options."""
