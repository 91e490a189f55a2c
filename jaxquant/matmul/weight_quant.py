"""The kernel behind `jaxquant.quantize`: which weights it takes, and what each device does.

It is for Hopper (compute capability 9.0), 128 x 128 blocks, and rows of which TMA can read and
write any part. Everything else stays with XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32

from jaxquant.blocked import WEIGHT_AMAX_FLOOR, quantize_by_xla
from jaxquant.hopper import interpreted, multiprocessors
from jaxquant.matmul.kernel_cache import kept
from jaxquant.matmul.partition import axes_of

_BLOCK = 128
_FLOATS = ("bfloat16", "float16", "float32")
# Bytes of a row, of which TMA wants a multiple of 16, are as many as its values.
_K_ALIGNMENT = 16


def quantize(
    w: Float[Array, "*lead N K"],
    block_size: tuple[int, int],
    dtype: Any,
    scale_fmt: str | None,
) -> tuple[Float[Array, "*lead N K"], Float32[Array, "*lead (N+127)//128 (K+127)//128"]]:
    """(qvalue, scale) of `jaxquant.quantize`, to the byte.

    Args:
      w: bfloat16, float16 or float32.
      block_size: of the config.
      dtype: of the config's format.
      scale_fmt: of the config.

    Raises:
      NotImplementedError: the device or the weight is not what the kernel takes; says why.
    """
    multiprocessors(w, "quantizations of weights")
    _check_operands(w, block_size)
    return _quantize(w, jnp.dtype(dtype), scale_fmt)


def _check_operands(w: Any, block_size: tuple[int, int]) -> None:
    def refuse(what: str, allowed: str) -> None:
        raise NotImplementedError(f"mosaic_gpu: {what}; the kernel takes {allowed}")

    if block_size != (_BLOCK, _BLOCK):
        refuse(f"block_size is {block_size}", f"({_BLOCK}, {_BLOCK})")
    if w.dtype not in _FLOATS:
        refuse(f"the weight is {w.dtype}", ", ".join(_FLOATS))
    if w.size == 0:
        refuse(f"the weight is empty ({list(w.shape)})", "others")
    if w.shape[-1] % _K_ALIGNMENT:
        refuse(f"K is {w.shape[-1]}", f"multiples of {_K_ALIGNMENT}")


# Compiled once a shape, also where the caller does not jit.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(w: Array, dtype: Any, scale_fmt: str | None) -> tuple[Array, Array]:
    kernel = functools.partial(_on_each_device, dtype=dtype, scale_fmt=scale_fmt)

    def xla(w):
        return quantize_by_xla(w, (_BLOCK, _BLOCK), dtype, WEIGHT_AMAX_FLOOR, scale_fmt)

    @custom_vmap
    def run(w):
        if interpreted():
            return kernel(w)
        # What is traced does not say its device: it may turn out to be a CPU.
        return lax.platform_dependent(w, cuda=kernel, default=xla)

    @run.def_vmap
    def _rule(axis_size, batched, w):  # one more leading axis
        del axis_size, batched
        return run(w), (True, True)

    return run(w)


def _on_each_device(w: Array, *, dtype: Any, scale_fmt: str | None) -> tuple[Array, Array]:
    """Quantizes what each device has, if that is whole blocks."""
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.matmul import weight_quant_sm90

    def run(w):
        return kept(weight_quant_sm90.quantize)(w, dtype, scale_fmt == "ue8m0")

    def partition(mesh, args, _):
        (w,) = args
        axes = [axes_of(w, dim, block, mesh) for dim, block in enumerate((1, _BLOCK, _BLOCK))]
        spec = NamedSharding(mesh, PartitionSpec(*(axis or None for axis in axes)))
        return mesh, run, (spec, spec), (spec,)

    stack = w.reshape(-1, *w.shape[-2:])
    if interpreted():  # its effects may not be partitioned
        qvalue, scale = run(stack)
    else:
        cut = custom_partitioning(run)
        # Which dimensions are cut alike: blocks too, where all are whole.
        N, K = w.shape[-2:]
        n, k = "n" if N % _BLOCK else "(sn b)", "k" if K % _BLOCK else "(sk c)"
        sizes: dict[str, Any] = {factor: _BLOCK for factor in "bc" if factor in n + k}
        cut.def_partition(partition, sharding_rule=f"l {n} {k} -> l {n} {k}, l sn sk", **sizes)
        qvalue, scale = cut(stack)
    return qvalue.reshape(w.shape), scale.reshape(*w.shape[:-2], *scale.shape[1:])
