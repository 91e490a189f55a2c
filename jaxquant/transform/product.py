"""`dot_general` and `ragged_dot` of an array and a View, as `jaxquant.matmul`."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.array import QuantizedArray
from jaxquant.blocked import take_layer
from jaxquant.matmul import grouped_matmul, matmul
from jaxquant.transform import view as views
from jaxquant.transform.view import OUT, STACK, Dim, View


def refusal(w: View, contracting: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """Why a product with these dimensions of the view cannot run on its blocks; "" if it can.

    The contracting dimensions have to hold all of the stored contraction axis and nothing else,
    the batch dimensions nothing but the stack.
    """
    axes = {f.axis for i in contracting for f in w.dims[i]}
    whole = math.prod(views.dim_size(w.dims[i]) for i in contracting)
    if math.prod(w.shape) == 0:
        return "the weight is empty"
    if STACK in axes:
        reason = "it contracts an axis along which the weight was taken for a stack of matrices"
    elif OUT in axes:
        reason = "it contracts the output axis of the blocks"
    elif whole != w.stored.qvalue.shape[-1]:
        reason = "it contracts a part of the contraction axis"
    elif {f.axis for i in batch for f in w.dims[i]} - {STACK}:
        reason = "a batch dimension is no axis of the stack"
    else:
        return ""
    return reason + _fitting_rule(w, contracting, batch)


def _fitting_rule(w: View, contracting: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """`; Rule(...) fits this use`; "" if no rule does."""
    dims = views.view_of(w.stored, w.leaf).dims
    ins, stacked = (_covered(dims, _factors(w, group)) for group in (contracting, batch))
    if not ins or stacked is None or ins != list(range(ins[0], ins[-1] + 1)):
        return ""
    # The output is after what contracts, or just before it.
    lead = ins[0] - (ins[-1] == len(dims) - 1)
    if lead < 0 or any(i >= lead for i in stacked):
        return ""
    return f"; Rule(contracting={tuple(i - len(dims) for i in ins)}) fits this use"


def _covered(dims: tuple[Dim, ...], factors: Dim) -> list[int] | None:
    """The dimensions that factors cover whole; None if they cover a part of one."""
    covered = []
    for i, dim in enumerate(dims):
        part = 1.0
        for f, g in itertools.product(dim, factors):
            if f.axis == g.axis:
                end = min(f.stride * f.size, g.stride * g.size)
                part *= max(end / max(f.stride, g.stride), 1)
        if part not in (1, views.dim_size(dim)):
            return None
        if part > 1:
            covered.append(i)
    return covered


def product(
    x: jax.Array,
    w: View,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    out_dtype: Any,
) -> jax.Array:
    """`lax.dot_general(x, w, (contracting, batch))` for a view that `refusal` has let pass.

    Matrices of a stack that all take the same x are one product if their blocks are whole;
    otherwise, and in a batch, they run one after the other, each in its place in the stack.
    """
    (x_contracting, w_contracting), (x_batch, w_batch) = contracting, batch
    x_free = [i for i in range(x.ndim) if i not in (*x_contracting, *x_batch)]
    w_free = [i for i in range(len(w.dims)) if i not in (*w_contracting, *w_batch)]
    w = views.join_stack(w, _factors(w, w_free))
    free = _factors(w, w_free)
    free_stack = tuple(f for f in free if f.axis == STACK)
    batch_stack = _factors(w, w_batch)
    batch_shape = [x.shape[i] for i in x_batch]
    rest = [x.shape[i] for i in x_free]

    # x to [batch, ..., K], with K in the order of the storage.
    order = _factors(w, w_contracting)
    sizes = [f.size for f in order]
    x = x.transpose([*x_batch, *x_free, *x_contracting]).reshape(*batch_shape, *rest, *sizes)
    lead = len(batch_shape) + len(rest)
    stored = sorted(range(len(order)), key=lambda i: -order[i].stride)
    x = x.transpose([*range(lead), *(lead + i for i in stored)])
    K = w.stored.qvalue.shape[-1]

    weight, index = views.flat_stack(w), views.stack_index(w, (*batch_stack, *free_stack))
    if batch_stack or free_stack:
        x = x.reshape(math.prod(batch_shape), *rest, K)
        index = jnp.asarray(index).reshape(-1)
        row = np.repeat(np.arange(x.shape[0]), index.shape[0] // x.shape[0])
        y = lax.map(lambda at: fp8_matmul(x[at[0]], weight, at[1], out_dtype), (row, index))
    else:  # batch dimensions, if any, have size 1
        y = fp8_matmul(x.reshape(*rest, K), weight, index, out_dtype)

    # From [batch, free stack, ..., out] to [batch, ..., dimensions of w].
    outs = sorted((f for f in free if f.axis == OUT), key=lambda f: -f.stride)
    y = y.reshape(*batch_shape, *(f.size for f in free_stack), *rest, *(f.size for f in outs))
    at = {f: len(batch_shape) + i for i, f in enumerate(free_stack)}
    start = len(batch_shape) + len(free_stack)
    at |= {f: start + len(rest) + i for i, f in enumerate(outs)}
    y = y.transpose(
        [*range(len(batch_shape)), *range(start, start + len(rest)), *(at[f] for f in free)]
    )
    return y.reshape(*batch_shape, *rest, *(w.shape[i] for i in w_free))


# Traced once a shape, and compiled where nothing around it is.
@functools.partial(jax.jit, static_argnums=3)
def fp8_matmul(x: jax.Array, w: QuantizedArray, layer: Any, out_dtype: Any) -> jax.Array:
    """`jaxquant.matmul`; the name is what jaxprs and profiles show."""
    return matmul(x, w, layer=layer, preferred_element_type=out_dtype)


def grouped_refusal(w: View, group: int, contracting: int) -> str:
    """Why `lax.ragged_dot` with these dimensions cannot run on the blocks; "" if it can."""
    reason = refusal(w, (contracting,), (group,))
    if reason:
        return reason
    (out,) = (dim for i, dim in enumerate(w.dims) if i not in (group, contracting))
    E, stack = w.shape[group], math.prod(w.stored.qvalue.shape[:-2])
    consecutive = views.one_factor(STACK, E, 1) == w.dims[group]
    if not consecutive or w.align % E or stack % E or {f.axis for f in out} - {OUT}:
        return "the groups are no consecutive matrices of the stack"
    return ""


def grouped_product(x: jax.Array, w: View, group_sizes: jax.Array, out_dtype: Any) -> jax.Array:
    """`lax.ragged_dot(x, w, group_sizes)` for a view that `grouped_refusal` has let pass."""
    E = group_sizes.shape[0]
    stack, layer = ((E,), None) if w.offset is None else ((-1, E), w.offset // E)
    weight = views.flat_stack(w)
    weight = jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[-2:]), weight)
    return fp8_grouped_matmul(x, weight, group_sizes, layer, out_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
@functools.partial(jax.jit, static_argnums=4)
def fp8_grouped_matmul(
    x: jax.Array, w: QuantizedArray, group_sizes: jax.Array, layer: Any, out_dtype: Any
) -> jax.Array:
    """`grouped_matmul`, with the derivative of `jaxquant.matmul`: straight through rounding."""
    return grouped_matmul(x, w, group_sizes, layer=layer, preferred_element_type=out_dtype)


@fp8_grouped_matmul.defjvp
def _straight_through(out_dtype: Any, primals: Any, tangents: Any) -> Any:
    x, w, group_sizes, layer = primals
    y = fp8_grouped_matmul(x, w, group_sizes, layer, out_dtype)
    if layer is not None:
        w = jax.tree.map(lambda leaf: take_layer(leaf, layer), w)
    weight = w.dequantize(tangents[0].dtype).mT
    return y, lax.ragged_dot(tangents[0], weight, group_sizes, preferred_element_type=out_dtype)


def _factors(w: View, dimensions: Any) -> Dim:
    return tuple(f for i in dimensions for f in w.dims[i])
