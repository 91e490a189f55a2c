"""Which experts tokens go to: `route`, a router's choice and the tokens sorted by it."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float32, Int32

from jaxquant.hopper import interpreted, multiprocessors
from jaxquant.matmul.kernel_cache import kept

_logger = logging.getLogger(__name__)

# The weights of each token's experts, the tokens sorted by expert, where each token's are among
# them, and how many an expert has.
Routed = tuple[Float32[Array, "T k"], Int32[Array, " Tk"], Int32[Array, "T k"], Int32[Array, " E"]]


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def route(
    routing: Routing, logits: Float32[Array, "T E"], bias: Float32[Array, " E"] | None = None
) -> Routed:
    """`routing.choose` of each token's experts, and `sorted_by_expert` of the tokens.

    On Hopper a kernel chooses, which also sorts where tokens are few. Its weights may differ from
    those of `choose` by some ulp.

    Args:
      routing: how to choose.
      logits: the router's.
      bias: see `Routing.choose`.

    Returns:
      The weights of each token's experts, `[T, k]` float32; the tokens sorted by expert, `[T * k]`;
      where each token's are among them, `[T, k]`; how many an expert has, `[E]`: int32.
    """
    try:
        return _by_kernel(routing, logits, bias)
    except NotImplementedError as reason:
        _logger.debug("route of %s: through XLA; %s", list(logits.shape), reason)
    return _by_xla(routing, logits, bias)


@route.defjvp
def _route_jvp(routing, primals, tangents):
    return jax.jvp(functools.partial(_by_xla, routing), primals, tangents)


def _by_xla(routing: Routing, logits: Array, bias: Array | None) -> Routed:
    weights, experts = routing.choose(logits, bias)
    return weights, *sorted_by_expert(experts, routing.num_experts)


def _by_kernel(routing: Routing, logits: Array, bias: Array | None) -> Routed:
    """Raises NotImplementedError where there is no kernel for it."""
    multiprocessors(logits, "the choices of experts")
    (T, E), k = logits.shape, routing.top_k
    for what, taken in (
        ("experts are chosen from some groups", routing.top_groups == routing.groups),
        ("the interpreter", not interpreted()),
        ("several devices", jax.device_count() == 1),
        ("no tokens", T > 0),
    ):
        if not taken:
            raise NotImplementedError(f"mosaic_gpu: the kernel is not for it: {what}")
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.matmul import routing_sm90

    if not routing_sm90.takes(E, k):
        raise NotImplementedError(f"mosaic_gpu: the kernel chooses no {k} of {E} experts")
    options = routing_sm90.Options(k, routing.score == "softmax", routing.normalize, routing.scale)
    sorts = routing_sm90.sorts(T, k)
    kernel: Any = kept(routing_sm90.route if sorts else routing_sm90.choose)

    @sequential_vmap
    def run(logits, bias):
        return kernel(logits, bias, options)

    if sorts:
        return run(logits, bias)
    weights, experts = run(logits, bias)
    return weights, *sorted_by_expert(experts, E)


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
