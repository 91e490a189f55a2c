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
from jaxquant.transform.view import IN, OUT, STACK, View


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
    blocks = {STACK: 1, OUT: qa.block_size[0], IN: qa.block_size[1]}
    entries: dict[int, Any] = {}
    for dim, entry in zip(view.dims, (*spec, *[None] * len(view.dims)), strict=False):
        if not dim and entry is None:
            continue
        if view.offset is not None or len(dim) != 1 or dim[0].size != sizes[dim[0].axis]:
            return "shards of a slice or a reshape of the weight"
        axis = dim[0].axis
        names = (entry,) if isinstance(entry, str) else entry or ()
        shards = math.prod(mesh[name] for name in names)
        if shards > 1 and sizes[axis] % (shards * blocks[axis]):
            return f"{shards} shards of {sizes[axis]} cut its blocks of {blocks[axis]}"
        entries[axis] = entry
    axes = (STACK, OUT, IN)[-qa.ndim :]
    stored = PartitionSpec(*(entries.get(axis) for axis in axes))
    return dataclasses.replace(qa, qvalue=stored, scale=stored)


def _local(view: View, shard: QuantizedArray) -> View:
    """The view of a shard that has the layout of the view of the whole."""
    sizes = dict(zip((IN, OUT, STACK), reversed(shard.qvalue.shape), strict=False))
    dims = tuple(views.one_factor(d[0].axis, sizes[d[0].axis], 1) if d else () for d in view.dims)
    return dataclasses.replace(view, stored=shard, dims=dims)
