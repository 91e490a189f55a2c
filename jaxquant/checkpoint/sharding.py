"""How parameters are divided among the devices of a mesh: tensor parallelism.

As in Megatron-LM (https://arxiv.org/abs/1909.08053): most products are divided by their outputs,
and those that take such outputs in, `o_proj` and `down_proj`, by their inputs, so that a layer
exchanges activations twice. Blocks stay whole, so the bytes are those of one device. A fused weight
has groups of rows (`FusedLinear`), so that a device gets its share of each projection.
"""

from collections.abc import Mapping

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError

AXIS = "model"
_BY_INPUTS = {"o_proj", "down_proj"}
# Routers: every device looks at all of their few outputs.
_WHOLE = {"gate", "shared_expert_gate"}


def tensor_axis(mesh: Mesh) -> str:
    """The axis of a mesh that matrices are divided over: its only one, or "model".

    Raises:
      JaxquantError: not a Mesh, or no telling which axis.
    """
    if not isinstance(mesh, Mesh):
        raise JaxquantError(f"mesh is {mesh!r}; allowed: None or a jax.sharding.Mesh")
    axes = mesh.axis_names if len(mesh.axis_names) == 1 else {AXIS} & set(mesh.axis_names)
    if not axes:
        raise JaxquantError(
            f"mesh has axes {mesh.axis_names}; allowed: one axis of any name, or one of several "
            f"named {AXIS!r}, over which weights are divided"
        )
    return next(iter(axes))


def shardings(
    model: nnx.Module, matrices: Mapping[int, QuantConfig | None], mesh: Mesh
) -> dict[int, NamedSharding]:
    """How each parameter of an abstract model is laid out, by its id.

    Args:
      model: its parameters are ShapeDtypeStructs.
      matrices: id of a parameter that is a matrix or a stack of them, `[..., N, K]` -> how it is
        quantized. The other parameters are whole on every device.
      mesh: see `tensor_axis`. Along its other axes are copies.

    Raises:
      JaxquantError: as `tensor_axis`.
    """
    axis = tensor_axis(mesh)
    # Layers say nothing of shardings: XLA finds them, which it does along axes that are Auto.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    result = {}
    for path, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            spec = PartitionSpec()
            if id(param) in matrices and path[-2] not in _WHOLE:
                config = matrices[id(param)]
                block = (1, 1) if config is None else config.weight_block_size
                preferred = -1 if path[-2] in _BY_INPUTS else -2
                spec = _spec(param.get_value().shape, block, preferred, axis, mesh.shape[axis])
            result[id(param)] = NamedSharding(mesh, spec)
    return result


def _spec(
    shape: tuple[int, ...], block: tuple[int, int], preferred: int, axis: str, shards: int
) -> PartitionSpec:
    """N or K of `[..., N, K]`, the one that divides into equal runs of whole blocks, or neither."""
    for dim in (preferred, -3 - preferred):
        if shape[dim] % (shards * block[dim]) == 0:
            before = [None] * (len(shape) + dim)
            return PartitionSpec(*before, axis)
    return PartitionSpec()
