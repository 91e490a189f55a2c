"""Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1): DeepSeek V2 and V3.

Keys and values of all heads are projections, by `kv_b_proj`, of one latent vector per token. The
cache holds the latents, and one rotated key that all heads share. A pass over whole sequences
expands latents into keys and values. A decode step leaves them as they are and moves the halves of
`kv_b_proj` to the other side of the products ("absorbed"):

    q . (W_k c) == (W_k^T q) . c        sum_s p_s (W_v c_s) == W_v (sum_s p_s c_s)

If `kv_b_proj` is FP8 it stays so in memory. The expanded form multiplies by it as by any weight.
The absorbed form contracts W_k over its rows, where no blocked product exists: a decode step
dequantizes the weight and leaves its activations as they are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxquant.array import QuantizedArray
from jaxquant.attention import fill, fp8_attention, fp8_units, in_units, of_layer
from jaxquant.blocked import dequantize, take_layer
from jaxquant.matmul import Prologue
from jaxquant.models.attention import Cache, DecodeStep, Prefill, causal_attention, of_heads
from jaxquant.models.dense import LayerKind
from jaxquant.models.layers import Linear, RMSNorm, Stack


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Sizes and options, as in config.json.

    Attributes:
      num_heads: of queries, keys and values.
      q_rank: of the queries' latent; None: queries are projected from the input.
      kv_rank: of the latent of keys and values.
      nope_dim: dims of a query or key that know no position.
      rope_dim: dims that are rotated.
      v_dim: dims of a value.
      scale: of the logits.
      bias: whether the projections of the input and of the output have biases.
    """

    hidden_size: int
    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    bias: bool = False

    def empty_cache(self, L: int, B: int, S: int, dtype: Any, awaited: int = 0) -> Cache:
        """Latents for k and rotated keys for v, of one head."""
        return Cache.empty(L, B, 1, S, self.kv_rank, dtype, Dv=self.rope_dim, awaited=awaited)


class MLA(nnx.Module):
    """Multi-head latent attention of a stack of layers."""

    def __init__(self, cfg: MLAConfig, stack: Stack, dtype: Any):
        self.cfg = cfg
        L, K, H = len(stack.layers), cfg.hidden_size, cfg.num_heads
        q_size = H * (cfg.nope_dim + cfg.rope_dim)
        options: Any = {"bias": cfg.bias, "dtype": dtype}
        if cfg.q_rank is None:
            self.q_proj = Linear(L, q_size, K, bias=False, dtype=dtype)
        else:
            self.q_a_proj = Linear(L, cfg.q_rank, K, **options)
            self.q_a_layernorm = RMSNorm(L, cfg.q_rank, eps=_LATENT_EPS, dtype=dtype)
            self.q_b_proj = Linear(L, q_size, cfg.q_rank, bias=False, dtype=dtype)
        self.kv_a_proj_with_mqa = Linear(L, cfg.kv_rank + cfg.rope_dim, K, **options)
        self.kv_a_layernorm = RMSNorm(L, cfg.kv_rank, eps=_LATENT_EPS, dtype=dtype)
        self.kv_b_proj = Linear(
            L, H * (cfg.nope_dim + cfg.v_dim), cfg.kv_rank, bias=False, dtype=dtype
        )
        self.o_proj = Linear(L, K, H * cfg.v_dim, **options)

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
        cfg = self.cfg
        heads = (*x.shape[:-1], cfg.num_heads, -1)
        q_nope, q_rope = jnp.split(
            self._queries(x, l, norm).reshape(heads), [cfg.nope_dim], axis=-1
        )
        latents, k_rope = jnp.split(self.kv_a_proj_with_mqa(x, l, norm), [cfg.kv_rank], axis=-1)
        latents = self.kv_a_layernorm(latents, l)
        q_rope, k_rope = (
            tokens.rotations.rotate(y, kind.rope) for y in (q_rope, k_rope[:, :, None])
        )
        k_rope = k_rope[:, :, 0]
        cache = _store(latents, k_rope, tokens, cache, cache_layer)
        if isinstance(tokens, DecodeStep):
            y = absorbed_attention(
                q_nope,
                q_rope,
                _of_layer(cache.k, cache_layer, x.dtype),
                _of_layer(cache.v, cache_layer, x.dtype),
                self._kv_b(l, x.dtype),
                tokens.filled,
                cfg.scale,
            )
        else:
            kv = self.kv_b_proj(latents, l).reshape(heads)
            y = expanded_attention(q_nope, q_rope, kv, k_rope, cfg.scale, tokens.dtype)
        return self.o_proj(y.reshape(*x.shape[:-1], -1), l, residual=residual), cache

    def _queries(
        self, x: Float[Array, "B T K"], l: Any, norm: Prologue | None
    ) -> Float[Array, "B T N"]:
        if self.cfg.q_rank is None:
            return self.q_proj(x, l, norm)
        return self.q_b_proj(self.q_a_proj(x, l, norm), l, self.q_a_layernorm.prologue)

    def _kv_b(self, l: Any, dtype: Any) -> Float[Array, "H N R"]:
        w = self.kv_b_proj.weight.get_value()
        one = jax.tree.map(lambda leaf: take_layer(leaf, l), w)
        if isinstance(one, QuantizedArray):
            one = dequantize(one, dtype)
        return one.reshape(self.cfg.num_heads, -1, self.cfg.kv_rank)


