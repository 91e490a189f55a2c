"""View: a QuantizedArray as a program sees it after transposes, reshapes and slices.

The stored weight has three axes, `[stack, out, in]`, its leading ones as one. Each dimension of the
logical array is a sequence of factors of these axes, the major one first:

    stored[stack, out, in] with index = offset (stack only) + sum(i_factor * stride)

so a kernel `[in, heads, head_dim]` has the dimensions (in), (out / head_dim), (out % head_dim). A
transpose permutes dimensions, a reshape splits and joins factors, a slice of the stack changes its
offset: nothing is computed before the product, which then finds the axes it needs whole. A slice
along whole blocks and what is gathered along an axis are a View of other storage, FP8 too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant import blocked
from jaxquant.array import QuantizedArray

STACK, OUT, IN = range(3)


class Factor(NamedTuple):
    """`size` indices of a stored axis, `stride` apart; sizes are 2 or more."""

    axis: int
    size: int
    stride: int


Dim = tuple[Factor, ...]  # () has size 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A QuantizedArray with a layout.

    Attributes:
      stored: the weight.
      offset: where the view starts in the stack: int32, an int or None for 0.
      dims: the factors of each dimension.
      dtype: of the logical array.
      leaf: number of the weight among the quantized arguments.
      align: of what the offset is a multiple; 0 if there is none.
    """

    stored: Any
    offset: Any
    dims: tuple[Dim, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    leaf: int = dataclasses.field(metadata={"static": True})
    align: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(map(dim_size, self.dims))

    @property
    def factors(self) -> Dim:
        """Those of all dimensions, in their order."""
        return tuple(f for dim in self.dims for f in dim)


def view_of(qa: QuantizedArray, leaf: int) -> View:
    """The whole of a QuantizedArray in its logical shape."""
    *lead, out, contracting = qa.qvalue.shape
    strides = [math.prod(lead[i + 1 :]) for i in range(len(lead))]
    matrix = [one_factor(OUT, out, 1), one_factor(IN, contracting, 1)]
    dims = (
        *(one_factor(STACK, n, stride) for n, stride in zip(lead, strides, strict=True)),
        *(reversed(matrix) if qa.transposed else matrix),
    )
    view = reshape(View(qa, None, dims, jnp.dtype(qa.dtype), leaf), qa.shape)
    assert view is not None  # in_dims and out_dims are factors of their axes
    return view


def is_whole(view: View, qa: QuantizedArray) -> bool:
    """Whether the view is `qa` as it came: same layout, same dtype."""
    whole = view_of(qa, view.leaf)
    same = view.stored.qvalue is qa.qvalue
    return same and (view.dims, view.dtype, view.offset) == (whole.dims, whole.dtype, None)


def dim_size(dim: Dim) -> int:
    """Size of a dimension."""
    return math.prod(f.size for f in dim)


# Layout steps: each gives a View, or None if the result is none -----------------------------------


def transpose(view: View, permutation: Sequence[int]) -> View:
    """Permutes dimensions."""
    return dataclasses.replace(view, dims=tuple(view.dims[i] for i in permutation))


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """Splits and joins dimensions, as far as factors divide."""
    if math.prod(shape) == 0:
        return None
    rest = list(reversed(view.factors))
    dims = []
    for size in shape:
        dim: list[Factor] = []
        while size > 1:
            f = rest.pop()
            if size % f.size == 0:
                size //= f.size
            elif f.size % size == 0:
                minor = f.size // size
                rest.append(Factor(f.axis, minor, f.stride))
                f = Factor(f.axis, size, f.stride * minor)
                size = 1
            else:
                return None
            if dim and dim[-1].axis == f.axis and dim[-1].stride == f.size * f.stride:
                f = Factor(f.axis, dim.pop().size * f.size, f.stride)
            dim.append(f)
        dims.append(tuple(dim))
    return dataclasses.replace(view, dims=tuple(dims))


def broadcast(view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View | None:
    """`lax.broadcast_in_dim`, where what it adds has size 1."""
    if math.prod(shape) != math.prod(view.shape):
        return None
    dims: list[Dim] = [()] * len(shape)
    for dim, i in zip(view.dims, dimensions, strict=True):
        dims[i] = dim
    return dataclasses.replace(view, dims=tuple(dims))


def astype(view: View, dtype: Any) -> View | None:
    """A conversion that is left to the product: between floating dtypes of 16 bits and more."""
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        return None
    return dataclasses.replace(view, dtype=jnp.dtype(dtype))


def take(view: View, dimension: int, start: Any, size: int, step: int = 1) -> View | None:
    """`size` indices of a dimension from `start`, clamped to fit: of the stack, or whole blocks."""
    dim = view.dims[dimension]
    if size == dim_size(dim):
        return view
    if size == 0 or len(dim) != 1:
        return None
    ((axis, n, stride),) = dim
    last, is_static = n - (size - 1) * step - 1, isinstance(start, int | np.integer)
    if is_static:
        start = min(max(int(start), 0), last)
    if axis != STACK:
        return _take_blocks(view, dimension, start, size) if is_static and step == 1 else None
    move = (start if is_static else lax.clamp(0, start.astype(jnp.int32), last)) * stride
    return dataclasses.replace(
        view,
        offset=move if view.offset is None else view.offset + move,
        align=math.gcd(view.align, move if is_static else stride),
        dims=_with_dim(view, dimension, one_factor(STACK, size, stride * step)),
    )


def _take_blocks(view: View, dimension: int, start: int, size: int) -> View | None:
    ((axis, n, stride),) = view.dims[dimension]
    begin, end, block = start * stride, (start + size) * stride, _block(view.stored, axis)
    length = view.stored.qvalue.shape[axis - 3]
    if n * stride != length or begin % block or (end % block and end != length):
        return None  # not the major dimension of the axis, or not whole blocks

    def cut(x: Any, block: int) -> Any:
        return lax.slice_in_dim(x, begin // block, -(-end // block), axis=x.ndim + axis - 3)

    qa = view.stored
    stored = dataclasses.replace(qa, qvalue=cut(qa.qvalue, 1), scale=cut(qa.scale, block))
    stored = logical_as(stored, qa)
    dims = _with_dim(view, dimension, one_factor(axis, size, stride))
    return dataclasses.replace(view, stored=stored, dims=dims)


def gather(view: View, dimension: int, index: jax.Array, fill: bool) -> View | None:
    """`index [n]` of a dimension, which has an axis of the storage for itself.

    Indices out of bounds are clamped, or give NaN if `fill`.
    """
    qa, dim = flat_stack(view), view.dims[dimension]
    if len(dim) != 1:
        return None
    ((axis, n, _),) = dim
    if n != qa.qvalue.shape[axis - 3] or (axis == STACK and view.offset is not None):
        return None
    block, clipped = _block(qa, axis), jnp.clip(index, 0, n - 1)
    qvalue = jnp.take(qa.qvalue, clipped, axis=axis - 3)
    scale = jnp.take(qa.scale, clipped // block, axis=axis - 3)
    if fill:
        valid = jnp.expand_dims(clipped == index, range(1, 3 - axis))
        scale = jnp.where(valid, scale, jnp.nan)
    bo, bi = qa.block_size
    block_size = {STACK: (bo, bi), OUT: (1, bi), IN: (bo, 1)}[axis]
    stored = dataclasses.replace(qa, qvalue=qvalue, scale=scale, block_size=block_size)
    dims = _with_dim(view, dimension, one_factor(axis, index.shape[0], 1))
    return dataclasses.replace(view, stored=stored, dims=dims)


def join_stack(view: View, factors: Dim) -> View:
    """The view with its last matrices stacked along `out` instead, as many as `factors` are.

    A product with all of them is one of a larger matrix then. Nothing moves in the storage; it
    takes matrices of whole blocks.
    """
    qa, count = flat_stack(view), 1
    strides = {f.stride: f.size for f in factors if f.axis == STACK}
    while count in strides:
        count *= strides[count]
    N, bo = qa.qvalue.shape[-2], qa.block_size[0]
    others = [f.stride for f in view.factors if f.axis == STACK and f.stride >= count]
    if count == 1 or N % bo or any(n % count for n in (*others, view.align, len(qa.qvalue))):
        return view

    def joined(f: Factor) -> Factor:
        if f.axis != STACK:
            return f
        if f.stride < count:
            return Factor(OUT, f.size, f.stride * N)
        return f._replace(stride=f.stride // count)

    def join(x: Any) -> Any:
        stack, rows, columns = x.shape
        return x.reshape(*([stack // count] if stack > count else []), rows * count, columns)

    return dataclasses.replace(
        view,
        stored=jax.tree.map(join, qa),
        offset=None if view.offset is None else view.offset // count,
        align=view.align // count,
        dims=tuple(tuple(map(joined, dim)) for dim in view.dims),
    )


def _block(qa: QuantizedArray, axis: int) -> int:
    return (1, *qa.block_size)[axis]


def _with_dim(view: View, dimension: int, dim: Dim) -> tuple[Dim, ...]:
    return (*view.dims[:dimension], dim, *view.dims[dimension + 1 :])


# Ends of a view -----------------------------------------------------------------------------------


def flat_stack(view: View) -> QuantizedArray:
    """The stored weight as `[out, in]`, or as `[stack, out, in]` if it has leading axes."""

    def flat(x: Any) -> Any:
        return x if x.ndim <= 3 else x.reshape(-1, *x.shape[-2:])

    qa = jax.tree.map(flat, view.stored)
    return dataclasses.replace(qa, transposed=False, in_dims=(), out_dims=())


def logical_as(part: QuantizedArray, whole: QuantizedArray) -> QuantizedArray:
    """A part of the storage of `whole` with its logical dimensions, the major ones cut."""

    def cut(sizes: tuple[int, ...], length: int) -> tuple[int, ...]:
        minor = math.prod(sizes[1:])
        return (length // minor, *sizes[1:]) if sizes and length % minor == 0 else ()

    *_, out, contracting = part.qvalue.shape
    return dataclasses.replace(
        part,
        transposed=whole.transposed,
        out_dims=cut(whole.out_dims, out),
        in_dims=cut(whole.in_dims, contracting),
    )


def stack_index(view: View, factors: Dim) -> Any:
    """Indices into the stack, of shape `[f.size for f in factors]`; None if there is no stack."""
    if view.stored.qvalue.ndim == 2:
        return None
    index: Any = np.zeros((), np.int32)
    for f in factors:
        index = index[..., None] + np.arange(f.size, dtype=np.int32) * np.int32(f.stride)
    return index if view.offset is None else index + view.offset


def dequantize(view: View) -> jax.Array:
    """The logical array. What it slices off the stack is not dequantized."""
    stack, stored = flat_stack(view), sorted(view.factors, key=lambda f: (f.axis, -f.stride))
    index = stack_index(view, tuple(f for f in stored if f.axis == STACK))
    if index is not None:
        n, index = stack.qvalue.shape[0], jnp.asarray(index).reshape(-1)
        if view.offset is not None or index.size != n:
            rows = jax.vmap(blocked.take_layer, (None, 0))
            stack = dataclasses.replace(
                stack, qvalue=rows(stack.qvalue, index), scale=rows(stack.scale, index)
            )
    w = lax.stop_gradient(stack.dequantize())
    w = w.reshape([f.size for f in stored]).transpose([stored.index(f) for f in view.factors])
    return w.reshape(view.shape).astype(view.dtype)


def one_factor(axis: int, size: int, stride: int) -> Dim:
    """One factor as a dimension; () if it has size 1."""
    return () if size == 1 else (Factor(axis, size, stride),)
