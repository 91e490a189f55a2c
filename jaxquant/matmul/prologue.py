"""What stands before a product: functions of x that a kernel may apply while it quantizes x.

A prologue is a registered dataclass, called as `prologue(x, layer)`. Any such callable will do:
one that the kernels do not know runs in XLA, before the product.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@runtime_checkable
class Prologue(Protocol):
    """A pytree that is called as below."""

    def __call__(self, x: Float[Array, "*batch A"], layer: Any = None) -> Float[Array, "*batch K"]:
        """x as the product takes it; `layer` picks from the stacks that the prologue holds."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """`weight * round(x / sqrt(mean(x^2) + eps))`, the quotient in float32, rounded to x's dtype.

    Attributes:
      weight: `[K]`, or a stack `[L, K]`.
      eps: added to the mean of squares.
    """

    weight: Any
    eps: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*batch K"], layer: Any = None) -> Float[Array, "*batch K"]:
        """Normalizes the last axis."""
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return take(self.weight, layer, 1) * rounded(normed, x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiluMul:
    """`silu(gate) * up` for x = `[..., 2 K]`, gate then up: float32, rounded once to x's dtype."""

    def __call__(self, x: Float[Array, "*batch A"], layer: Any = None) -> Float[Array, "*batch K"]:
        """Multiplies the halves of the last axis."""
        gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return rounded(gate * lax.logistic(gate) * up, x.dtype)


def take(param: Array, layer: Any, ndim: int) -> Array:
    """The parameter of a layer: from a stack if it has an axis more than `ndim`."""
    if param.ndim == ndim:
        return param
    return lax.dynamic_index_in_dim(param, layer, keepdims=False)


def rounded(x: Array, dtype: Any) -> Array:
    """x cast to dtype and really rounded: XLA leaves out a cast whose result is cast back."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)
