"""`grouped_matmul`: each row times the matrix of its group, as experts are applied to tokens."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int32

from jaxquant.array import QuantizedArray
from jaxquant.errors import JaxquantError
from jaxquant.hopper import interpreted
from jaxquant.matmul import mosaic_gpu
from jaxquant.matmul.api import IMPLEMENTATIONS, matmul
from jaxquant.matmul.kernel_cache import kept
from jaxquant.matmul.partition import across_devices
from jaxquant.matmul.prologue import Prologue, SiluMul

_logger = logging.getLogger(__name__)

# Rows that one step of the reference multiplies, at most: dequantizing a matrix costs about as
# much as multiplying a few rows by it, so beyond that there is nothing to gain.
_MAX_TILE = 128
# So few that the products gather them themselves, which takes longer where they are bound by the
# tensor cores.
_FEW_ROWS = 1024
# Rows of a matrix that wgmma takes, which the kernel multiplies at once.
_MIN_N = 64


def grouped_matmul(
    x: Float[Array, "S A"],
    w: QuantizedArray | Float[Array, "*L E N K"],
    group_sizes: Int32[Array, " E"],
    *,
    rows: Int32[Array, " T"] | None = None,
    places: Int32[Array, "S k"] | None = None,
    layer: Any = None,
    prologue: Prologue | None = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """`y[t] = prologue(x)[rows[t]] @ w[e]^T` for the group e that row t is in.

    The first `group_sizes[0]` rows are in group 0, the next `group_sizes[1]` in group 1, and so
    on; groups may be empty. A row comes out as from `jaxquant.matmul`, activation quantization
    included. The sizes stay on the device: nothing waits for them, and a group may be of any size.

    Args:
      x: `[S, K]`, floating; or what the prologue makes that of.
      w: `[E, N, K]`, K-major, quantized or not; or a stack `[L, E, N, K]` with `layer`.
      group_sizes: `[E]` int32. Rows beyond their sum come out as zeros.
      rows: `[T]` int32, which row of x is multiplied, sorted by group: rows that are in several
        groups are quantized once. Without it x is sorted by group itself.
      places: `[S, k]` int32, the inverse of rows, if each of x is multiplied k times:
        `rows[places[s, i]] == s`. With it many are written where they belong as they are quantized.
      layer: which of the stack, possibly traced.
      prologue: applied to x; see `jaxquant.matmul.prologue`.
      preferred_element_type: dtype of the result; default x's.
      implementation: of the products; see `jaxquant.matmul`. By default, and with "mosaic_gpu",
        they are one kernel; what it does not take is a loop over tiles.

    Returns:
      `[T, N]`.

    Raises:
      JaxquantError: shapes that do not fit, a stack without `layer`, an unknown implementation.

    >>> x, w = jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> grouped_matmul(x, w, jnp.array([1, 2], jnp.int32))[:, 0].tolist()
    [1.0, 2.0, 2.0]
    """
    _check(x, w, group_sizes, rows, places, layer, prologue)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise JaxquantError(
            f"grouped_matmul: implementation is {implementation!r}; "
            f"allowed: {', '.join(IMPLEMENTATIONS)}"
        )
    out_dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    if not isinstance(w, QuantizedArray):
        x = _rows_of(x, rows, layer, prologue)
        return tiled(x, w, group_sizes, layer, out_dtype, implementation)
    order = rows, None if places is None else places.reshape(-1)
    return _quantized(x, w, group_sizes, order, layer, prologue, out_dtype, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7))
def _quantized(
    x: Array,
    w: QuantizedArray,
    group_sizes: Array,
    order: tuple[Array | None, Array | None],
    layer: Any,
    prologue: Prologue | None,
    out_dtype: Any,
    implementation: str | None,
) -> Array:
    rows, _ = order
    if implementation in (None, "mosaic_gpu"):
        try:
            return _in_one_kernel(x, w, group_sizes, order, layer, prologue, out_dtype)
        except NotImplementedError as reason:
            _logger.debug("grouped_matmul of x %s: a loop over tiles; %s", list(x.shape), reason)
    x = _rows_of(x, rows, layer, prologue)
    return tiled(x, w, group_sizes, layer, out_dtype, implementation)


@_quantized.defjvp
def _straight_through(
    out_dtype: Any, implementation: str | None, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    # As for `jaxquant.matmul`: quantizing x counts as the identity.
    x, w, group_sizes, (rows, _), layer, prologue = primals
    dx, *_, dprologue = tangents
    y = _quantized(*primals, out_dtype, implementation)
    _, dx = jax.jvp(
        lambda x, prologue: _rows_of(x, rows, layer, prologue), (x, prologue), (dx, dprologue)
    )
    weight_only = dataclasses.replace(w, activation_scheme=None)
    return y, tiled(dx, weight_only, group_sizes, layer, out_dtype, "xla")


def _rows_of(x: Array, rows: Array | None, layer: Any, prologue: Prologue | None) -> Array:
    """`prologue(x)[rows]`."""
    x = x if prologue is None else prologue(x, layer)
    return x if rows is None else x[rows]


def _in_one_kernel(
    x: Array,
    w: QuantizedArray,
    group_sizes: Array,
    order: tuple[Array | None, Array | None],
    layer: Any,
    prologue: Prologue | None,
    out_dtype: Any,
) -> Array:
    """All products in one kernel, after the one that quantizes x.

    Raises:
      NotImplementedError: the device or the operands are not what the kernel takes; says why.
    """
    rows, places = order
    sms = mosaic_gpu.multiprocessors(x, "FP8 products")
    mosaic_gpu.check_operands(x, w, out_dtype)
    (N, K), T = w.qvalue.shape[-2:], len(x if rows is None else rows)
    for what, allowed, taken in (
        ("the experts are weight-only", "those of quantized activations", w.activation_scheme),
        (f"the result is {out_dtype}", "bfloat16", out_dtype == jnp.bfloat16),
        (f"N is {N}", f"{_MIN_N} or more", N >= _MIN_N),
        (f"K is {K}", "multiples of 128", K % 128 == 0),
        ("there are no rows", "one or more", T > 0),
    ):
        if not taken:
            raise NotImplementedError(f"mosaic_gpu: {what}; the kernel of experts takes {allowed}")
    if not isinstance(prologue, SiluMul) and prologue is not None:
        x, prologue = prologue(x, layer), None
    if rows is not None and T <= _FEW_ROWS and interpreted():  # it takes no rows
        x, rows, prologue = _rows_of(x, rows, layer, prologue), None, None
    stacks = [a.reshape(-1, *a.shape[-2:]) for a in (w.qvalue, w.scale)]
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    return _kernels(sms)(x, (*stacks, prologue, None), (layer, group_sizes, rows, places))


@functools.cache
def _kernels(sms: int) -> Any:
    @sequential_vmap
    def run(x, stacks, index):
        args = x, None, stacks, index
        return across_devices(_run, *args, out_dtype=jnp.bfloat16, sms=sms, tokens_apart=False)

    return run


# Compiled once a shape, also where the caller does not jit.
@functools.partial(jax.jit, static_argnames=("out_dtype", "sms"))
def _run(
    x: Float[Array, "S A"],
    residual: None,
    stacks: Any,
    index: Any,
    *,
    out_dtype: Any,
    sms: int,
) -> Float[Array, "T N"]:
    """Quantizes x and multiplies."""
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.matmul import grouped_sm90
    from jaxquant.matmul.act_quant_sm90 import SCALE_COLUMNS, in_tiles, quantize, quantize_tokens
    from jaxquant.matmul.sm90 import in_stack, round_up

    (qvalue, scale, prologue, _), (layer, group_sizes, rows, places) = stacks, index
    E, (N, K) = group_sizes.shape[0], qvalue.shape[1:]
    if out_dtype != jnp.bfloat16:  # the part of a sum that a device of a mesh has
        one = qvalue, scale, None, None

        def product(x, group):
            at = in_stack(layer, len(qvalue) // E) * E + group
            return mosaic_gpu.run_product(x, None, one, at, out_dtype=out_dtype, sms=sms)

        return _tiled(_rows_of(x, rows, layer[0], prologue), group_sizes, N, out_dtype, product)
    T = len(x if rows is None else rows)
    if T > _FEW_ROWS and places is not None and in_tiles(x, K):
        padded = round_up(T, 8), round_up(T, SCALE_COLUMNS)
        xq, sx = kept(quantize_tokens)(prologue, x, K, *padded, places)
        rows = None
    else:
        xq, sx = kept(quantize)(prologue, x, layer, K, round_up(len(x), 8))
        if rows is not None and T > _FEW_ROWS:
            xq = _take_bytes(xq, jnp.pad(rows, (0, -T % 8)))
            sx = sx[:, jnp.pad(rows, (0, -T % SCALE_COLUMNS))]
            rows = None
    config = grouped_sm90.default_config(T, E, N, sms)
    return kept(grouped_sm90.grouped)(
        xq, sx, qvalue, scale, group_sizes, layer, rows, T=T, config=config, sms=sms
    )


def _take_bytes(xq: Array, rows: Array) -> Array:
    """`xq[rows]`, four bytes at a time."""
    words = lax.bitcast_convert_type(xq.reshape(len(xq), -1, 4), jnp.uint32)[rows]
    return lax.bitcast_convert_type(words, xq.dtype).reshape(len(rows), -1)


def tiled(
    x: Array,
    w: QuantizedArray | Array,
    group_sizes: Array,
    layer: Any,
    out_dtype: Any,
    implementation: str | None,
) -> Array:
    """A loop over tiles of rows, each within one group."""
    matrices = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), w)
    first = 0 if layer is None else layer * group_sizes.shape[0]

    def product(rows: Array, group: Array) -> Array:
        return matmul(
            rows,
            matrices,
            layer=first + group,
            preferred_element_type=out_dtype,
            implementation=implementation,
        )

    return _tiled(x, group_sizes, _storage(w).shape[-2], out_dtype, product)


def _tiled(x: Array, group_sizes: Array, N: int, out_dtype: Any, product: Any) -> Array:
    """`tiled`, by `product(rows, group)`. Only matrices of groups that have rows are read."""
    T, E = x.shape[0], group_sizes.shape[0]
    if T == 0:
        return jnp.zeros((0, N), out_dtype)
    tile = min(T, _MAX_TILE, 1 << (-(-T // E) - 1).bit_length())
    tiles = -(-group_sizes // tile)
    stop, last_tile = jnp.cumsum(group_sizes), jnp.cumsum(tiles)

    def step(i: Array, y: Array) -> Array:
        group = jnp.searchsorted(last_tile, i, side="right")
        begin = stop[group] - group_sizes[group] + (i - (last_tile[group] - tiles[group])) * tile
        start = jnp.minimum(begin, T - tile)  # the last tile may reach back, never beyond the end
        rows = start + jnp.arange(tile)
        mine = (rows >= begin) & (rows < stop[group])
        after = product(lax.dynamic_slice_in_dim(x, start, tile), group)
        before = lax.dynamic_slice_in_dim(y, start, tile)
        return lax.dynamic_update_slice_in_dim(y, jnp.where(mine[:, None], after, before), start, 0)

    return lax.fori_loop(0, last_tile[-1], step, jnp.zeros((T, N), out_dtype))


def _storage(w: QuantizedArray | Array) -> Array:
    # K-major, whatever the logical layout.
    return w.qvalue if isinstance(w, QuantizedArray) else w


def _check(
    x: Any, w: Any, group_sizes: Any, rows: Any, places: Any, layer: Any, prologue: Any
) -> None:
    shape = _storage(w).shape
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise JaxquantError(f"grouped_matmul: x has dtype {x.dtype}; allowed: a floating dtype")
    if len(shape) != (3 if layer is None else 4):
        want = "[E, N, K] (a stack [L, E, N, K] needs layer=)" if layer is None else "[L, E, N, K]"
        raise JaxquantError(f"grouped_matmul: w is stored as {list(shape)}; allowed: {want}")
    if prologue is not None:
        x = jax.eval_shape(prologue, x, layer)
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
    if places is not None:
        given = 0 if rows is None else len(rows)
        if places.ndim != 2 or len(places) != len(x) or places.size != given:
            raise JaxquantError(
                f"grouped_matmul: places is {list(places.shape)} for {given} rows of {len(x)} "
                "tokens; allowed: [tokens, k], the rows k times the tokens"
            )
