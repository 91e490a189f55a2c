"""`grouped_matmul`: each row times the matrix of its group, as experts are applied to tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxquant.array import QuantizedArray
from jaxquant.errors import JaxquantError
from jaxquant.matmul import xla

# Rows that one step of the reference multiplies, at most: dequantizing a matrix costs about as
# much as multiplying a few rows by it, so beyond that there is nothing to gain.
_MAX_TILE = 128


def grouped_matmul(
    x: Float[Array, "T K"],
    w: QuantizedArray | Float[Array, "*L E N K"],
    group_sizes: Int32[Array, " E"],
    *,
    layer: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """`y[t] = x[t] @ w[e]^T` for the group e that row t is in.

    The first `group_sizes[0]` rows are in group 0, the next `group_sizes[1]` in group 1, and so
    on; groups may be empty. A row comes out as from `jaxquant.matmul(x[t], w[e])`, activation
    quantization included. The sizes stay on the device: nothing waits for them, and a group may
    be of any size.

    Args:
      x: `[T, K]`, floating, sorted by group.
      w: `[E, N, K]`, K-major, quantized or not; or a stack `[L, E, N, K]` with `layer`.
      group_sizes: `[E]` int32. Rows beyond their sum come out as zeros.
      layer: which of the stack, possibly traced.
      preferred_element_type: dtype of the result; default x's.
      implementation: forces one of `IMPLEMENTATIONS`; default: the first.

    Returns:
      `[T, N]`.

    Raises:
      JaxquantError: shapes that do not fit, a stack without `layer`, an unknown implementation.

    >>> x, w = jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> grouped_matmul(x, w, jnp.array([1, 2], jnp.int32))[:, 0].tolist()
    [1.0, 2.0, 2.0]
    """
    _check(x, w, group_sizes, layer)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise JaxquantError(
            f"grouped_matmul: implementation is {implementation!r}; "
            f"allowed: {', '.join(IMPLEMENTATIONS)}"
        )
    out_dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    run = IMPLEMENTATIONS[implementation or next(iter(IMPLEMENTATIONS))]
    return run(x, w, group_sizes, layer, out_dtype)


def _tiled(
    x: Array, w: QuantizedArray | Array, group_sizes: Array, layer: Any, out_dtype: Any
) -> Array:
    """The reference: a loop over tiles of rows, each within one group.

    Only matrices of groups that have rows are read and dequantized.
    """
    T, E = x.shape[0], group_sizes.shape[0]
    matrices = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), w)
    N = _storage(w).shape[-2]
    if T == 0:
        return jnp.zeros((0, N), out_dtype)
    first = 0 if layer is None else layer * E
    tile = min(T, _MAX_TILE, 1 << (-(-T // E) - 1).bit_length())
    tiles = -(-group_sizes // tile)
    stop, last_tile = jnp.cumsum(group_sizes), jnp.cumsum(tiles)

    def step(i: Array, y: Array) -> Array:
        group = jnp.searchsorted(last_tile, i, side="right")
        begin = stop[group] - group_sizes[group] + (i - (last_tile[group] - tiles[group])) * tile
        start = jnp.minimum(begin, T - tile)  # the last tile may reach back, never beyond the end
        rows = start + jnp.arange(tile)
        mine = (rows >= begin) & (rows < stop[group])
        product = _matmul(
            lax.dynamic_slice_in_dim(x, start, tile), matrices, first + group, out_dtype
        )
        before = lax.dynamic_slice_in_dim(y, start, tile)
        return lax.dynamic_update_slice_in_dim(
            y, jnp.where(mine[:, None], product, before), start, 0
        )

    return lax.fori_loop(0, last_tile[-1], step, jnp.zeros((T, N), out_dtype))


def _matmul(x: Array, w: QuantizedArray | Array, index: Array, out_dtype: Any) -> Array:
    if isinstance(w, QuantizedArray):
        return xla.matmul(x, w, index, out_dtype)
    return xla.plain_matmul(x, w, index, out_dtype)


def _storage(w: QuantizedArray | Array) -> Array:
    # K-major, whatever the logical layout.
    return w.qvalue if isinstance(w, QuantizedArray) else w


IMPLEMENTATIONS = {"xla": _tiled}


def _check(x: Any, w: Any, group_sizes: Any, layer: Any) -> None:
    shape = _storage(w).shape
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise JaxquantError(f"grouped_matmul: x has dtype {x.dtype}; allowed: a floating dtype")
    if len(shape) != (3 if layer is None else 4):
        want = "[E, N, K] (a stack [L, E, N, K] needs layer=)" if layer is None else "[L, E, N, K]"
        raise JaxquantError(f"grouped_matmul: w is stored as {list(shape)}; allowed: {want}")
    if x.ndim != 2 or x.shape[-1] != shape[-1]:
        raise JaxquantError(
            f"grouped_matmul: x {list(x.shape)} does not fit w stored as {list(shape)}; "
            "allowed: [T, K], with the same K"
        )
    if group_sizes.shape != (shape[-3],) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise JaxquantError(
            f"grouped_matmul: group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; "
            f"allowed: one integer for each of the {shape[-3]} matrices"
        )
