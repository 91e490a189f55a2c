"""Gemma 2 and the text model of Gemma 3.

Embeddings are scaled by sqrt(hidden_size), norms multiply with 1 + weight and stand on both sides
of attention and MLP, most layers see a window. Gemma 2 caps scores and logits; Gemma 3 normalizes
queries and keys, and its windowed layers have a rotary embedding of their own.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxquant.models import dense
from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import ACTIVATIONS, MLP, DenseConfig, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import RMSNorm, Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(DenseConfig):
    """Sizes and options, as in config.json.

    Attributes:
      logits_softcap: if given, logits become `logits_softcap * tanh(logits / logits_softcap)`.
    """

    logits_softcap: float | None

    @staticmethod
    def from_hf(hf: HFConfig) -> "GemmaConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        gemma2 = hf.model_type == "gemma2"
        hf.require("use_bidirectional_attention", (False, None), default=False)
        sizes: Any = read_sizes(
            hf,
            head_dim=256,
            num_kv_heads=4,
            max_position=8192 if gemma2 else 131072,
            tied=True,
        )
        softcap, logits_softcap = (
            hf.optional_number(field, default=default if gemma2 else None)
            for field, default in (
                ("attn_logit_softcapping", 50.0),
                ("final_logit_softcapping", 30.0),
            )
        )
        if not gemma2:
            hf.require("attn_logit_softcapping", (None,), default=None)
        bias = hf.flag("attention_bias", default=False)
        return GemmaConfig(
            **sizes,
            layer_kinds=_layer_kinds(hf, sizes, gemma2),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=None if gemma2 else "head",
            scale=hf.number("query_pre_attn_scalar", default=256.0) ** -0.5,
            softcap=softcap,
            activation=hf.choice(
                "hidden_activation", tuple(ACTIVATIONS), default="gelu_pytorch_tanh"
            ),
            logits_softcap=logits_softcap,
        )


def _layer_kinds(hf: HFConfig, sizes: dict[str, Any], gemma2: bool) -> tuple[LayerKind, ...]:
    """Of a pattern of some windowed layers and one that sees all."""
    n, D = sizes["num_layers"], sizes["head_dim"]
    period = 2 if gemma2 else hf.size("sliding_window_pattern", default=6)
    local, whole = (hf.rope(D),) * 2 if gemma2 else _gemma3_ropes(hf, D)
    kinds = {
        "sliding_attention": LayerKind(local, hf.optional_size("sliding_window", default=4096)),
        "full_attention": LayerKind(whole),
    }
    sliding, full = kinds
    default = tuple(sliding if (l + 1) % period else full for l in range(n))
    return tuple(kinds[name] for name in hf.layer_types(n, default=default, allowed=tuple(kinds)))


def _gemma3_ropes(hf: HFConfig, head_dim: int) -> tuple[Any, Any]:
    """Of windowed layers, and of the others; only the latter are scaled for long texts."""
    local = hf.number("rope_local_base_freq", default=10000.0)
    theta = hf.number("rope_theta", default=1000000.0)
    if hf.fields.get("rope_parameters") is None:
        whole, windowed = hf.section("rope_scaling"), HFConfig({}, hf.source)
    else:
        hf.require("rope_scaling", (None,), default=None)
        sections, kinds = hf.section("rope_parameters"), ("full_attention", "sliding_attention")
        if unknown := sections.fields.keys() - set(kinds):
            raise sections.error(min(unknown), f"only {' and '.join(kinds)}")
        whole, windowed = map(sections.section, kinds)
    return (
        hf.rope_of(windowed, head_dim, theta=local),
        hf.rope_of(whole, head_dim, theta=theta),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OffsetRMSNorm:
    """`x / sqrt(mean(x^2) + eps) * (1 + weight)`, all in float32; see `jaxquant.matmul.RMSNorm`."""

    weight: Float[Array, "*L K"]
    eps: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*batch K"], layer: Any = None) -> Float[Array, "*batch K"]:
        """Normalizes the last axis."""
        weight = (self.weight if layer is None else self.weight[layer]).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * (1 + weight)).astype(x.dtype)


class GemmaNorm(RMSNorm):
    """The norm of Gemma."""

    @property
    def prologue(self) -> OffsetRMSNorm:
        """See `RMSNorm.prologue`."""
        return OffsetRMSNorm(self.weight.get_value(), self.eps)


class Attention(dense.Attention):
    """Grouped-query attention with Gemma's norms."""

    norm_type: ClassVar[Any] = GemmaNorm


class Layers(nnx.Module):
    """A stack of equal layers: norms before attention and MLP, and behind them."""

    def __init__(self, cfg: GemmaConfig, stack: Stack, dtype: Any):
        def norm() -> GemmaNorm:
            return GemmaNorm(len(stack.layers), cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)

        self.input_layernorm = norm()
        self.self_attn = Attention(cfg, stack, dtype)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(cfg, stack, dtype)
        self.post_feedforward_layernorm = norm()

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, *rest: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies one layer; see `Decoder`."""
        y, cache = self.self_attn(x, l, *rest, norm=self.input_layernorm.prologue)
        x = x + self.post_attention_layernorm(y, l)
        y = self.mlp(x, l, norm=self.pre_feedforward_layernorm.prologue)
        return x + self.post_feedforward_layernorm(y, l), cache


class Gemma(Decoder):
    """A decoder of such layers, with scaled embeddings and capped logits."""

    layers_type = Layers
    norm_type = GemmaNorm

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """The embedding, scaled."""
        x = super().embed(ids)
        return x * jnp.asarray(math.sqrt(self.cfg.hidden_size), x.dtype)  # rounded, as in training

    def head(self, x: Float[Array, "*batch K"]) -> Float32[Array, "*batch V"]:
        """Final norm and logits in float32."""
        logits, cap = super().head(x), self.cfg.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
