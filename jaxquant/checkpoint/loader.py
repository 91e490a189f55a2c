"""Loading: a stream of slabs, each of which is FP8 already when it is put in its place.

The place is in a stack of layers that was allocated once, on one device or divided among several.
"""

import contextlib
import itertools
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import Item, Plan
from jaxquant.checkpoint.progress import Progress
from jaxquant.checkpoint.sharding import shardings, tensor_axis
from jaxquant.checkpoint.stream import skipped_reports, stream
from jaxquant.checkpoint.target import Destination, Target
from jaxquant.models.layers import Stack
from jaxquant.models.registry import places
from jaxquant.report import QuantReport


def load(
    folder: CheckpointFolder,
    plan: Plan,
    dtype: Any,
    mesh: Mesh | None = None,
    *,
    progress: bool | None = None,
) -> tuple[Any, QuantReport]:
    """Loads the tensors of a plan, each read once and nothing else.

    Args:
      folder: the checkpoint.
      plan: made from it. What a plan of some layers (`Plan.only`) leaves out stays abstract.
      dtype: of parameters that are not quantized, and of activations.
      mesh: devices to divide the parameters among (`sharding.py`); a process reads what its own
        devices hold. None puts them on the default device.
      progress: whether to show a bar; None shows it on a terminal.

    Returns:
      The family's model with its parameters, and the report, of what this process has read.

    Raises:
      CheckpointError: NaN or Inf in a tensor, by name; a file that cannot be read, or changes.
      JaxquantError: a mesh that does not say what to divide over.
    """
    dtype = jnp.dtype(dtype)
    axis = None if mesh is None else tensor_axis(mesh)
    devices = 1 if mesh is None else mesh.shape[axis]
    model = plan.family.abstract_model(dtype, _stacks(plan, devices))
    place_of = places(model, {item.name: item.slot for item in plan.items})
    # A router's correction bias stays float32, whatever the model is in.
    dtypes = {name: jnp.dtype(place.param.get_value().dtype) for name, place in place_of.items()}
    matrices = {
        id(place_of[item.name].param): item.config
        for item in plan.items
        if len(item.slot.shape) == 2
    }
    layout = {} if mesh is None else shardings(model, matrices, mesh)
    targets = {
        id(place.param): Target(
            place.param, matrices.get(id(place.param)), dtype, layout.get(id(place.param))
        )
        for place in place_of.values()
    }
    destinations = {
        name: Destination(targets[id(place.param)], place.index, place.row, place.group)
        for name, place in place_of.items()
    }
    total = sum(folder.info(item.name).nbytes for item in plan.items)
    with (
        Progress(f"Loading {folder.path.name}", total, progress) as bar,
        contextlib.closing(stream(folder, plan.items, dtypes, bar, destinations)) as slabs,
    ):
        entries = [slab.report for slab in slabs if slab.report is not None]
        for target in targets.values():
            target.finish()
        return model, QuantReport((*entries, *skipped_reports(folder, plan)), bar.timing())


def _stacks(plan: Plan, devices: int) -> list[Stack]:
    """Runs of layers in which the same parameters are quantized, for so many devices."""
    layers: dict[int, list[Item]] = {}
    for item in plan.items:
        if item.slot.layer is not None:
            layers.setdefault(item.slot.layer, []).append(item)
    alignment = 1 if plan.config is None else plan.config.weight_block_size[0]
    stacks = []
    for _, run in itertools.groupby(
        layers, key=lambda l: [(item.slot.path, item.config) for item in layers[l]]
    ):
        first, *others = run
        numbers = range(first, first + len(others) + 1)
        separate = _mixed(layers[first])
        stacks.append(Stack(numbers, alignment, separate, groups=devices))
    return stacks


def _mixed(layer: list[Item]) -> frozenset[str]:
    """The fused products of which some weights are quantized and some are kept."""
    configs: dict[str, set] = {}
    for item in layer:
        if item.slot.product is not None and len(item.slot.shape) == 2:
            configs.setdefault(item.slot.product, set()).add(item.config)
    return frozenset(product for product, found in configs.items() if len(found) > 1)
