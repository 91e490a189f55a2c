"""Which heads of queries, keys and values the kernels for prompts take."""

from typing import NoReturn

import jax.numpy as jnp
from jaxtyping import Array, Float

_HEAD_DIMS = (64, 128, 256)
# Tokens that a prompt is a multiple of.
_TOKENS = 128
# What is read without TMA has offsets of 32 bits.
_MAX_BYTES = 1 << 31


def check_heads(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H Dv"]
) -> None:
    """Refuses other heads.

    Raises:
      NotImplementedError: they are not what the kernels take; says why.
    """
    B, T, Hq, D = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            refuse(f"{name} is {x.dtype}", "bfloat16")
    if D not in _HEAD_DIMS or v.shape[3] != D:
        refuse(f"D is {D} and {v.shape[3]}", f"the same for all, of {_HEAD_DIMS}")
    if T % _TOKENS or q.size == 0:
        refuse(f"q is {list(q.shape)}", f"multiples of {_TOKENS} tokens")
    if 2 * B * T * (Hq + 2 * k.shape[2]) * D >= _MAX_BYTES:
        refuse(f"q is {list(q.shape)}", f"less than {_MAX_BYTES} bytes in all")


def refuse(what: str, allowed: str) -> NoReturn:
    """Raises the NotImplementedError."""
    raise NotImplementedError(f"mosaic_gpu: {what}; the kernel takes {allowed}")
