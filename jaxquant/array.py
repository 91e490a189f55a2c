"""QuantizedArray: FP8 values with one scale per block, as one pytree node."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A matrix (or a stack of them) in blocked FP8, stored K-major: the contraction axis last.

    Invariants, with (bo, bi) = block_size:

        qvalue.shape == (..., out, in)
        scale.shape  == (..., ceil(out / bo), ceil(in / bi))
        original[..., o, i] ~= qvalue[..., o, i] * scale[..., o // bo, i // bi]

    It is a pytree of `qvalue` and `scale`; the rest is static. Leading axes can be mapped,
    scanned and sharded like those of any array. Make one with `jaxquant.quantize`.

    Attributes:
      qvalue: `[..., out, in]`, float8_e4m3fn or float8_e5m2.
      scale: `[..., ceil(out / bo), ceil(in / bi)]`, float32.
      block_size: (bo, bi).
      dtype: of the array that was quantized, and the default of `dequantize`.
      activation_scheme: "dynamic" or None; what `jaxquant.matmul` does with its other operand.
      transposed: whether the logical array is `[..., in, out]`, as Flax kernels are. Only
        `shape` and `dequantize` differ; the storage stays K-major.
      in_dims: sizes of the logical dimensions that the contraction axis stands for, as in a Flax
        kernel `[heads, head_dim, out]`; () if it is one. `jaxquant.matmul` takes them as one.
      out_dims: likewise of the output axis, as in `[in, heads, head_dim]`.
    """

    qvalue: Any
    scale: Any
    block_size: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    activation_scheme: str | None = dataclasses.field(default="dynamic", metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    in_dims: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    out_dims: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: `[..., *out, *in]`, or `[..., *in, *out]` if transposed."""
        *lead, out, contracting = self.qvalue.shape
        outs, ins = self.out_dims or (out,), self.in_dims or (contracting,)
        return (*lead, *ins, *outs) if self.transposed else (*lead, *outs, *ins)

    @property
    def ndim(self) -> int:
        """Number of logical dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.qvalue.size

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized values and the scales."""
        return nbytes(self.qvalue) + nbytes(self.scale)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """`qvalue * scale` in the logical shape; `dtype` defaults to the original one."""
        from jaxquant import blocked  # above this module: it makes QuantizedArrays

        return blocked.dequantize(self, self.dtype if dtype is None else dtype)

    def __repr__(self) -> str:
        if getattr(self.qvalue, "ndim", 0) < 2:  # tree_map puts other things in the leaves
            return f"QuantizedArray(qvalue={self.qvalue!r}, scale={self.scale!r})"
        bo, bi = self.block_size
        shape = ",".join(map(str, self.shape))
        return (
            f"QuantizedArray({jnp.dtype(self.qvalue.dtype).name}[{shape}], blocks {bo}x{bi}, "
            f"from {jnp.dtype(self.dtype).name})"
        )


def nbytes(x: Any) -> int:
    """Bytes of an array, a ShapeDtypeStruct or a QuantizedArray."""
    if isinstance(x, QuantizedArray):
        return x.nbytes
    return int(np.prod(x.shape)) * x.dtype.itemsize
