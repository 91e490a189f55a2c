"""The rule of `shard_map`: shards of a quantized array are its blocks' shards."""

import dataclasses
import math
from typing import Any

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from jaxquant.array import QuantizedArray
from jaxquant.transform import view as views
from jaxquant.transform.evaluate import Evaluator, rule
from jaxquant.transform.view import IN, OUT, STACK, Dim, View


@rule("shard_map")
def _shard_map(ev: Evaluator, eqn: JaxprEqn, operands: list[Any]) -> list[Any] | str:
    p = eqn.params
    args, specs = [], []
    for x, spec in zip(operands, p["in_specs"], strict=True):
        if isinstance(x, View):
            pieces = _specs(x, spec, p["mesh"].shape)
            if isinstance(pieces, str):
                return pieces
            x, spec = views.flat_stack(x), pieces
        args.append(x)
        specs.append(spec)

    def body(*args: Any) -> tuple[Any, ...]:
        inner = ev.inner()
        local = [
            _local(whole, x) if isinstance(whole, View) else x
            for whole, x in zip(operands, args, strict=True)
        ]
        return tuple(inner.array(x, eqn) for x in inner.run(p["jaxpr"], local))

    run = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=p["out_specs"],
        axis_names=p["newly_manual_axes"],
        check_vma=p["check_vma"],
    )
    return list(run(*args))


def _specs(view: View, spec: PartitionSpec, mesh: Any) -> QuantizedArray | str:
    """The specs of qvalue and scale for that of the logical array; or why there are none."""
    qa = views.flat_stack(view)
    sizes = dict(zip((IN, OUT, STACK), reversed(qa.qvalue.shape), strict=False))
    entries: dict[int, Any] = {}
    held = dict.fromkeys(sizes, 1)
    for dim, entry in zip(view.dims, (*spec, *[None] * len(view.dims)), strict=False):
        if not dim and entry is None:
            continue
        if view.offset is not None or len(dim) != 1:
            return "shards of a slice or a reshape of the weight"
        ((axis, n, stride),) = dim
        held[axis] *= n
        shards = _count(entry, mesh)
        if shards == 1:
            continue
        if n * stride != sizes[axis]:  # not the major dimension of its axis
            return "shards of a slice or a reshape of the weight"
        block = (1, *qa.block_size)[axis]
        if sizes[axis] % (shards * block):
            return f"{shards} shards of {sizes[axis]} cut its blocks of {block}"
        entries[axis] = entry
    if held != sizes:
        return "shards of a slice or a reshape of the weight"
    axes = (STACK, OUT, IN)[-qa.ndim :]
    stored = PartitionSpec(*(entries.get(axis) for axis in axes))
    return dataclasses.replace(qa, qvalue=stored, scale=stored)


def _local(view: View, shard: QuantizedArray) -> View:
    """The view of a shard that has the layout of the view of the whole."""
    whole, local = (
        dict(zip((IN, OUT, STACK), reversed(qa.qvalue.shape), strict=False))
        for qa in (views.flat_stack(view), shard)
    )

    def of_shard(dim: Dim) -> Dim:
        if not dim:
            return dim
        ((axis, n, stride),) = dim
        is_major = n * stride == whole[axis]
        return views.one_factor(axis, local[axis] // stride if is_major else n, stride)

    stored = views.logical_as(shard, view.stored)
    return dataclasses.replace(view, stored=stored, dims=tuple(map(of_shard, view.dims)))


def _count(entry: Any, mesh: Any) -> int:
    """Into how many shards an entry of a PartitionSpec divides."""
    return math.prod(mesh[name] for name in ((entry,) if isinstance(entry, str) else entry or ()))
