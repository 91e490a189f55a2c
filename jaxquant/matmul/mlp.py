"""The gated MLP: two products and what stands between them, as one function.

Kernels apply SiluMul behind the first product, which saves a launch, and a pass over memory. Where
the second takes quantized tokens, they hand it those.
"""

import functools
import math
from typing import Any

import jax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int, Int32

from jaxquant.array import QuantizedArray
from jaxquant.errors import JaxquantError
from jaxquant.hopper import multiprocessors
from jaxquant.matmul.api import check, matmul
from jaxquant.matmul.kernel_cache import kept
from jaxquant.matmul.mosaic_gpu import as_stacks, check_operands, fuses, run_product
from jaxquant.matmul.partition import mlp_across_devices, ungrouped
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
    groups: int = 1,
) -> Float[Array, "*batch N"]:
    """`activation(prologue(x) @ gate_up^T + biases[0]) @ down^T + biases[1] + residual`.

    The result is that of two `matmul`s, the activation being the prologue of the second.

    Args:
      x: `[..., K]`, or what the prologue makes that of.
      gate_up: `[2 F, K]`, the gate's rows and then those that it gates, group by group, or a stack
        `[L, 2 F, K]` with `layer`.
      down: `[N, F]`, or a stack `[L, N, F]`.
      layer: which matrix of the stacks, possibly traced; see `matmul`.
      prologue: applied to x; see `jaxquant.matmul.prologue`.
      activation: likewise, from `[..., 2 F]` to `[..., F]`.
      biases: of both products, `[2 F]` and `[N]`, or stacks.
      residual: `[..., N]`.
      groups: of the rows of `gate_up`: as many as devices that these are divided among, or a
        multiple, have each device gate its own. Otherwise devices exchange what is to be gated.

    Raises:
      JaxquantError: as `matmul` does; groups that are not equal.
    """
    rows = (gate_up.qvalue if isinstance(gate_up, QuantizedArray) else gate_up).shape[-2]
    if groups < 1 or rows % (2 * groups):
        raise JaxquantError(
            f"gated_mlp: groups is {groups}; allowed: what divides {rows // 2}, rows of the gate"
        )
    around = layer, prologue, activation, biases, residual
    if not (isinstance(gate_up, QuantizedArray) and _is_fused(x, gate_up, down, around, groups)):
        return _two_products(x, gate_up, down, around, groups)
    check(x, gate_up, layer, prologue, biases[0], None)
    y = jax.ShapeDtypeStruct((*x.shape[:-1], gate_up.qvalue.shape[-2]), x.dtype)
    check(y, down, layer, activation, biases[1], residual)
    return _fused(x, gate_up, down, around, groups)


def _two_products(x: Any, gate_up: Any, down: Any, around: Any, groups: int) -> Any:
    layer, prologue, activation, biases, residual = around
    y = matmul(x, gate_up, layer=layer, prologue=prologue, bias=biases[0])
    if groups > 1:  # which may lie on a device each
        y = activation(y.reshape(*y.shape[:-1], groups, -1), layer)
        y, activation = y.reshape(*y.shape[:-2], -1), None
    return matmul(y, down, layer=layer, prologue=activation, bias=biases[1], residual=residual)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _fused(x: Any, gate_up: Any, down: Any, around: Any, groups: int) -> Any:
    layer, prologue, activation, biases, residual = around
    sms = multiprocessors(x, "FP8 products")
    if prologue is not None and not fuses(prologue, x):
        x, prologue = prologue(x, layer), None
    N, dtype = down.qvalue.shape[-2], x.dtype
    up, index = as_stacks(gate_up, layer, prologue, biases[0], dtype)
    second, _ = as_stacks(down, layer, activation, biases[1], dtype)
    rows = None if residual is None else residual.reshape(-1, N).astype(dtype)
    y = _across_devices(groups, sms)(x.reshape(-1, x.shape[-1]), rows, up, second, index)
    return y.reshape(*x.shape[:-1], N)


@_fused.defjvp
def _fused_jvp(groups: int, primals: Any, tangents: Any) -> Any:
    # Quantized tokens pass no derivative on.
    return jax.jvp(functools.partial(_two_products, groups=groups), primals, tangents)


