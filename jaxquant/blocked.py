"""Blocked FP8: amax, scale, quantize, dequantize, to the byte.

For a weight w `[..., out, in]`, blocks (bo, bi), edge blocks cut short:

    amax[i, j]   = max(max |w| over the block, 1e-6)          float32
    scale[i, j]  = amax / fmax                                float32, IEEE division
    qvalue[o, i] = round_to_nearest_even(clip(w / scale, -fmax, fmax))

as in DeepSeek-V3 and lmdeploy's TurboMind, whose bytes this module reproduces on every backend.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped

from jaxquant.array import QuantizedArray
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError

WEIGHT_AMAX_FLOOR = 1e-6
ACTIVATION_AMAX_FLOOR = 1e-10
ACTIVATION_GROUP = 128
_IMPLEMENTATIONS = ("mosaic_gpu", "xla")


def quantize(
    w: Float[Array | np.ndarray, "*lead out in"],
    config: QuantConfig | None = None,
    *,
    implementation: str | None = None,
) -> QuantizedArray:
    """Quantizes a K-major weight to blocked FP8. Jittable and pure.

    Args:
      w: `[..., out, in]` of a floating dtype, the contraction axis last (the Hugging Face
        layout). Leading axes are separate matrices.
      config: block size, format and scales; default `QuantConfig()`.
      implementation: "mosaic_gpu", a kernel for Hopper GPUs, or "xla", which takes longer to run
        and less time to compile; default: the first that can run. The bytes are the same.

    Returns:
      A QuantizedArray with `w ~= qvalue * scale[block]`. A block that holds a NaN or an Inf has a
      scale that is NaN or Inf; `check_finite` looks for those.

    Raises:
      JaxquantError: w has fewer than two dimensions or is not floating; an unknown implementation.
      NotImplementedError: the forced implementation cannot run this, with the reason.

    >>> quantize(jnp.ones((200, 300), jnp.bfloat16)).scale.shape
    (2, 3)
    """
    config = config or QuantConfig()
    check_quantizable(w)
    w = jnp.asarray(w)  # numpy's float64 becomes float32
    if implementation not in (None, *_IMPLEMENTATIONS):
        raise JaxquantError(
            f"quantize: implementation is {implementation!r}; allowed: "
            f"{', '.join(_IMPLEMENTATIONS)}"
        )
    qvalue, scale = _quantize_weight(
        w, config.weight_block_size, config.fmt_dtype, config.scale_fmt, implementation
    )
    return QuantizedArray(
        qvalue,
        scale,
        block_size=config.weight_block_size,
        dtype=jnp.dtype(w.dtype),
        activation_scheme=config.activation_scheme,
    )


def quantize_activations(
    x: Float[Array, "*lead K"], group: int = ACTIVATION_GROUP
) -> tuple[Float[Array, "*lead K"], Float32[Array, "*lead groups"]]:
    """Quantizes activations to e4m3, one scale per token and group of columns.

    Args:
      x: `[..., K]`, floating; K may be ragged.
      group: columns that share a scale.

    Returns:
      qvalue `[..., K]` float8_e4m3fn and scale `[..., ceil(K / group)]` float32, with
      `scale = max(amax, 1e-10) / 448`.
    """
    qvalue, scale = quantize_by_xla(
        x[..., None, :],
        (1, group),
        jnp.dtype(jnp.float8_e4m3fn),
        ACTIVATION_AMAX_FLOOR,
        None,
    )
    return qvalue[..., 0, :], scale[..., 0, :]


def dequantize(qa: QuantizedArray, dtype: Any = jnp.bfloat16) -> Float[Array, "..."]:
    """`qvalue * scale` per block, in float32, then cast to dtype; the logical shape of `qa`.

    >>> dequantize(quantize(jnp.ones((2, 3)))).shape
    (2, 3)
    """
    return _dequantize(qa, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(qa: QuantizedArray, dtype: Any) -> Array:
    scale = expand_blocks(qa.scale, qa.block_size, qa.qvalue.shape)
    w = (widen(hold(qa.qvalue)) * scale).astype(dtype)
    return (w.mT if qa.transposed else w).reshape(qa.shape)


def check_quantizable(w: Any) -> None:
    """Raises JaxquantError unless w is a floating array with two or more dimensions."""
    if w.ndim < 2:
        raise JaxquantError(f"quantize: shape {tuple(w.shape)}; a weight has 2 or more dimensions")
    if not jnp.issubdtype(w.dtype, jnp.floating) or jnp.dtype(w.dtype).itemsize == 1:
        raise JaxquantError(
            f"quantize: dtype {jnp.dtype(w.dtype).name}; allowed: bfloat16, float16, float32"
        )


def check_finite(qa: QuantizedArray, name: str) -> None:
    """Raises JaxquantError, naming the tensor, if the weight held a NaN or an Inf.

    A block's scale is finite exactly when all of its weights are, so only scales are looked at.
    Waits for the device.
    """
    bad = ~np.isfinite(np.asarray(qa.scale))
    if bad.any():
        block = tuple(int(i) for i in np.argwhere(bad)[0])
        raise JaxquantError(
            f"{name}: NaN or Inf in {int(bad.sum())} of {bad.size} blocks (first: block {block}); "
            "the checkpoint is damaged, or was trained to this: fix it before quantizing"
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _quantize_weight(
    w: Array,
    block_size: tuple[int, int],
    dtype: np.dtype,
    scale_fmt: str | None,
    implementation: str | None,
) -> tuple[Array, Array]:
    if implementation != "xla":
        from jaxquant.matmul import weight_quant  # which stands above this module

        try:
            return weight_quant.quantize(w, block_size, dtype, scale_fmt)
        except NotImplementedError:
            if implementation is not None:
                raise
    return quantize_by_xla(w, block_size, dtype, WEIGHT_AMAX_FLOOR, scale_fmt)


@_quantize_weight.defjvp
def _jvp_by_xla(block_size, dtype, scale_fmt, _, primals, tangents):
    def run(w):
        return quantize_by_xla(w, block_size, dtype, WEIGHT_AMAX_FLOOR, scale_fmt)

    return jax.jvp(run, primals, tangents)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def quantize_by_xla(
    w: Shaped[Array, "*lead out in"],
    block_size: tuple[int, int],
    dtype: np.dtype,
    amax_floor: float,
    scale_fmt: str | None,
) -> tuple[Array, Array]:
    """(qvalue, scale) as the module defines them, on any device.

    Args:
      w: floating.
      block_size: (out, in).
      dtype: float8_e4m3fn or float8_e5m2.
      amax_floor: least amax of a block.
      scale_fmt: "ue8m0" for scales that are powers of two, or None.

    Returns:
      qvalue `[*lead, out, in]` of `dtype` and its scale, float32, one for each block.
    """
    fmax = float(jnp.finfo(dtype).max)
    w = w.astype(jnp.float32)
    amax = jnp.maximum(_block_amax(w, block_size), jnp.float32(amax_floor))
    scale = ieee_divide(amax, jnp.full_like(amax, fmax))
    if scale_fmt == "ue8m0":
        scale = _ceil_to_power_of_two(scale)
    ratio = ieee_divide(w, expand_blocks(scale, block_size, w.shape))
    return narrow(jnp.clip(ratio, -fmax, fmax), dtype), scale


def _block_amax(w: Array, block_size: tuple[int, int]) -> Array:
    *lead, out, contracting = w.shape
    (bo, bi), (no, ni) = block_size, grid_shape(w.shape, block_size)
    pad = [(0, 0)] * len(lead) + [(0, no * bo - out), (0, ni * bi - contracting)]
    # As integers, which sort like the magnitudes whose bits they are, NaN above Inf: XLA:CPU's
    # maximum of floats loses NaN.
    bits = lax.bitcast_convert_type(w, jnp.uint32) & 0x7FFFFFFF
    blocks = jnp.pad(bits, pad).reshape(*lead, no, bo, ni, bi)
    if bo % 8 == 0 and jax.default_backend() == "cpu":
        # XLA:CPU vectorizes the maximum of two arrays, but not that of an axis.
        eighths = blocks.reshape(*lead, no, 8, bo // 8, ni, bi)
        blocks = functools.reduce(jnp.maximum, (eighths[..., i, :, :, :] for i in range(8)))
    return lax.bitcast_convert_type(jnp.max(blocks, axis=(-3, -1), initial=0), jnp.float32)


def grid_shape(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, int]:
    """Blocks along (out, in) of a K-major shape: `(ceil(out / bo), ceil(in / bi))`."""
    return -(-shape[-2] // block_size[0]), -(-shape[-1] // block_size[1])


def expand_blocks(scale: Array, block_size: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """Repeats `scale [..., no, ni]` over its blocks to `shape [..., out, in]`."""
    (bo, bi), (no, ni) = block_size, grid_shape(shape, block_size)
    lead = scale.shape[:-2]
    full = jnp.broadcast_to(scale[..., :, None, :, None], (*lead, no, bo, ni, bi))
    return full.reshape(*lead, no * bo, ni * bi)[..., : shape[-2], : shape[-1]]


def take_layer(stack: Array, layer: Any) -> Array:
    """`stack[layer]`, FP8 values moved as bytes.

    XLA:CPU moves float8 by way of float16, and all of the stack for one layer of it.
    """
    if jax.default_backend() == "cpu":
        # Keeps a loop over layers from taking the bytes of the whole stack in front of it.
        stack, layer = lax.optimization_barrier((stack, layer))
    layer_bytes = lax.dynamic_index_in_dim(as_bytes(stack), layer, keepdims=False)
    return lax.bitcast_convert_type(layer_bytes, stack.dtype)


def put(param: Array, rows: Array, index: tuple, row: Any) -> Array:
    """`param` with `param[*index, row : row + len(rows)] = rows`, FP8 values moved as bytes.

    In place if `param` is donated. `index` is of the leading axes: layers, experts.
    """
    start = (*index, row, *(0 for _ in rows.shape[1:]))
    rows = rows.reshape(*(1 for _ in index), *rows.shape)
    new = lax.dynamic_update_slice(as_bytes(param), as_bytes(rows), start)
    return lax.bitcast_convert_type(new, param.dtype)


def as_bytes(x: Array) -> Array:
    """FP8 values as the uint8 that they are; anything else as it is."""
    return lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x


def hold(qvalue: Array) -> Array:
    """The values, rounded: on a GPU, XLA drops a conversion to FP8 and back where it sees both."""
    return qvalue if jax.default_backend() == "cpu" else lax.optimization_barrier(qvalue)


def widen(qvalue: Array) -> Float32[Array, "..."]:
    """FP8 values in float32, exactly."""
    if qvalue.dtype == jnp.float8_e4m3fn and jax.default_backend() == "cpu":
        return _widen_e4m3(qvalue)  # XLA:CPU vectorizes this, unlike its own conversion
    return qvalue.astype(jnp.float32)


def narrow(x: Float32[Array, "..."], dtype: np.dtype) -> Array:
    """Rounds to the nearest FP8 value, ties to even; no |x| is above the largest of them."""
    if dtype == jnp.float8_e4m3fn and jax.default_backend() == "cpu":
        return _narrow_e4m3(x)  # likewise
    return x.astype(dtype)


def _narrow_e4m3(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    # 3 of 23 mantissa bits stay: half of what goes is added, less one where the rest is even.
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    normal = normal - ((127 - 7) << 3)
    # Below 2^-6 the values are multiples of 2^-9, the unit in the last place of 2^14.
    shift = jnp.float32(2.0**14)
    small = lax.bitcast_convert_type(magnitude, jnp.float32) + shift
    small = lax.bitcast_convert_type(small, jnp.uint32) - lax.bitcast_convert_type(
        shift, jnp.uint32
    )
    value = jnp.where(magnitude < (127 - 6) << 23, small, normal)
    value = jnp.where(magnitude > 0x7F800000, 0x7F, value)  # NaN
    value = value | ((bits >> 24) & 0x80)
    return lax.bitcast_convert_type(value.astype(jnp.uint8), jnp.float8_e4m3fn)


def _widen_e4m3(qvalue: Array) -> Array:
    # With exponent e and mantissa m, the value is 2^(e - 7) * (1 + m / 8), or m * 2^-9 if e = 0.
    bits = as_bytes(qvalue).astype(jnp.uint32)
    magnitude = bits & 0x7F
    normal = lax.bitcast_convert_type((magnitude + ((127 - 7) << 3)) << 20, jnp.float32)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, normal)
    value = jnp.where(magnitude == 0x7F, jnp.nan, value)
    return jnp.where(bits < 0x80, value, -value)


def ieee_divide(a: Array, b: Array) -> Array:
    """a / b, correctly rounded, for finite b > 0, wherever the quotient is a normal number.

    XLA turns a division by a constant or by a broadcast into a multiplication by its reciprocal,
    which is off by one ulp now and then; and GPUs divide to within 2 ulp.
    """
    if jax.default_backend() == "cpu":
        # The select makes the divisor depend on `a`, so XLA has to divide, and it fuses, where an
        # optimization barrier would cost a pass. Where `a` is NaN the quotient is so either way.
        return a / jnp.where(jnp.isnan(a), a, b)
    return _corrected(a / b, a, b)


def _corrected(quotient: Array, a: Array, b: Array) -> Array:
    """`a / b`, correctly rounded, from a quotient that is off by a few ulp.

    The remainder, computed exactly, corrects it to within 1 ulp, and then tells whether the next
    number is closer.
    """
    remainder = _remainder(a, quotient, b)
    quotient = jnp.where(jnp.abs(remainder) > 0, quotient + remainder / b, quotient)
    remainder = _remainder(a, quotient, b)
    step = jnp.where((remainder > 0) == (a > 0), 1, -1)
    bits = lax.bitcast_convert_type(quotient, jnp.int32) + step
    neighbour = lax.bitcast_convert_type(bits, jnp.float32)
    closer = jnp.abs(_remainder(a, neighbour, b)) < jnp.abs(remainder)
    return jnp.where(closer, neighbour, quotient)


def _remainder(a: Array, quotient: Array, b: Array) -> Array:
    """`a - quotient * b`, exact where the quotient is off by a few ulp."""
    (qh, ql), (bh, bl) = _split(quotient), _split(b)
    return (((a - qh * bh) - qh * bl) - ql * bh) - ql * bl


def _split(x: Array) -> tuple[Array, Array]:
    """x as a sum of two numbers of 12 significant bits, whose products are exact."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def _ceil_to_power_of_two(x: Array) -> Array:
    """The least power of two >= x, for positive normal float32, by exponent and mantissa bits."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    power = lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(jnp.isfinite(x), power, x)
