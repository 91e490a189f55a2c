"""How attention's kernels are cut where their operands lie on several devices: by heads.

XLA knows nothing of what a kernel computes, and would gather its operands on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.hopper import interpreted
from jaxquant.matmul.partition import axes_of


def across_devices(
    run: Callable[..., Any], operands: Any, of_operands: Any, of_results: Any
) -> Any:
    """`run(*operands)` on the devices of a mesh, each with some of the sequences and heads.

    Args:
      run: computes any number of sequences "b" and of key/value heads "h" by themselves.
      operands: a pytree of arrays.
      of_operands: the names of their dimensions, in their order; equal ones have the same size. A
        string stands for all arrays of a subtree.
      of_results: likewise.
    """
    if interpreted():  # its effects may not be partitioned
        return run(*operands)
    leaves, structure = jax.tree.flatten(operands)
    names = [of.split() for of in _broadcast(of_operands, operands)]

    def flat(*leaves):
        return run(*jax.tree.unflatten(structure, leaves))

    results = jax.eval_shape(flat, *leaves)
    result_names = [of.split() for of in _broadcast(of_results, results)]

    @custom_partitioning
    def apart(*leaves):
        return flat(*leaves)

    def partition(mesh, args, _):
        axes: dict[str, tuple[str, ...]] = {}
        for name in ("h", "b"):
            found = (
                axes_of(x, of.index(name), 1, mesh)
                for x, of in zip(args, names, strict=True)
                if name in of
            )
            taken = {axis for other in axes.values() for axis in other}
            axes[name] = next((f for f in found if f and not taken & {*f}), ())

        def sharding(of):
            return NamedSharding(mesh, PartitionSpec(*(axes.get(name) or None for name in of)))

        of_y = jax.tree.unflatten(jax.tree.structure(results), map(sharding, result_names))
        return mesh, _without_references(flat), of_y, tuple(map(sharding, names))

    def rule(names):
        return ", ".join(" ".join(of) for of in names)

    apart.def_partition(partition, sharding_rule=f"{rule(names)} -> {rule(result_names)}")
    return apart(*leaves)


def _without_references(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function with what it writes to as results: jax partitions nothing else."""
    from jax._src.state.discharge import discharge_state  # no public name does

    def pure(*leaves):
        traced, results = jax.make_jaxpr(run, return_shape=True)(*leaves)
        return jax.tree.unflatten(
            jax.tree.structure(results), jaxpr_as_fun(discharge_state(traced))(*leaves)
        )

    return pure


def dims_of(cache: Any, name: str, batch: str = "b") -> Any:
    """What to call the dimensions of each array of a cache.

    Args:
      cache: keys or values of all layers.
      name: tells dimensions of the two apart.
      batch: of sequences.
    """
    leaves, structure = jax.tree.flatten(cache)
    names = [
        " ".join(("l", batch, "h", *(f"{name}{i}x{dim}" for dim in range(x.ndim - 3))))
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, names)


def _broadcast(names: Any, tree: Any) -> list[str]:
    """A string for each leaf, given one for each of some subtrees."""
    return jax.tree.leaves(
        jax.tree.map(lambda of, sub: [of] * len(jax.tree.leaves(sub)), names, tree)
    )
