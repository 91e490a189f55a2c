"""What becomes of a slab on the device, and what is learnt of it on the way."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.config import QuantConfig
from jaxquant.tree import error_norms


def convert(piece: Any, config: QuantConfig | None, dtype: Any) -> tuple[Any, jax.Array]:
    """A slab as it is kept.

    Args:
      piece: as it is in the checkpoint; a QuantizedArray if it is FP8 there.
      config: how it is (or becomes) FP8, or None.
      dtype: what it becomes, or, if it is quantized, computes in; None leaves it.

    Returns:
      The slab, and float32s: whether it is finite and, if it was quantized, the norms of the error
      and of the slab.
    """
    if isinstance(piece, QuantizedArray):
        return piece, _all_finite(piece.dequantize(jnp.float32))[None]
    if config is None:
        piece = piece if dtype is None else piece.astype(dtype)  # which may have no such value
        return piece, _all_finite(piece)[None]
    # By XLA: slabs have many shapes, and to compile a kernel for each takes longer than it saves.
    # The barrier keeps XLA from quantizing again in each fusion that uses the result.
    qa = lax.optimization_barrier(blocked.quantize(piece, config, implementation="xla"))
    # A block's scale is finite exactly when all of its weights are.
    outcome = jnp.stack([_all_finite(qa.scale), *error_norms(piece, qa)])
    return qa if dtype is None else dataclasses.replace(qa, dtype=dtype), outcome


def _all_finite(x: jax.Array) -> jax.Array:
    # 0 * x is NaN exactly where x is not finite; XLA:CPU vectorizes sums, unlike `all`.
    return jnp.isfinite(jnp.sum(0 * x.astype(jnp.float32))).astype(jnp.float32)


# To find the faster of two kernels takes longer than either.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
converted = jax.jit(convert, static_argnums=(1, 2), compiler_options=COMPILER_OPTIONS)
