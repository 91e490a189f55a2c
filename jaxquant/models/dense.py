"""What dense decoders share: their sizes, grouped-query attention and the gated MLP."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxquant.matmul import Prologue, QuantizedTokens, SiluMul, gated_mlp
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import FusedLinear, Linear, RMSNorm, Rope, Stack, projections


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeluMul:
    """`gelu(gate) * up` with gelu's tanh form; see `jaxquant.matmul.SiluMul`."""

    def __call__(self, x: Float[Array, "*batch A"], layer: Any = None) -> Float[Array, "*batch K"]:
        """Multiplies the halves of the last axis."""
        gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)


# What config.json calls them: what stands before the down projection.
ACTIVATIONS: dict[str, Prologue] = {"silu": SiluMul(), "gelu_pytorch_tanh": GeluMul()}
# There is a LayerKind for each, before a look at the tensors.
_MAX_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How one layer attends, where layers of a model differ in it.

    Attributes:
      rope: the rotary embedding; None tells attention nothing of positions.
      window: how many tokens a token sees, itself included; None is all.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Sizes and options of a dense decoder.

    Attributes:
      layer_kinds: one for each layer.
      qkv_bias, out_bias, mlp_bias: whether these projections have biases.
      qk_norm: None; "head": queries and keys are normalized head by head; "all": all heads at once.
      scale: what `q k^T` is multiplied with; None is `1 / sqrt(head_dim)`.
      softcap: of attention; see `attention.Forward.attend`.
      activation: of the MLP, one of ACTIVATIONS.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layer_kinds: tuple[LayerKind, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    scale: float | None = None
    softcap: float | None = None
    activation: str = "silu"


def read_sizes(
    hf: HFConfig,
    *,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    max_position: int | None = None,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    tied: bool = False,
) -> dict[str, Any]:
    """The sizes of a DenseConfig from config.json, given a family's defaults.

    Args:
      hf: the config.
      head_dim: default `hidden_size // num_attention_heads`.
      num_kv_heads: default num_attention_heads.
      max_position: of `max_position_embeddings`; None requires it.
      eps: field of the norms' epsilon, and its default.
      tied: of `tie_word_embeddings`.
    """
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")

    def size(field: str, default: int | None, derived: int) -> int:
        # Null asks for what follows from other sizes, whatever the family's default is.
        derive = field in hf.fields or default is None
        return hf.size(field, default=derived if derive else default)

    kv_heads = size("num_key_value_heads", num_kv_heads, heads)
    if heads % kv_heads:
        raise hf.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    num_layers = hf.size("num_hidden_layers")
    if num_layers > _MAX_LAYERS:
        raise hf.error("num_hidden_layers", f"at most {_MAX_LAYERS}")
    return {
        "vocab_size": hf.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": hf.size("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size("head_dim", head_dim, hidden // heads),
        "max_position": hf.size("max_position_embeddings", default=max_position),
        "rms_norm_eps": hf.number(eps[0], default=eps[1]),
        "tie_word_embeddings": hf.flag("tie_word_embeddings", default=tied),
    }


class Attention(nnx.Module):
    """Grouped-query attention of a stack of layers."""

    norm_type: ClassVar[Any] = RMSNorm

    def __init__(self, cfg: DenseConfig, stack: Stack, dtype: Any):
        self.cfg = cfg
        L, D, hidden = len(stack.layers), cfg.head_dim, cfg.hidden_size
        q_size, kv_size = cfg.num_heads * D, cfg.num_kv_heads * D
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = projections("qkv_proj", qkv, hidden, stack, bias=cfg.qkv_bias, dtype=dtype)
        self.o_proj = Linear(L, hidden, q_size, bias=cfg.out_bias, dtype=dtype)
        if cfg.qk_norm is not None:
            sizes = (D, D) if cfg.qk_norm == "head" else (q_size, kv_size)
            self.q_norm, self.k_norm = (
                self.norm_type(L, size, eps=cfg.rms_norm_eps, dtype=dtype) for size in sizes
            )

    def __call__(
        self,
        x: Float[Array, "B T K"],
        l: Any,
        tokens: Any,
        cache: Any,
        cache_layer: Any,
        kind: LayerKind,
        *,
        norm: Prologue | None = None,
        residual: Float[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T K"], Any]:
        """`attention(norm(x)) + residual` of one layer; see `Decoder` for `tokens` and `cache`."""
        cfg, heads = self.cfg, (*x.shape[:-1], -1, self.cfg.head_dim)
        q, k, v = self.qkv_proj(x, l, norm)
        if cfg.qk_norm == "all":
            q, k = self.q_norm(q, l), self.k_norm(k, l)
        q, k, v = (y.reshape(heads) for y in (q, k, v))
        if cfg.qk_norm == "head":
            q, k = self.q_norm(q, l), self.k_norm(k, l)
        attended, cache = tokens.attend(
            q,
            k,
            v,
            cache,
            cache_layer,
            rope=kind.rope,
            window=kind.window,
            scale=cfg.scale,
            softcap=cfg.softcap,
            may_quantize=self.o_proj.quantizes,
        )
        if not isinstance(attended, QuantizedTokens):
            attended = attended.reshape(*x.shape[:-1], -1)
        return self.o_proj(attended, l, residual=residual), cache


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` of a stack of layers."""

    def __init__(self, cfg: DenseConfig, stack: Stack, dtype: Any):
        wide, narrow = cfg.intermediate_size, cfg.hidden_size
        options: Any = {"bias": cfg.mlp_bias, "dtype": dtype}
        gate_up = {"gate_proj": wide, "up_proj": wide}
        self.gate_up_proj = projections("gate_up_proj", gate_up, narrow, stack, **options)
        self.down_proj = Linear(len(stack.layers), narrow, wide, **options)
        self.activation = cfg.activation

    def __call__(
        self,
        x: Float[Array, "B T K"],
        l: Any,
        *,
        norm: Prologue | None = None,
        residual: Float[Array, "B T K"] | None = None,
    ) -> Float[Array, "B T K"]:
        """`mlp(norm(x)) + residual` of one layer."""
        gate_up, down, activation = self.gate_up_proj, self.down_proj, ACTIVATIONS[self.activation]
        if not isinstance(gate_up, FusedLinear) or not gate_up.contiguous:
            return down(gate_up.joined(x, l, norm), l, activation, residual)
        biases = [None if p.bias is None else p.bias.get_value() for p in (gate_up, down)]
        return gated_mlp(
            x,
            gate_up.weight.get_value(),
            down.weight.get_value(),
            layer=l,
            prologue=norm,
            activation=activation,
            biases=(biases[0], biases[1]),
            residual=residual,
            groups=gate_up.groups,
        )
