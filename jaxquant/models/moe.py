"""Mixture of experts: routing, and the experts of a token as a product over groups of tokens."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.matmul import SiluMul, matmul
from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import MLP, Attention, DenseConfig
from jaxquant.models.fused import FusedRows, StackedExperts
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import ExpertLinear, RMSNorm, Stack, unloaded


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a router chooses the experts of a token, and what each counts.

    Attributes:
      num_experts: of a layer.
      top_k: how many are chosen.
      score: "softmax" or "sigmoid" of the router's logits.
      normalize: whether the chosen ones' weights are made to add up to 1. After a softmax this is
        the softmax over the chosen logits alone, as Mixtral has it.
      scale: by which weights are multiplied then.
      groups: experts are in so many groups of equal size,
      top_groups: and are chosen from so many of them.
      group_top: a group is worth the sum of its so many best experts.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_top: int = 1

    def choose(
        self, logits: Float32[Array, "T E"], bias: Float32[Array, " E"] | None = None
    ) -> tuple[Float32[Array, "T k"], Int32[Array, "T k"]]:
        """Weights and numbers of the experts of each token.

        Args:
          logits: the router's.
          bias: added to the scores for the choice, not for the weights
            (https://arxiv.org/abs/2408.15664).
        """
        scores = jax.nn.softmax(logits) if self.score == "softmax" else jax.nn.sigmoid(logits)
        merit = scores if bias is None else scores + bias
        if self.top_groups < self.groups:
            merit = jnp.where(self._in_top_groups(merit), merit, -jnp.inf)
        _, experts = jax.lax.top_k(merit, self.top_k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        return weights * self.scale, experts

    def _in_top_groups(self, merit: Float32[Array, "T E"]) -> Array:
        grouped = merit.reshape(-1, self.groups, self.num_experts // self.groups)
        worth = jnp.sum(jax.lax.top_k(grouped, self.group_top)[0], axis=-1)
        _, best = jax.lax.top_k(worth, self.top_groups)
        chosen = jnp.any(best[:, :, None] == jnp.arange(self.groups), axis=1)
        return jnp.repeat(chosen, grouped.shape[-1], axis=-1)


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
    experts: Int32[Array, "T k"],
    num_experts: int,
    run: Any,
) -> Float[Array, "T K"]:
    """`y[t] = sum_i weights[t, i] * expert[experts[t, i]](x[t])`, the sum in float32.

    Args:
      x: the tokens.
      weights: of the chosen experts.
      experts: their numbers.
      num_experts: how many there are.
      run: the experts: x, which of its rows to take, `[T * k]` sorted by expert, where each is
        then, `[T, k]`, and how many there are of each expert, to rows `[T * k, K]`.
    """
    rows, places, sizes = sorted_by_expert(experts, num_experts)
    y = run(x, rows, places, sizes)[places].astype(jnp.float32)
    return jnp.sum(weights[..., None] * y, axis=1).astype(x.dtype)


def sorted_by_expert(
    experts: Int32[Array, "T k"], num_experts: int
) -> tuple[Int32[Array, " Tk"], Int32[Array, "T k"], Int32[Array, " E"]]:
    """The tokens sorted by expert, where each token's are among them, and how many an expert has.

    A few are compared each with each, which is one or two kernels. More are compared in blocks, and
    the experts of a block counted, which is faster than a sort.
    """
    (T, k), flat = experts.shape, experts.reshape(-1)
    index = jnp.arange(T * k, dtype=jnp.int32)
    if T * k > _FEW:
        places, sizes = _places(flat, num_experts)
        rows = jnp.zeros_like(index).at[places].set(index // k, unique_indices=True)
        return rows, places.reshape(T, k), sizes
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    before = (flat < flat[:, None]) | ((flat == flat[:, None]) & (index < index[:, None]))
    places = jnp.sum(before, axis=1, dtype=jnp.int32)
    rows = jnp.sum(jnp.where(places == index[:, None], index // k, 0), axis=1, dtype=jnp.int32)
    return rows, places.reshape(T, k), sizes


# So many squared are compared in the time of a launch or two.
_FEW = 1024
# So many are compared each with each where there are more.
_BLOCK = 256


def _places(
    flat: Int32[Array, " Tk"], num_experts: int
) -> tuple[Int32[Array, " Tk"], Int32[Array, " E"]]:
    """Where each would be if they were sorted, and how many there are of each."""
    blocks = jnp.pad(flat, (0, -flat.size % _BLOCK), constant_values=num_experts)
    blocks = blocks.reshape(-1, _BLOCK)

    def before(n: int) -> Array:
        return jnp.tri(n, k=-1, dtype=jnp.int32)

    counts = jnp.sum(blocks[..., None] == jnp.arange(num_experts), axis=1, dtype=jnp.int32)
    sizes = jnp.sum(counts, axis=0)
    in_experts_before = jnp.sum(before(num_experts) * sizes, axis=1)
    in_blocks_before = jnp.sum(before(len(blocks))[..., None] * counts, axis=1)
    first = in_experts_before + in_blocks_before
    equal = blocks[:, :, None] == blocks[:, None, :]
    in_block_before = jnp.sum(before(_BLOCK) * equal, axis=-1)
    places = jnp.take_along_axis(first, blocks, axis=1, mode="clip") + in_block_before
    return places.reshape(-1)[: flat.size], sizes


class Router(nnx.Module):
    """The logits of the experts of a stack of layers, in float32: weight `[L, E, K]`.

    A correction bias `[L, E]` is kept in float32: it decides between experts that are close.
    """

    def __init__(self, E: int, K: int, stack: Stack, *, correction: bool, dtype: Any):
        L = len(stack.layers)
        self.weight = unloaded(L, E, K, dtype=dtype)
        self.e_score_correction_bias = unloaded(L, E, dtype=jnp.float32) if correction else None

    def __call__(
        self, x: Float[Array, "T K"], l: Any, routing: Routing
    ) -> tuple[Float32[Array, "T k"], Int32[Array, "T k"]]:
        """Weights and numbers of the experts of each token."""
        weight, bias = self.weight.get_value(), self.e_score_correction_bias
        logits = matmul(x, weight, layer=l, preferred_element_type=jnp.float32)
        return routing.choose(logits, None if bias is None else bias.get_value()[l])


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
        weights, experts = self.gate(rows, l, self.routing)
        E = self.routing.num_experts
        y = apply_experts(rows, weights, experts, E, functools.partial(self.experts, l=l))
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