# DeepSeek's code leaves the norms of latents at their own default, whatever rms_norm_eps says.
_LATENT_EPS = 1e-6


def expanded_attention(
    q_nope: Float[Array, "B T H Dn"],
    q_rope: Float[Array, "B T H Dr"],
    kv: Float[Array, "B T H Dkv"],
    k_rope: Float[Array, "B T Dr"],
    scale: float,
    dtype: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Causal attention with the keys and values of each head.

    Args:
      q_nope: the part of the queries that knows no position.
      q_rope: the rotated part.
      kv: keys without position, and values: the latents times `kv_b_proj`.
      k_rope: the rotated part of the keys, the same for all heads.
      scale: of the logits.
      dtype: see `attention.Forward`.
    """
    k_nope, v = jnp.split(kv, [q_nope.shape[-1]], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    D, Dv = q.shape[-1], v.shape[-1]

    def widened(x: Array) -> Array:  # attention has one D for all three; zeros change nothing
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, max(D, Dv) - x.shape[-1])))

    if dtype is not None:
        units = fp8_units(q, k, v)
        y = fp8_attention(in_units((q, k, v), units), units, q.dtype, scale=scale)
        return of_heads(y, q.shape[2])
    return causal_attention(widened(q), widened(k), widened(v), scale=scale)[..., :Dv]


def absorbed_attention(
    q_nope: Float[Array, "B 1 H Dn"],
    q_rope: Float[Array, "B 1 H Dr"],
    latents: Float[Array, "B S R"],
    k_rope: Float[Array, "B S Dr"],
    kv_b: Float[Array, "H Dkv R"],
    lengths: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B 1 H Dv"]:
    """One token of each sequence attends to the filled slots of a cache of latents.

    Args:
      q_nope: as in `expanded_attention`.
      q_rope: likewise.
      latents: of the cache.
      k_rope: of the cache, rotated.
      kv_b: the weight of `kv_b_proj`, by heads.
      lengths: how many are filled.
      scale: of the logits.
    """
    dtype = q_nope.dtype
    # float32 means float32: the default precision on accelerators is TF32.
    precision = "highest" if dtype == jnp.float32 else None

    def product(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)

    w_k, w_v = jnp.split(kv_b, [q_nope.shape[-1]], axis=1)
    # In this order, since XLA has no product of BF16 the other way round on a CPU.
    q_latent = product("hdr,bhd->bhr", w_k, q_nope[:, 0]).astype(dtype)
    logits = product("bhr,bsr->bhs", q_latent, latents)
    logits += product("bhd,bsd->bhs", q_rope[:, 0], k_rope)
    mask = jnp.arange(latents.shape[1]) < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits * scale, -jnp.inf), axis=-1)
    attended = product("bhs,bsr->bhr", weights.astype(dtype), latents).astype(dtype)
    return product("bhr,hdr->bhd", attended, w_v).astype(dtype)[:, None]


def _of_layer(stack: Any, layer: Any, dtype: Any) -> Float[Array, "B S D"]:
    values, scale = of_layer(stack, layer, dtype)
    return (values if scale is None else (values * scale[..., None]).astype(dtype))[:, 0]


def _store(
    latents: Float[Array, "B T R"],
    k_rope: Float[Array, "B T Dr"],
    tokens: Any,
    cache: Cache | None,
    layer: Any,
) -> Cache | None:
    """The cache with these tokens in it, where there is one."""
    if cache is None:
        return None
    if isinstance(tokens, Prefill):
        k, v = fill(cache.k, latents[:, None], layer), fill(cache.v, k_rope[:, None], layer)
        return dataclasses.replace(cache, k=k, v=v)
    return tokens.append(cache, latents[:, :, None], k_rope[:, :, None], layer)
