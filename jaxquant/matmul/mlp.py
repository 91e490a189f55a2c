"""The gated MLP: two products and what stands between them, as one function.

Kernels apply SiluMul behind the first product, which saves a launch, and a pass over memory. Where
the second takes quantized tokens, they hand it those.
"""

import functools
import math
from typing import Any

import jax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from jaxquant.array import QuantizedArray
from jaxquant.hopper import multiprocessors
from jaxquant.matmul.api import check, matmul
from jaxquant.matmul.kernel_cache import kept
from jaxquant.matmul.mosaic_gpu import as_stacks, check_operands, fuses
from jaxquant.matmul.prologue import Prologue, SiluMul
from jaxquant.matmul.tokens import QuantizedTokens, kernel_layout


def gated_mlp(
    x: Float[Array, "*batch A"],
    gate_up: QuantizedArray | Float[Array, "*L G K"],
    down: QuantizedArray | Float[Array, "*L N F"],
    *,
    layer: Int[Array, ""] | int | None = None,
    prologue: Prologue | None = None,
    activation: Prologue,
    biases: tuple[Float[Array, "..."] | None, Float[Array, "..."] | None] = (None, None),
    residual: Float[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    """`activation(prologue(x) @ gate_up^T + biases[0]) @ down^T + biases[1] + residual`.

    The result is that of two `matmul`s, the activation being the prologue of the second.

    Args:
      x: `[..., K]`, or what the prologue makes that of.
      gate_up: `[2 F, K]`, the gate's rows and then those that it gates, or a stack `[L, 2 F, K]`
        with `layer`.
      down: `[N, F]`, or a stack `[L, N, F]`.
      layer: which matrix of the stacks, possibly traced; see `matmul`.
      prologue: applied to x; see `jaxquant.matmul.prologue`.
      activation: likewise, from `[..., 2 F]` to `[..., F]`.
      biases: of both products, `[2 F]` and `[N]`, or stacks.
      residual: `[..., N]`.

    Raises:
      JaxquantError: as `matmul` does.
    """
    around = layer, prologue, activation, biases, residual
    if not (isinstance(gate_up, QuantizedArray) and _is_fused(x, gate_up, down, around)):
        return _two_products(x, gate_up, down, around)
    check(x, gate_up, layer, prologue, biases[0], None)
    y = jax.ShapeDtypeStruct((*x.shape[:-1], gate_up.qvalue.shape[-2]), x.dtype)
    check(y, down, layer, activation, biases[1], residual)
    return _fused(x, gate_up, down, around)


def _two_products(x: Any, gate_up: Any, down: Any, around: Any) -> Any:
    layer, prologue, activation, biases, residual = around
    y = matmul(x, gate_up, layer=layer, prologue=prologue, bias=biases[0])
    return matmul(y, down, layer=layer, prologue=activation, bias=biases[1], residual=residual)


@jax.custom_jvp
def _fused(x: Any, gate_up: Any, down: Any, around: Any) -> Any:
    layer, prologue, _, biases, residual = around
    h = _gated(x, gate_up, layer, prologue, biases[0])
    return matmul(h, down, layer=layer, bias=biases[1], residual=residual)


@_fused.defjvp
def _fused_jvp(primals: Any, tangents: Any) -> Any:
    # Quantized tokens pass no derivative on.
    return jax.jvp(_two_products, primals, tangents)


def _is_fused(x: Any, gate_up: QuantizedArray, down: Any, around: Any) -> bool:
    """Whether `_gated` takes the first product, and the second what that gives."""
    *_, activation, (bias, _), _ = around
    dynamic = all(isinstance(w, QuantizedArray) and w.activation_scheme for w in (gate_up, down))
    # On several devices the rows of a gate and of what it gates may lie apart.
    if not dynamic or not isinstance(activation, SiluMul) or jax.device_count() > 1:
        return False
    try:
        sms = multiprocessors(x, "FP8 products")
        check_operands(x, gate_up, x.dtype)
    except NotImplementedError:
        return False
    from jaxquant.matmul import decode_sm90, gemm_sm90, gemv_sm90

    M, (N, K) = math.prod(x.shape[:-1]), gate_up.qvalue.shape[-2:]
    if gemv_sm90.takes(M, K):
        return N % 16 == 0
    if bias is not None:
        return False
    if decode_sm90.takes(M, N, sms):
        config = decode_sm90.gated_config(M, N, K, sms)
        return config is not None and decode_sm90.gates(M, N, x.dtype, config)
    return gemm_sm90.gates(M, N, K, x.dtype, sms)


def _gated(
    x: Float[Array, "*batch A"],
    w: QuantizedArray,
    layer: Any,
    prologue: Prologue | None,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "*batch F"] | QuantizedTokens:
    """`SiluMul()(prologue(x) @ w^T + bias)` in the kernel of the product."""
    sms = multiprocessors(x, "FP8 products")
    if prologue is not None and not fuses(prologue, x):
        x, prologue = prologue(x, layer), None
    stacks, layer = as_stacks(w, layer, prologue, bias, x.dtype)
    h = _product(sms)(x.reshape(-1, x.shape[-1]), stacks, layer)
    if isinstance(h, tuple):
        return QuantizedTokens(*h, batch=x.shape[:-1], dtype=x.dtype)
    return h.reshape(*x.shape[:-1], -1)


@functools.cache
def _product(sms: int) -> Any:
    """The kernels of `_gated`; `jax.vmap` runs them one after the other."""

    @sequential_vmap
    @jax.jit
    def run(x, stacks, layer):
        from jaxquant.matmul import decode_sm90, gemm_sm90, gemv_sm90
        from jaxquant.matmul.act_quant_sm90 import quantize

        qvalue, scale, prologue, bias = stacks
        M, (N, K) = len(x), qvalue.shape[1:]
        options: Any = {"gated": True, "out_dtype": x.dtype, "sms": sms}
        if gemv_sm90.takes(M, K):
            config = gemv_sm90.default_config(N // 2, K, sms)
            return kept(gemv_sm90.gemv)(
                x, None, qvalue, scale, layer, prologue, bias, config=config, **options
            )
        rows, _ = kernel_layout(M, K)
        tokens = kept(quantize)(prologue, x, layer, K, rows.shape[0])
        if decode_sm90.takes(M, N, sms):
            config = decode_sm90.gated_config(M, N, K, sms)
            assert config is not None  # as `_is_fused` saw to
            return kept(decode_sm90.decode)(
                *tokens, qvalue, scale, layer, M=M, config=config, **options
            )
        return kept(gemm_sm90.gemm)(
            *tokens, qvalue, scale, layer, config=gemm_sm90.GATED, **options
        )

    return run
