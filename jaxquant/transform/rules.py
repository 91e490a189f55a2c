"""The rules of `evaluate`: layout steps, products, and primitives that have a jaxpr inside."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.sharding import Sharding

from jaxquant.transform import product, view as views
from jaxquant.transform.evaluate import Evaluator, bind, enter, rule
from jaxquant.transform.view import STACK, View

Results = list[Any] | str | None


def _aval(eqn: JaxprEqn) -> Any:
    """Shape and dtype of the first result."""
    return eqn.outvars[0].aval


def _one(result: View | None) -> Results:
    return None if result is None else [result]


# Layout ------------------------------------------------------------------------------------------


@rule("transpose")
def _transpose(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    return _one(views.transpose(operands[0], eqn.params["permutation"]))


@rule("reshape", "squeeze")
def _reshape(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    if eqn.params["dimensions"] is not None and eqn.primitive.name == "reshape":
        return None
    shape = _aval(eqn).shape
    return _one(views.reshape(operands[0], shape)) or f"the blocks do not fit shape {list(shape)}"


@rule("broadcast_in_dim")
def _broadcast(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    shape, dimensions = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    return _one(views.broadcast(operands[0], shape, dimensions))


@rule("convert_element_type")
def _convert(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    return _one(views.astype(operands[0], eqn.params["new_dtype"]))


@rule("slice")
def _slice(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return _slices(ev, eqn, operands[0], p["start_indices"], _aval(eqn).shape, strides)


@rule("dynamic_slice")
def _dynamic_slice(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    view, *starts = operands
    if not isinstance(view, View):
        return None
    return _slices(ev, eqn, view, starts, eqn.params["slice_sizes"], (1,) * len(starts))


@rule("split")
def _split(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [views.take(operands[0], axis, at, n) for at, n in zip(starts, sizes, strict=True)]
    return _CUT if None in pieces else pieces


@rule("concatenate")
def _concatenate(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    return "joined with other arrays; join the results of their products instead"


@rule("unstack")
def _unstack(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    view, axis = operands[0], eqn.params["axis"]
    pieces = [_index(view, axis, i) for i in range(view.shape[axis])]
    return None if None in pieces else pieces


@rule("gather")
def _gather(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    view, index = operands
    p = eqn.params
    dims, sizes = p["dimension_numbers"], p["slice_sizes"]
    if not isinstance(view, View):
        return None
    partial = [i for i, (a, b) in enumerate(zip(sizes, view.shape, strict=True)) if a != b]
    fill = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if (
        len(partial) != 1
        or sizes[partial[0]] != 1
        or partial[0] not in dims.start_index_map
        or {*dims.collapsed_slice_dims} - {*partial}
        or dims.operand_batching_dims
        or (fill and len(dims.start_index_map) > 1)
        or not (p["fill_value"] is None or np.isnan(p["fill_value"]))
    ):
        return None
    (axis,) = partial
    index = index[..., dims.start_index_map.index(axis)]
    rows = views.take(view, axis, index, 1) if index.ndim == 0 and not fill else None
    rows = rows or views.gather(view, axis, index.reshape(-1), fill)
    if rows is None:
        return None
    is_stack = view.dims[axis][0].axis == STACK
    # The index's dimensions come first, then what is left of the view's; then all in their order.
    rest = [i for i in range(len(sizes)) if i not in dims.collapsed_slice_dims]
    rows = views.transpose(rows, [axis, *(i for i in range(len(sizes)) if i != axis)])
    rows = views.reshape(rows, (*index.shape, *(sizes[i] for i in rest)))
    lead, offset = iter(range(index.ndim)), iter(range(index.ndim, index.ndim + len(rest)))
    order = [next(offset if i in dims.offset_dims else lead) for i in range(_aval(eqn).ndim)]
    rows = rows and views.transpose(rows, order)
    if rows is None or is_stack:
        return _one(rows)
    return [ev.array(rows, eqn, "only what it looks up")]


@rule(
    "copy",
    "layout_constraint",
    "mesh_cast",
    "name",
    "pcast",
    "pvary",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
)
def _same(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    return operands  # a weight lies where its owner put it


@rule("device_put")
def _device_put(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    def put(x: Any, device: Any) -> Any:
        if isinstance(x, View):
            stay = device is None or isinstance(device, Sharding)
            stored = x.stored if stay else jax.device_put(x.stored, device)
            return dataclasses.replace(x, stored=stored)
        return jax.device_put(x, device)

    return [put(x, to) for x, to in zip(operands, eqn.params["devices"], strict=True)]


@rule("optimization_barrier")
def _barrier(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    arrays = iter(bind(eqn, [x for x in operands if not isinstance(x, View)]))
    return [x if isinstance(x, View) else next(arrays) for x in operands]


def _slices(
    ev: Evaluator, eqn: JaxprEqn, view: View, starts: Any, sizes: Any, steps: Any
) -> Results:
    cuts = False
    for i, (start, size, step) in enumerate(zip(starts, sizes, steps, strict=True)):
        result = views.take(view, i, start, size, step)
        if result is None:
            cuts = True
            start = jnp.clip(start, 0, view.shape[i] - (size - 1) * step - 1)
            result = views.gather(view, i, start + step * jnp.arange(size), fill=False)
        if result is None:
            return _CUT
        view = result
    return [ev.array(view, eqn, _CUT) if cuts else view]


_CUT = "a slice that cuts blocks"


def _index(view: View, axis: int, i: Any) -> View | None:
    result = views.take(view, axis, i, 1)
    shape = (*view.shape[:axis], *view.shape[axis + 1 :])
    return result and views.reshape(result, shape)


# Products ----------------------------------------------------------------------------------------


@rule("dot_general")
def _dot_general(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    lhs, rhs = operands
    contracting, batch = eqn.params["dimension_numbers"]
    out = _aval(eqn)
    if isinstance(lhs, View) and isinstance(rhs, View):
        return "a product of two quantized arrays"
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return f"a product of dtype {out.dtype}"
    swapped = isinstance(lhs, View)
    if swapped:
        lhs, rhs, contracting, batch = rhs, lhs, contracting[::-1], batch[::-1]
    reason = product.refusal(rhs, contracting[1], batch[1])
    if reason:
        return reason
    ev.note(rhs.leaf, "dot_general")
    x = lhs if jnp.issubdtype(lhs.dtype, jnp.floating) else lhs.astype(out.dtype)
    y = product.product(x, rhs, contracting, batch, out.dtype)
    if swapped:  # the result has the dimensions of the weight first
        b, n = len(batch[0]), len(rhs.dims) - len(contracting[1]) - len(batch[1])
        y = jnp.moveaxis(y, range(y.ndim - n, y.ndim), range(b, b + n))
    if eqn.params["out_sharding"] is not None:
        y = jax.sharding.reshard(y, eqn.params["out_sharding"])
    return [y]


@rule("ragged_dot_general")
def _ragged_dot(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    x, w, group_sizes = operands
    p, out = eqn.params, _aval(eqn)
    dims = p["ragged_dot_dimension_numbers"]
    contracting, batch = dims.dot_dimension_numbers
    if (
        not isinstance(w, View)
        or any(isinstance(operand, View) for operand in (x, group_sizes))
        or (contracting[0], batch) != ((1,), ((), ()))
        or (dims.lhs_ragged_dimensions, len(dims.rhs_group_dimensions)) != ((0,), 1)
        or p["group_offset"] is not None
        or not jnp.issubdtype(out.dtype, jnp.floating)
    ):
        return "not of the form of lax.ragged_dot"
    reason = product.grouped_refusal(w, dims.rhs_group_dimensions[0], contracting[1][0])
    if reason:
        return reason
    ev.note(w.leaf, "ragged_dot_general")
    return [product.grouped_product(x, w, group_sizes, out.dtype)]


# Primitives with a jaxpr inside ------------------------------------------------------------------


@rule("jit", "pjit")
def _jit(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    p = eqn.params
    operands = list(map(_constrain, operands, p["in_shardings"]))
    donated = tuple(i + 1 for i, d in enumerate(p["donated_invars"]) if d)
    wrap = functools.partial(_jitted, p["name"], donated, p["compiler_options_kvs"])
    results = enter(ev, wrap, p["jaxpr"], operands)
    return list(map(_constrain, results, p["out_shardings"]))


@functools.lru_cache(maxsize=256)
def _jitted(name: str, donated: tuple[int, ...], options: tuple, function: Any) -> Any:
    @functools.wraps(function)
    def run(jaxpr: Any, *operands: Any) -> Any:
        return function(jaxpr, *operands)

    run.__name__ = run.__qualname__ = name  # for profiles
    return jax.jit(run, donate_argnums=donated, compiler_options=dict(options) or None)


def _constrain(x: Any, sharding: Any) -> Any:
    if isinstance(x, View) or not isinstance(sharding, Sharding):
        return x
    return lax.with_sharding_constraint(x, sharding)


@rule("remat2", "checkpoint", "remat")
def _remat(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    p = eqn.params
    wrap = functools.partial(jax.checkpoint, prevent_cse=p["prevent_cse"], policy=p["policy"])
    return enter(ev, wrap, p["jaxpr"], operands)


@rule("custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "closed_call", "core_call")
def _call(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    # The rules of these are functions of arrays, so quantized operands leave them behind.
    names = ("call_jaxpr", "call", "jaxpr")
    return ev.inline(next(eqn.params[n] for n in names if n in eqn.params), operands)


@rule("cond")
def _cond(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    index, *operands = operands
    if isinstance(index, View):
        return None

    def branch(position: int, jaxpr: Jaxpr) -> Any:
        def run() -> list[Any]:
            inner = ev.inner(position)
            return [inner.array(x, eqn) for x in inner.run(jaxpr, operands)]

        return run

    return lax.switch(index, [branch(i, b) for i, b in enumerate(eqn.params["branches"])])


@rule("while")
def _while(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    carry = _Carry(ev, eqn, p["body_jaxpr"], m, operands[n + m :])

    def cond(state: list[Any]) -> Any:
        inner = ev.inner(0)
        (result,) = inner.run(p["cond_jaxpr"], [*operands[:n], *carry.join(state)])
        return result

    def body(state: list[Any]) -> list[Any]:
        inner = ev.inner(1)
        results = inner.run(p["body_jaxpr"], [*operands[n : n + m], *carry.join(state)])
        return [inner.array(x, eqn) for x in carry.varying(results)]

    return carry.join(lax.while_loop(cond, body, carry.init))


@rule("scan")
def _scan(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> Results:
    p = eqn.params
    length, jaxpr = p["length"], p["jaxpr"]
    n, m = (len(group) for group in p["ft_in"].unpack()[:2])
    consts, xs = operands[:n], operands[n + m :]
    carry = _Carry(ev, eqn, jaxpr, n, operands[n : n + m])
    # A stack is scanned by its index: nothing is sliced off it.
    stacks = {i: x for i, x in enumerate(xs) if isinstance(x, View) and _index(x, 0, 0)}
    arrays = {
        i: ev.array(x, eqn, "scanned along an axis of the blocks")
        for i, x in enumerate(xs)
        if i not in stacks
    }

    def body(state: list[Any], slices: Any) -> Any:
        index, arrays = slices
        inner = ev.inner(times=length)
        at = [_index(stacks[i], 0, index) if i in stacks else arrays[i] for i in range(len(xs))]
        results = inner.run(jaxpr, [*consts, *carry.join(state), *at])
        state = [inner.array(x, eqn) for x in carry.varying(results[:m])]
        return state, [inner.array(x, eqn) for x in results[m:]]

    state, ys = lax.scan(
        body,
        carry.init,
        (jnp.arange(length, dtype=jnp.int32), arrays),
        length=length,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry.join(state), *ys]


class _Carry:
    """The carry of a loop, less the Views that its body passes on as they are."""

    def __init__(
        self, ev: Evaluator, eqn: JaxprEqn, body: Jaxpr, num_consts: int, values: list[Any]
    ):
        passed = _passed_on(body)
        self._fixed = {
            i: x
            for i, x in enumerate(values)
            if isinstance(x, View) and passed[i] == num_consts + i
        }
        self._size = len(values)
        self.init = [ev.array(x, eqn, "the loop changes it") for x in self.varying(values)]

    def varying(self, values: list[Any]) -> list[Any]:
        """All values but the fixed Views."""
        return [x for i, x in enumerate(values[: self._size]) if i not in self._fixed]

    def join(self, varying: list[Any]) -> list[Any]:
        """All values again."""
        rest = iter(varying)
        return [self._fixed[i] if i in self._fixed else next(rest) for i in range(self._size)]


def _passed_on(jaxpr: Jaxpr) -> list[int | None]:
    """For each result, the number of the argument that it is, unchanged; None if it is none."""
    origin: dict[Any, int | None] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            inner = _passed_on(eqn.params["jaxpr"])
        elif eqn.primitive.name in ("optimization_barrier", "sharding_constraint", "copy"):
            inner = list(range(len(eqn.outvars)))
        else:
            continue
        for v, i in zip(eqn.outvars, inner, strict=True):
            if i is not None and not isinstance(eqn.invars[i], Literal):
                origin[v] = origin.get(eqn.invars[i])
    return [None if isinstance(v, Literal) else origin.get(v) for v in jaxpr.outvars]
