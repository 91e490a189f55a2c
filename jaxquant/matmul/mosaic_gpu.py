"""Pallas kernels (Mosaic GPU) behind `matmul`: which products they take and which kernel runs.

A product is two kernels, one that quantizes the activations and one that multiplies: `decode`
for few tokens, `gemm` for many. They are for Hopper (compute capability 9.0); every other device
keeps the XLA reference.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.array import QuantizedArray

_logger = logging.getLogger(__name__)

_BLOCK_SIZE = (128, 128)
_FLOATS = ("bfloat16", "float32")
# What TMA's swizzled tiles divide.
_K_ALIGNMENT = 32
_N_ALIGNMENT = 8
_M_ALIGNMENT = 8


def matmul(
    x: Float[Array, "*batch K"], w: QuantizedArray, layer: Any, out_dtype: Any
) -> Float[Array, "*batch N"]:
    """`x @ w^T` in FP8 on a Hopper GPU. See `jaxquant.matmul.matmul`.

    Raises:
      NotImplementedError: the device or the operands are not what the kernels take; says why.
    """
    sms = _multiprocessors(x)
    _check_operands(x, w, out_dtype)
    qvalue, scale = jnp.asarray(w.qvalue), jnp.asarray(w.scale)
    if layer is None:
        qvalue, scale, layer = qvalue[None], scale[None], 0
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    run = _batchable(jnp.dtype(out_dtype), sms)
    y = run(x.reshape(-1, x.shape[-1]), qvalue, scale, layer)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _multiprocessors(x: Any) -> int:
    """Multiprocessors of the Hopper GPU that the product will run on."""
    device = _device(x)
    if device.platform != "gpu":
        reason = f"mosaic_gpu: the device is a {device.platform}; the kernels are for Hopper GPUs"
    elif not str(device.compute_capability).startswith("9."):
        reason = (
            f"mosaic_gpu: {device.device_kind} has compute capability {device.compute_capability}; "
            "the kernels are for 9.0 (Hopper)"
        )
    else:
        return device.core_count
    _log_once(f"{reason}: FP8 products run through XLA")
    raise NotImplementedError(reason)


def _device(x: Any) -> Any:
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return next(iter(x.devices()))
    # What is traced says nothing of its device: take the one that jit takes.
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.devices(default)[0]
    return jax.devices()[0] if default is None else default


@functools.cache
def _log_once(message: str) -> None:
    _logger.info(message)


def _check_operands(x: Any, w: QuantizedArray, out_dtype: Any) -> None:
    def refuse(what: str, allowed: str) -> None:
        raise NotImplementedError(f"mosaic_gpu: {what}; the kernels take {allowed}")

    if w.activation_scheme != "dynamic":
        refuse(f"activation_scheme is {w.activation_scheme!r}", "'dynamic'")
    if w.qvalue.dtype != jnp.float8_e4m3fn:
        refuse(f"the weight is {w.qvalue.dtype}", "float8_e4m3fn")
    if w.block_size != _BLOCK_SIZE:
        refuse(f"block_size is {w.block_size}", f"{_BLOCK_SIZE}")
    if x.dtype not in _FLOATS:
        refuse(f"x is {x.dtype}", " and ".join(_FLOATS))
    if jnp.dtype(out_dtype) not in _FLOATS:
        refuse(f"the result is {jnp.dtype(out_dtype)}", " and ".join(_FLOATS))
    if x.size == 0 or w.qvalue.size == 0:
        refuse(f"an operand is empty (x {list(x.shape)}, w {list(w.qvalue.shape)})", "others")
    N, K = w.qvalue.shape[-2:]
    if K % _K_ALIGNMENT:
        refuse(f"K is {K}", f"multiples of {_K_ALIGNMENT}")
    if N % _N_ALIGNMENT:
        refuse(f"N is {N}", f"multiples of {_N_ALIGNMENT}")


@functools.cache
def _batchable(out_dtype: Any, sms: int) -> Any:
    """`_run`, and what `jax.vmap` makes of it."""

    @custom_vmap
    def run(x, qvalue, scale, layer):
        return _run(x, qvalue, scale, layer, out_dtype=out_dtype, sms=sms)

    @run.def_vmap
    def _rule(axis_size, batched, x, qvalue, scale, layer):
        x_batched, *w_batched = batched
        K, N = x.shape[-1], qvalue.shape[-2]
        if not any(w_batched):  # more tokens of one product
            y = run(x.reshape(-1, K), qvalue, scale, layer)
            return y.reshape(axis_size, -1, N), True
        # One product after the other, each with its matrix read in place: a batch of stacks is
        # a longer stack.
        from jaxquant.matmul.sm90 import in_stack

        L = qvalue.shape[-3]
        index = jnp.broadcast_to(in_stack(layer, L), (axis_size, 1))
        if w_batched[0] or w_batched[1]:
            qvalue, scale = (
                a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
                for a, is_batched in zip((qvalue, scale), w_batched[:2], strict=True)
            )
            index = index + L * jnp.arange(axis_size, dtype=jnp.int32)[:, None]
            qvalue, scale = (a.reshape(-1, *a.shape[2:]) for a in (qvalue, scale))
        if x_batched:
            y = lax.map(lambda of: run(of[0], qvalue, scale, of[1]), (x, index))
        else:
            y = lax.map(lambda l: run(x, qvalue, scale, l), index)
        return y, True

    return run


# Compiled once a shape, also where the caller does not jit.
@functools.partial(jax.jit, static_argnames=("out_dtype", "sms"))
def _run(
    x: Float[Array, "M K"],
    qvalue: Float[Array, "L N K"],
    scale: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    *,
    out_dtype: Any,
    sms: int,
) -> Float[Array, "M N"]:
    """Quantizes x and multiplies."""
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.matmul import decode_sm90, gemm_sm90
    from jaxquant.matmul.act_quant_sm90 import TILE_M, quantize_activations
    from jaxquant.matmul.sm90 import round_up

    (M, K), N = x.shape, qvalue.shape[1]
    rows = round_up(M, _M_ALIGNMENT)
    if M > _M_ALIGNMENT:  # fewer rows TMA pads itself
        x = jnp.pad(x, ((0, rows - M), (0, 0)))
    scale_rows = round_up(M, TILE_M)
    if decode_sm90.takes(M, N, sms):
        tokens = decode_sm90.padded_tokens(M)
        xq, sx = quantize_activations(x, tokens, scale_rows)
        config = decode_sm90.default_config(M, N, K, sms)
        return decode_sm90.decode(
            xq, sx, qvalue, scale, layer, M=M, out_dtype=out_dtype, config=config, sms=sms
        )
    xq, sx = quantize_activations(x, rows, scale_rows)
    config = gemm_sm90.default_config(M, N, K, sms)
    y = gemm_sm90.gemm(xq, sx, qvalue, scale, layer, out_dtype=out_dtype, config=config, sms=sms)
    return y[:M]