def _is_fused(x: Any, gate_up: QuantizedArray, down: Any, around: Any, groups: int) -> bool:
    """Whether the kernels take both products, and on the device of a group gate the first."""
    *_, activation, (bias, _), _ = around
    dynamic = all(isinstance(w, QuantizedArray) and w.activation_scheme for w in (gate_up, down))
    if not dynamic or not isinstance(activation, SiluMul):
        return False
    try:
        sms = multiprocessors(x, "FP8 products")
        check_operands(x, gate_up, x.dtype)
        check_operands(x, down, x.dtype)
    except NotImplementedError:
        return False
    M, (N, K) = math.prod(x.shape[:-1]), gate_up.qvalue.shape[-2:]
    return _gates(M, N // groups, K, x.dtype, bias, sms)


def _gates(M: int, N: int, K: int, dtype: Any, bias: Any, sms: int) -> bool:
    """Whether the kernel of the first product has SiluMul behind it."""
    from jaxquant.matmul import decode_sm90, gemm_sm90, gemv_sm90

    if gemv_sm90.takes(M, K):
        return N % 16 == 0
    if bias is not None:
        return False
    if decode_sm90.takes(M, N, sms):
        config = decode_sm90.gated_config(M, N, K, sms)
        return config is not None and decode_sm90.gates(M, N, dtype, config)
    return gemm_sm90.gates(M, N, K, dtype, sms)


@functools.cache
def _across_devices(groups: int, sms: int) -> Any:
    """The MLP on the devices of a mesh; `jax.vmap` runs it one after the other."""

    @sequential_vmap
    @jax.jit
    def run(x, residual, up, down, index):
        return mlp_across_devices(
            _run, run_product, x, residual, up, down, index, groups=groups, sms=sms
        )

    return run


def _run(
    x: Float[Array, "M A"],
    residual: Float[Array, "M N"] | None,
    up: Any,
    down: Any,
    index: Int32[Array, "1"],
    *,
    groups: int,
    out_dtype: Any,
    sms: int,
) -> Float[Array, "M N"]:
    """Both products, the first one gated in its kernel if it can be."""
    qvalue, *_, bias = up
    M, (N, K) = len(x), qvalue.shape[1:]
    if groups == 1 and _gates(M, N, K, x.dtype, bias, sms):
        h = _gated(x, up, index, sms)
        *stacks, _, bias = down
        down = *stacks, None, bias
    else:
        h = ungrouped(run_product(x, None, up, index, out_dtype=x.dtype, sms=sms), groups)
    return run_product(h, residual, down, index, out_dtype=out_dtype, sms=sms)


def _gated(
    x: Float[Array, "M A"], stacks: Any, index: Int32[Array, "1"], sms: int
) -> Float[Array, "M F"] | QuantizedTokens:
    """`SiluMul()(prologue(x) @ w^T + bias)` in the kernel of the product."""
    from jaxquant.matmul import decode_sm90, gemm_sm90, gemv_sm90
    from jaxquant.matmul.act_quant_sm90 import quantize

    qvalue, scale, prologue, bias = stacks
    M, (N, K) = len(x), qvalue.shape[1:]
    options: Any = {"gated": True, "out_dtype": x.dtype, "sms": sms}
    if gemv_sm90.takes(M, K):
        config = gemv_sm90.default_config(N // 2, K, sms)
        return kept(gemv_sm90.gemv)(
            x, None, qvalue, scale, index, prologue, bias, config=config, **options
        )
    rows, _ = kernel_layout(M, K)
    tokens = kept(quantize)(prologue, x, index, K, rows.shape[0])
    if decode_sm90.takes(M, N, sms):
        config = decode_sm90.gated_config(M, N, K, sms)
        assert config is not None  # as `_gates` saw to
        h = kept(decode_sm90.decode)(*tokens, qvalue, scale, index, M=M, config=config, **options)
    else:
        h = kept(gemm_sm90.gemm)(*tokens, qvalue, scale, index, config=gemm_sm90.GATED, **options)
    return QuantizedTokens(*h, batch=(M,), dtype=x.dtype)
