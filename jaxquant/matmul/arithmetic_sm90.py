"""Float32 instructions of Hopper that Pallas has no name for.

A division by `/` is off by up to 2 ulp; the compiler makes of a product and a sum one instruction
or two, as it likes. With the instructions themselves a correctly rounded quotient takes three.

Pallas' interpreter runs no PTX: there IEEE's operators do the same.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import math as mlir_math
from jaxtyping import Array, Float32

from jaxquant.blocked import ieee_divide
from jaxquant.hopper import interpreted

_EXPONENT = 0x7F800000


def product(a: Array, b: Array, layout: Any) -> Float32[Array, "..."]:
    """`a * b`, rounded, even where the compiler would make one operation of it and a sum."""
    return a * b if interpreted() else _pointwise(_instruction("mul.rn.f32"), layout, a, b)


def reciprocal(x: Float32[Array, "..."], layout: Any) -> Float32[Array, "..."]:
    """`1 / x`, correctly rounded."""
    return 1 / x if interpreted() else _pointwise(_instruction("rcp.rn.f32"), layout, x)


def approximate_reciprocal(x: Float32[Array, "..."], layout: Any) -> Float32[Array, "..."]:
    """`1 / x` to within an ulp, in one instruction; 0 if the result is subnormal."""
    return 1 / x if interpreted() else _pointwise(_instruction("rcp.approx.ftz.f32"), layout, x)


def quotient(a: Array, b: Array, inverse: Array, layout: Any) -> Float32[Array, "..."]:
    """a / b, correctly rounded, where all that is computed is a normal number.

    P. Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, 1990.

    Args:
      a: a float32 value in registers.
      b: likewise, > 0.
      inverse: `reciprocal(b)`.
      layout: of all three.
    """
    if interpreted():
        return ieee_divide(a, b)
    q = a * inverse
    # The excess, not what is missing: so that -0 stays -0.
    excess = _pointwise(mlir_math.fma, layout, q, b, -a)
    return _pointwise(mlir_math.fma, layout, -excess, inverse, q)


def ceil_to_power_of_two(x: Float32[Array, "..."], layout: Any) -> Float32[Array, "..."]:
    """The least power of two >= x, for normal x > 0; infinity and NaN stay."""
    # What is in the mantissa carries into the exponent.
    power = _on_bits(lambda bits: (bits + 0x7FFFFF) & _EXPONENT, x, layout)
    return jnp.where(x < jnp.inf, power, x)


def floor_to_power_of_two(x: Float32[Array, "..."], layout: Any) -> Float32[Array, "..."]:
    """The largest power of two <= x, for normal x > 0; infinity stays."""
    return _on_bits(lambda bits: bits & _EXPONENT, x, layout)


def _on_bits(operation: Callable[[Any], Any], x: Array, layout: Any) -> Array:
    if interpreted():
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        return lax.bitcast_convert_type(operation(bits), jnp.float32)
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def run(_, x):
        bits = x.bitcast(ir.IntegerType.get_signless(32), output_is_signed=False)
        return operation(bits).bitcast(ir.F32Type.get())

    return run(x)  # pyright: ignore[reportCallIssue]


def _instruction(name: str) -> Callable[..., Any]:
    return mgpu.FragmentedArray._lift_fast_instr(name)


def _pointwise(operation: Callable[..., Any], layout: Any, *operands: Array) -> Array:
    result = plgpu.ShapeDtypeStruct(operands[0].shape, jnp.dtype(jnp.float32), layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(operands), return_type=result)
    def run(_, first, *others):
        return first._pointwise(operation, *others)

    return run(*operands)  # pyright: ignore[reportCallIssue]
