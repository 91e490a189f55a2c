"""Mixture of experts: routing, and the experts of a token as a product over groups of tokens."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.matmul import Routed, Routing, SiluMul, matmul, route
from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import MLP, Attention, DenseConfig
from jaxquant.models.fused import FusedRows, StackedExperts
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import ExpertLinear, RMSNorm, Stack, unloaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(DenseConfig):
    """Sizes and options of a decoder with experts; `intermediate_size` is of its dense layers.

    Attributes:
      routing: how experts are chosen.
      moe_intermediate_size: of one expert.
      is_sparse: of each layer, whether it has experts.
      shared_size: of all shared experts together; 0 is none.
      correction: whether the router has a correction bias.
      mtp_layers: layers behind the last that predict further tokens, and are not loaded.
    """

    routing: Routing
    moe_intermediate_size: int
    is_sparse: tuple[bool, ...]
    shared_size: int = 0
    correction: bool = False
    mtp_layers: int = 0

    def shared(self) -> "MoEConfig":
        """For the MLP of the shared experts."""
        return dataclasses.replace(self, intermediate_size=self.shared_size)


def read_routing(
    hf: HFConfig, field: str, *, default: int | None = None, **options: Any
) -> Routing:
    """The routing of config.json, checked.

    Args:
      hf: the config.
      field: what it calls the number of experts.
      default: of that.
      **options: the fields of Routing that a family has; `top_k` is read.
    """
    num_experts = hf.size(field, default=default)
    if num_experts > _MAX_EXPERTS:
        raise hf.error(field, f"at most {_MAX_EXPERTS}")
    routing = Routing(num_experts, hf.size("num_experts_per_tok"), **options)
    if num_experts % routing.groups:
        raise hf.error("n_group", f"a divisor of the number of experts ({num_experts})")
    if routing.top_groups > routing.groups:
        raise hf.error("topk_group", f"at most n_group ({routing.groups})")
    in_group = num_experts // routing.groups
    if routing.top_groups < routing.groups and in_group < routing.group_top:
        raise hf.error("n_group", f"groups of at least {routing.group_top} experts")
    if routing.top_k > in_group * routing.top_groups:
        raise hf.error("num_experts_per_tok", f"at most {in_group * routing.top_groups} experts")
    return routing


# No more than any model has: each gets a few names.
_MAX_EXPERTS = 10_000


def apply_experts(
    x: Float[Array, "T K"],
    weights: Float32[Array, "T k"],
    rows: Int32[Array, " Tk"],
    places: Int32[Array, "T k"],
    sizes: Int32[Array, " E"],
    run: Any,
) -> Float[Array, "T K"]:
    """`y[t] = sum_i weights[t, i] * run(...)[places[t, i]]`, the sum in float32.

    Args:
      x: the tokens.
      weights: of each token's experts.
      rows: the tokens sorted by expert; with what follows see `jaxquant.matmul.route`.
      places: where each token's are among them.
      sizes: how many an expert has.
      run: the experts: x, rows, places and sizes to their results, sorted alike.
    """
    y = run(x, rows, places, sizes)[places].astype(jnp.float32)
    return jnp.sum(weights[..., None] * y, axis=1).astype(x.dtype)


class Router(nnx.Module):
    """The logits of the experts of a stack of layers, in float32: weight `[L, E, K]`.

    A correction bias `[L, E]` is kept in float32: it decides between experts that are close.
    """

    def __init__(self, E: int, K: int, stack: Stack, *, correction: bool, dtype: Any):
        L = len(stack.layers)
        self.weight = unloaded(L, E, K, dtype=dtype)
        self.e_score_correction_bias = unloaded(L, E, dtype=jnp.float32) if correction else None

    def __call__(self, x: Float[Array, "T K"], l: Any, routing: Routing) -> Routed:
        """Where tokens go, and what it counts."""
        weight, bias = self.weight.get_value(), self.e_score_correction_bias
        logits = matmul(x, weight, layer=l, preferred_element_type=jnp.float32)
        return route(routing, logits, None if bias is None else bias.get_value()[l])


class Experts(nnx.Module):
    """`down(silu(gate(x)) * up(x))` of the experts of a stack of layers.

    Args:
      E: how many there are.
      wide: size between the products.
      narrow: size of the input.
      stack: the layers.
      names: of gate, up and down in the checkpoint.
      dtype: of parameters.
    """

    def __init__(
        self, E: int, wide: int, narrow: int, stack: Stack, *, names: tuple[str, ...], dtype: Any
    ):
        gate, up, down = names
        self.gate_up_proj = ExpertLinear(E, {gate: wide, up: wide}, narrow, stack, dtype=dtype)
        self.down_proj = ExpertLinear(E, {down: narrow}, wide, stack, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "T K"],
        rows: Int32[Array, " Tk"],
        places: Int32[Array, "T k"],
        group_sizes: Int32[Array, " E"],
        l: Any,
    ) -> Float[Array, "Tk K"]:
        """Applies the experts of one layer to rows of x, which are sorted by expert."""
        gate_up = self.gate_up_proj(x, group_sizes, l, rows=rows, places=places)
        return self.down_proj(gate_up, group_sizes, l, prologue=SiluMul())


class MoE(nnx.Module):
    """Routed experts of a stack of layers, added up by their weights."""

    # Of an expert's gate, up and down projection.
    names: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, cfg: MoEConfig, stack: Stack, dtype: Any):
        self.routing, E, narrow = cfg.routing, cfg.routing.num_experts, cfg.hidden_size
        wide = cfg.moe_intermediate_size
        self.gate = Router(E, narrow, stack, correction=cfg.correction, dtype=dtype)
        self.experts = Experts(E, wide, narrow, stack, names=self.names, dtype=dtype)

    def __call__(self, x: Float[Array, "B T K"], l: Any) -> Float[Array, "B T K"]:
        """Applies the experts of one layer."""
        rows = x.reshape(-1, x.shape[-1])
        routed = self.gate(rows, l, self.routing)
        y = apply_experts(rows, *routed, functools.partial(self.experts, l=l))
        return y.reshape(x.shape)


class SharedExpertsMoE(MoE):
    """Routed experts, and shared ones, if there are any, that see every token as one MLP."""

    def __init__(self, cfg: MoEConfig, stack: Stack, dtype: Any):
        super().__init__(cfg, stack, dtype)
        self.shared_experts = MLP(cfg.shared(), stack, dtype) if cfg.shared_size else None

    def __call__(self, x: Float[Array, "B T K"], l: Any) -> Float[Array, "B T K"]:
        """Applies the experts of one layer."""
        y = super().__call__(x, l)
        return y if self.shared_experts is None else y + self.shared_experts(x, l)


class Layers(nnx.Module):
    """A stack of equal layers, `x += attention(norm(x)); x += mlp(norm(x))`, dense or sparse."""

    attention: ClassVar[Any] = Attention
    sparse: ClassVar[type[MoE]] = MoE

    def __init__(self, cfg: MoEConfig, stack: Stack, dtype: Any):
        L, eps = len(stack.layers), cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = self.attention(cfg, stack, dtype)
        self.post_attention_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)
        mlp = self.sparse if cfg.is_sparse[stack.layers.start] else MLP
        self.mlp = mlp(cfg, stack, dtype)

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, *rest: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies one layer; see `Decoder`."""
        norm, mlp_norm = self.input_layernorm.prologue, self.post_attention_layernorm.prologue
        x, cache = self.self_attn(x, l, *rest, norm=norm, residual=x)
        if isinstance(self.mlp, MLP):
            return self.mlp(x, l, norm=mlp_norm, residual=x), cache
        return x + self.mlp(mlp_norm(x, l), l), cache


class MoEDecoder(Decoder):
    """A decoder of such layers."""

    layers_type = Layers

    @staticmethod
    def variant(cfg: MoEConfig, layer: int) -> bool:
        """See `Decoder`."""
        return cfg.is_sparse[layer]

    @classmethod
    def stacked(cls, cfg: MoEConfig) -> StackedExperts:
        """See `Decoder`."""
        (gate, up, down), wide = cls.layers_type.sparse.names, cfg.moe_intermediate_size
        tensors = {
            "gate_up_proj": FusedRows({gate: wide, up: wide}),
            "down_proj": FusedRows({down: cfg.hidden_size}),
        }
        return StackedExperts(cfg.routing.num_experts, tensors, cls.checkpoint_names)
