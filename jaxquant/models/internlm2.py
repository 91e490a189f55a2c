"""InternLM2 and InternLM2.5: a Llama whose checkpoint has names of its own.

`wqkv` holds, for each key/value head, the rows of its query heads, of the key and of the value.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxquant.models.dense import DenseConfig, LayerKind, read_sizes
from jaxquant.models.fused import FusedRows
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class InternLM2Config(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "InternLM2Config":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        hf.require("tie_word_embeddings", (False, None), default=False)
        sizes: Any = read_sizes(hf, max_position=2048)
        bias = hf.flag("bias", default=False)
        kind = LayerKind(hf.rope(sizes["head_dim"]))
        return InternLM2Config(
            **sizes, layer_kinds=(kind,) * sizes["num_layers"], qkv_bias=bias, out_bias=bias
        )


class InternLM2(Llama):
    """A Llama under InternLM2's names."""

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "self_attn/q_proj": "attention/wqkv/wq",
        "self_attn/k_proj": "attention/wqkv/wk",
        "self_attn/v_proj": "attention/wqkv/wv",
        "self_attn/o_proj": "attention/wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp/gate_proj": "feed_forward/w1",
        "mlp/up_proj": "feed_forward/w3",
        "mlp/down_proj": "feed_forward/w2",
        "lm_head": "output",
    }

    @staticmethod
    def fused(cfg: InternLM2Config) -> Mapping[str, FusedRows]:
        """Where q, k and v lie in `wqkv`."""
        D, queries = cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
        return {"wqkv": FusedRows({"wq": queries * D, "wk": D, "wv": D}, cfg.num_kv_heads)}
