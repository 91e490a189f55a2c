"""View: a QuantizedArray as a program sees it after transposes, reshapes and slices.

The stored weight has three axes, `[stack, out, in]`, its leading ones as one. Each dimension of the
logical array is a sequence of factors of these axes, the major one first:

    stored[stack, out, in] with index = offset (stack only) + sum(i_factor * stride)

so a kernel `[in, heads, head_dim]` has the dimensions (in), (out / head_dim), (out % head_dim). A
transpose permutes dimensions, a reshape splits and joins factors, a slice of the stack changes its
offset: nothing is computed before the product, which then finds the axes it needs whole.
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
    """

    stored: Any
    offset: Any
    dims: tuple[Dim, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    leaf: int = dataclasses.field(metadata={"static": True})

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
    return View(qa, None, dims, jnp.dtype(qa.dtype), leaf)


def is_whole(view: View, qa: QuantizedArray) -> bool:
    """Whether the view is `qa` as it came: same layout, same dtype."""
    whole = view_of(qa, view.leaf)
    return (view.dims, view.dtype, view.offset) == (whole.dims, whole.dtype, None)


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
    """`size` indices of a dimension from `start` (clamped to fit), which is along the stack."""
    dim = view.dims[dimension]
    if size == dim_size(dim):
        return view
    if size == 0 or [f.axis for f in dim] != [STACK]:
        return None
    ((_, n, stride),) = dim
    last = n - (size - 1) * step - 1
    if isinstance(start, int | np.integer):
        start = min(max(int(start), 0), last)
    else:
        start = lax.clamp(0, start.astype(jnp.int32), last)
    offset = start * stride if view.offset is None else view.offset + start * stride
    dims = (
        *view.dims[:dimension],
        one_factor(STACK, size, stride * step),
        *view.dims[dimension + 1 :],
    )
    return dataclasses.replace(view, offset=offset, dims=dims)


# Ends of a view -----------------------------------------------------------------------------------


def flat_stack(view: View) -> QuantizedArray:
    """The stored weight as `[out, in]`, or as `[stack, out, in]` if it has leading axes."""
    qa = view.stored

    def flat(x: Any) -> Any:
        return x if x.ndim <= 3 else x.reshape(-1, *x.shape[-2:])

    return dataclasses.replace(qa, qvalue=flat(qa.qvalue), scale=flat(qa.scale), transposed=False)


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
