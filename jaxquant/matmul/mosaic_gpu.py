"""Pallas kernels (Mosaic GPU) behind `matmul`: which products they take and which kernel runs.

A product of one token, or two, is one kernel, `gemv`, with all that stands around it. Others are
two: one that quantizes the activations after the prologue, and one that multiplies, `decode` for
few tokens or `gemm` for many. A weight-only product is one kernel, `w8a16`, after what XLA makes of
the prologue, or for many tokens one of XLA's. They are for Hopper (compute capability 9.0); every
other device keeps the XLA reference.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, BFloat16, Float, Int32

from jaxquant.array import QuantizedArray
from jaxquant.hopper import multiprocessors
from jaxquant.matmul.kernel_cache import kept
from jaxquant.matmul.partition import across_devices
from jaxquant.matmul.prologue import Prologue, RMSNorm, SiluMul
from jaxquant.matmul.tokens import QuantizedTokens
from jaxquant.matmul.xla import finish

_BLOCK_SIZE = (128, 128)
_FLOATS = ("bfloat16", "float32")
# What TMA's swizzled tiles divide.
_K_ALIGNMENT = 32
_N_ALIGNMENT = 8
_M_ALIGNMENT = 8


def matmul(
    x: Float[Array, "*batch A"] | QuantizedTokens,
    w: QuantizedArray,
    layer: Any,
    out_dtype: Any,
    prologue: Prologue | None = None,
    bias: Float[Array, "..."] | None = None,
    residual: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch N"]:
    """`x @ w^T` in FP8 on a Hopper GPU. See `jaxquant.matmul.matmul`.

    Raises:
      NotImplementedError: the device or the operands are not what the kernels take; says why.
    """
    sms = multiprocessors(x, "FP8 products")
    weight_only = w.activation_scheme is None
    if prologue is not None and (weight_only or not fuses(prologue, x)):
        assert not isinstance(x, QuantizedTokens)  # which `matmul` refuses
        x, prologue = prologue(x, layer), None
    check_operands(x, w, out_dtype)
    out_dtype, N = jnp.dtype(out_dtype), w.qvalue.shape[-2]
    stacks, layer = as_stacks(w, layer, prologue, bias, out_dtype)
    rows = None if residual is None else residual.reshape(-1, N).astype(out_dtype)
    run = _batchable(_run_weight_only if weight_only else run_product, out_dtype, sms)
    tokens = x if isinstance(x, QuantizedTokens) else x.reshape(-1, x.shape[-1])
    y = run(tokens, rows, stacks, layer)
    return y.reshape(*x.shape[:-1], N)


def as_stacks(w: QuantizedArray, layer: Any, prologue: Any, bias: Any, out_dtype: Any) -> Any:
    """(qvalue, scale, prologue, bias), and the index `[1]` of the layer."""
    stacks = jnp.asarray(w.qvalue), jnp.asarray(w.scale)
    if layer is None:
        stacks, layer = (stacks[0][None], stacks[1][None]), 0
    # What has no axis of layers becomes a stack of one, which has that one layer for any index.
    if isinstance(prologue, RMSNorm):
        weight = prologue.weight.reshape(-1, prologue.weight.shape[-1])
        prologue = dataclasses.replace(prologue, weight=weight)
    bias = None if bias is None else bias.reshape(-1, w.qvalue.shape[-2]).astype(out_dtype)
    return (*stacks, prologue, bias), jnp.asarray(layer, jnp.int32).reshape(1)


def fuses(prologue: Prologue, x: Any) -> bool:
    """Whether the kernels know the prologue."""
    if isinstance(prologue, RMSNorm):
        return prologue.weight.dtype == x.dtype
    return isinstance(prologue, SiluMul)


def check_operands(x: Any, w: QuantizedArray, out_dtype: Any) -> None:
    """Refuses what no kernel takes.

    Raises:
      NotImplementedError: says what it is.
    """

    def refuse(what: str, allowed: str) -> None:
        raise NotImplementedError(f"mosaic_gpu: {what}; the kernels take {allowed}")

    weight_only = w.activation_scheme is None
    formats = ("float8_e4m3fn", "float8_e5m2") if weight_only else ("float8_e4m3fn",)
    floats = ("bfloat16",) if weight_only else _FLOATS
    if w.qvalue.dtype not in formats:
        refuse(f"the weight is {w.qvalue.dtype}", " and ".join(formats))
    if w.block_size != _BLOCK_SIZE:
        refuse(f"block_size is {w.block_size}", f"{_BLOCK_SIZE}")
    if x.dtype not in floats:
        refuse(f"x is {x.dtype}", " and ".join(floats))
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
def _batchable(product: Any, out_dtype: Any, sms: int) -> Any:
    """A product on the devices of a mesh, and what `jax.vmap` makes of it."""

    @custom_vmap
    def run(x, residual, stacks, layer):
        return across_devices(product, x, residual, stacks, layer, out_dtype=out_dtype, sms=sms)

    @run.def_vmap
    def _rule(axis_size, batched, x, residual, stacks, layer):
        x_batched, residual_batched, stacks_batched, layer_batched = batched

        def batch(a, is_batched):
            return a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))

        x = jax.tree.map(batch, x, x_batched)
        if residual is not None:
            residual = batch(residual, residual_batched)
        N, stack_batched = stacks[0].shape[-2], any(jax.tree.leaves(stacks_batched))
        if not (stack_batched or layer_batched or isinstance(x, QuantizedTokens)):
            # More tokens of one product.
            rows = None if residual is None else residual.reshape(-1, N)
            y = run(x.reshape(-1, x.shape[-1]), rows, stacks, layer)
            return y.reshape(axis_size, -1, N), True
        # One product after the other, each with its matrix read in place: a batch of stacks is
        # a longer stack.
        from jaxquant.matmul.sm90 import in_stack

        L = stacks[0].shape[-3]
        index = jnp.broadcast_to(in_stack(layer, L), (axis_size, 1))
        if stack_batched:

            def longer(a, is_batched):
                a = batch(a, is_batched)
                return jnp.broadcast_to(a, (axis_size, L, *a.shape[2:])).reshape(-1, *a.shape[2:])

            stacks = jax.tree.map(longer, stacks, stacks_batched)
            index = index + L * jnp.arange(axis_size, dtype=jnp.int32)[:, None]
        y = lax.map(lambda of: run(*of[:2], stacks, of[2]), (x, residual, index))
        return y, True

    return run


# Compiled once a shape, also where the caller does not jit.
@functools.partial(jax.jit, static_argnames=("out_dtype", "sms"))
def run_product(
    x: Float[Array, "M A"] | QuantizedTokens,
    residual: Float[Array, "M N"] | None,
    stacks: Any,
    layer: Int32[Array, "1"],
    *,
    out_dtype: Any,
    sms: int,
) -> Float[Array, "M N"]:
    """Quantizes x and multiplies: in one kernel for a token or so, in two otherwise."""
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.matmul import decode_sm90, gemm_sm90, gemv_sm90
    from jaxquant.matmul.act_quant_sm90 import quantize, quantize_tokens
    from jaxquant.matmul.row_groups_sm90 import is_whole
    from jaxquant.matmul.sm90 import round_up

    qvalue, scale, prologue, bias = stacks
    quantized = isinstance(x, QuantizedTokens)
    M, (N, K) = math.prod(x.batch) if quantized else len(x), qvalue.shape[1:]
    if not quantized and gemv_sm90.takes(M, K):
        sx = None
        if isinstance(prologue, SiluMul):  # too much for every thread block to do
            if is_whole(K):
                x, sx = kept(quantize_tokens)(prologue, x, K, M)
            else:
                x = prologue(x)
            prologue = None
        config = gemv_sm90.default_config(N, K, sms)
        return kept(gemv_sm90.gemv)(
            x, sx, qvalue, scale, layer, prologue, bias, residual,
            out_dtype=out_dtype, config=config, sms=sms,
        )  # fmt: skip
    decodes = decode_sm90.takes(M, N, sms)
    if quantized:
        xq, sx = x.qvalue, x.scale
    else:
        rows = decode_sm90.padded_tokens(M) if decodes else round_up(M, _M_ALIGNMENT)
        xq, sx = kept(quantize)(prologue, x, layer, K, rows)
    if decodes:
        config = decode_sm90.default_config(M, N, K, sms)
        added = None
        if bias is None and decode_sm90.adds_residual(M, N, out_dtype, config):
            added, residual = residual, None
        y = kept(decode_sm90.decode)(
            xq, sx, qvalue, scale, layer, added, M=M, out_dtype=out_dtype, config=config, sms=sms
        )
    else:
        config = gemm_sm90.default_config(M, N, K, sms)
        added = None
        if bias is None and gemm_sm90.adds_residual(M, N, out_dtype, config):
            added, residual = residual, None
        y = kept(gemm_sm90.gemm)(
            xq, sx, qvalue, scale, layer, added, out_dtype=out_dtype, config=config, sms=sms
        )[:M]
    return finish(y, layer[0], out_dtype, bias, residual)


def _run_weight_only(
    x: BFloat16[Array, "M K"],
    residual: Float[Array, "M N"] | None,
    stacks: Any,
    layer: Int32[Array, "1"],
    *,
    out_dtype: Any,
    sms: int,
) -> Float[Array, "M N"]:
    """Multiplies, x as it is."""
    from jaxquant.matmul import w8a16_sm90

    qvalue, scale, _, bias = stacks
    M, (N, K) = x.shape[0], qvalue.shape[1:]
    if w8a16_sm90.dequantizes(M, N, K, out_dtype):
        y = w8a16_sm90.product_dequantized(x, qvalue, scale, layer)
        return finish(y, layer[0], out_dtype, bias, residual)
    if M > _M_ALIGNMENT:  # fewer rows TMA pads itself
        x = jnp.pad(x, ((0, -M % _M_ALIGNMENT), (0, 0)))
    config = w8a16_sm90.default_config(M, N, K, sms)
    y = kept(w8a16_sm90.product)(
        x, qvalue, scale, layer, out_dtype=out_dtype, config=config, sms=sms
    )
    return finish(y[:M], layer[0], out_dtype, bias, residual)
