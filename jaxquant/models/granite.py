"""Granite 3: a Llama with multipliers on embeddings, scores, residuals and logits."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Float32, Int

from jaxquant.models import llama
from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import DenseConfig, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(DenseConfig):
    """Sizes and options, as in config.json.

    Attributes:
      embedding_multiplier: of the embedding.
      residual_multiplier: of what attention and MLP add to the residual stream.
      logits_scaling: what logits are divided by.
    """

    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float

    @staticmethod
    def from_hf(hf: HFConfig) -> "GraniteConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        sizes: Any = read_sizes(hf, max_position=2048)
        bias = hf.flag("attention_bias", default=False)
        return GraniteConfig(
            **sizes,
            layer_kinds=(LayerKind(hf.rope(sizes["head_dim"])),) * sizes["num_layers"],
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=hf.flag("mlp_bias", default=False),
            scale=hf.number("attention_multiplier", default=1.0),
            embedding_multiplier=hf.number("embedding_multiplier", default=1.0),
            residual_multiplier=hf.number("residual_multiplier", default=1.0),
            logits_scaling=hf.number("logits_scaling", default=1.0),
        )


class Layers(llama.Layers):
    """Llama's, with scaled residuals."""

    def __init__(self, cfg: GraniteConfig, *args: Any):
        super().__init__(cfg, *args)
        self.multiplier = cfg.residual_multiplier

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, *rest: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies one layer; see `Decoder`."""
        y, cache = self.self_attn(x, l, *rest, norm=self.input_layernorm.prologue)
        x = x + y * self.multiplier
        y = self.mlp(x, l, norm=self.post_attention_layernorm.prologue)
        return x + y * self.multiplier, cache


class Granite(Decoder):
    """A decoder of such layers."""

    layers_type = Layers

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """The embedding, scaled."""
        return super().embed(ids) * self.cfg.embedding_multiplier

    def head(self, x: Float[Array, "*batch K"]) -> Float32[Array, "*batch V"]:
        """Final norm and logits in float32."""
        return super().head(x) / self.cfg.logits_scaling
