"""StableLM 2: a Llama with layer norms, and with a part of each head rotated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxquant.models import llama
from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import DenseConfig, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import RMSNorm, unloaded


@dataclasses.dataclass(frozen=True)
class StableLMConfig(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "StableLMConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        hf.require("qk_layernorm", (False, None), default=False)
        hf.require("use_parallel_residual", (False, None), default=False)
        sizes: Any = read_sizes(
            hf, num_kv_heads=32, max_position=4096, eps=("layer_norm_eps", 1e-5)
        )
        kind = LayerKind(hf.rope(sizes["head_dim"], partial=0.25))
        return StableLMConfig(
            **sizes,
            layer_kinds=(kind,) * sizes["num_layers"],
            qkv_bias=hf.flag("use_qkv_bias", default=False),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CenteredNorm:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, all in float32."""

    weight: Float[Array, "*L K"]
    bias: Float[Array, "*L K"]
    eps: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*batch K"], layer: Any = None) -> Float[Array, "*batch K"]:
        """Normalizes the last axis."""
        at = ... if layer is None else layer
        weight, bias = (p[at].astype(jnp.float32) for p in (self.weight, self.bias))
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * weight + bias).astype(x.dtype)


class LayerNorm(RMSNorm):
    """The norm of StableLM."""

    def __init__(self, *shape: int, eps: float, dtype: Any):
        super().__init__(*shape, eps=eps, dtype=dtype)
        self.bias = unloaded(*shape, dtype=dtype)

    @property
    def prologue(self) -> CenteredNorm:
        """See `RMSNorm.prologue`."""
        return CenteredNorm(self.weight.get_value(), self.bias.get_value(), self.eps)


class Layers(llama.Layers):
    """Llama's, with layer norms."""

    norm_type = LayerNorm


class StableLM(Decoder):
    """A decoder of such layers."""

    layers_type = Layers
    norm_type = LayerNorm
