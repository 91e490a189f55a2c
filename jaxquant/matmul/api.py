"""`matmul`: checks the operands and picks an implementation."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from jaxquant.array import QuantizedArray
from jaxquant.errors import JaxquantError
from jaxquant.matmul import mosaic_gpu, xla
from jaxquant.matmul.prologue import Prologue
from jaxquant.matmul.tokens import QuantizedTokens

_logger = logging.getLogger(__name__)

# Tried in this order. One that cannot run raises NotImplementedError with the reason; the plain
# XLA reference runs anywhere, so it is last.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu.matmul, "xla": xla.matmul}


def matmul(
    x: Float[Array, "*batch A"] | QuantizedTokens,
    w: QuantizedArray | Float[Array, "*L N K"],
    *,
    layer: Int[Array, ""] | int | None = None,
    prologue: Prologue | None = None,
    bias: Float[Array, "..."] | None = None,
    residual: Float[Array, "..."] | None = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """`x @ w^T` for a K-major weight, quantized or not, with what stands before and after it.

        y = prologue(x) @ w^T + bias + residual

    where the product and each sum are rounded to the result's dtype, as separate operations are.

    For a QuantizedArray with blocks (bo, bi) and `activation_scheme="dynamic"`,

        y[m, n] = sum_k (xq[m, k] * sx[m, k // 128]) * (wq[n, k] * sw[n // bo, k // bi])

    in float32, where (xq, sx) is x quantized per token and 128 columns. With
    `activation_scheme=None` x stays as it is. A transposed QuantizedArray (`[in, out]`, a Flax
    kernel) is stored K-major too, so there `y = x @ w`.

    Args:
      x: `[..., K]`, floating; or what the prologue makes that of. For a weight with
        `activation_scheme="dynamic"` also QuantizedTokens: (xq, sx) itself.
      w: `[N, K]`, or a stack `[L, N, K]` with `layer`.
      layer: which matrix of the stack, possibly traced: then one outside of it counts as the
        nearest inside, and `jax.experimental.checkify.checkify` reports it.
      prologue: applied to x; see `jaxquant.matmul.prologue`. Kernels quantize what it gives without
        writing it to memory.
      bias: `[N]`, or a stack `[L, N]`.
      residual: `[..., N]`.
      preferred_element_type: dtype of the result; default x's.
      implementation: forces one of `IMPLEMENTATIONS`; default: the first that can run.

    Returns:
      `[..., N]`.

    Raises:
      JaxquantError: shapes that do not fit, a stack without `layer`, an unknown implementation.
      NotImplementedError: the forced implementation cannot run this, with the reason.

    >>> from jaxquant.blocked import quantize
    >>> matmul(jnp.ones((1, 256)), quantize(jnp.ones((3, 256))))[0, 0].item()
    256.0
    """
    check(x, w, layer, prologue, bias, residual)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise JaxquantError(
            f"matmul: implementation is {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}"
        )
    out_dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    around = prologue, bias, residual
    return _matmul(x, around, w, layer, out_dtype, implementation)


def _matmul(
    x: Any, around: Any, w: Any, layer: Any, out_dtype: Any, implementation: str | None
) -> Any:
    if not isinstance(w, QuantizedArray):
        assert not isinstance(x, QuantizedTokens)
        return xla.plain_matmul(x, w, layer, out_dtype, *around)
    return _quantized_matmul(x, around, w, layer, out_dtype, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _quantized_matmul(
    x: Any, around: Any, w: QuantizedArray, layer: Any, out_dtype: Any, implementation: str | None
) -> Any:
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](x, w, layer, out_dtype, *around)
    reasons = []
    for name, run in IMPLEMENTATIONS.items():
        try:
            y = run(x, w, layer, out_dtype, *around)
        except NotImplementedError as reason:
            reasons.append(str(reason))
        else:
            _logger.debug("matmul of x %s and w %s: %s", list(x.shape), list(w.qvalue.shape), name)
            return y
    raise NotImplementedError("; ".join(reasons))


@_quantized_matmul.defjvp
def _straight_through(out_dtype, implementation, primals, tangents):
    # The derivative of rounding is zero or, as JAX has it, a cast of the tangent to float8. So
    # quantizing x counts as the identity, and the quantized weight as a constant.
    x, around, w, layer = primals
    dx, (dprologue, dbias, dresidual) = tangents[:2]
    if isinstance(x, QuantizedTokens):  # a constant as well
        dx = jnp.zeros(x.shape, x.dtype)
    y = _quantized_matmul(x, around, w, layer, out_dtype, implementation)
    if around[0] is not None:
        _, dx = jax.jvp(lambda x, prologue: prologue(x, layer), (x, around[0]), (dx, dprologue))
    weight_only = dataclasses.replace(w, activation_scheme=None)
    return y, xla.matmul(dx, weight_only, layer, out_dtype, None, dbias, dresidual)


def _check_layer(layer: Any, L: int) -> None:
    allowed = f"; allowed: 0 to {L - 1}"
    if not isinstance(layer, int | np.integer):
        # Nothing but under checkify.
        index = jnp.asarray(layer, jnp.int32)
        inside = (index >= -L) & (index < L)
        checkify.debug_check(inside, "matmul: layer is {layer}" + allowed, layer=layer)
    elif not -L <= layer < L:
        raise JaxquantError(f"matmul: layer is {layer}{allowed}")


def check(x: Any, w: Any, layer: Any, prologue: Any, bias: Any, residual: Any) -> None:
    """Raises JaxquantError if `matmul` does not take these; x may be a ShapeDtypeStruct."""
    # The storage is K-major whatever the logical layout, so look at that.
    shape = w.qvalue.shape if isinstance(w, QuantizedArray) else w.shape
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise JaxquantError(f"matmul: x has dtype {x.dtype}; allowed: a floating dtype")
    if len(shape) != (2 if layer is None else 3):
        want = "[N, K] (a stack [L, N, K] needs layer=)" if layer is None else "[L, N, K]"
        raise JaxquantError(f"matmul: w is stored as {list(shape)}; allowed: {want}")
    if layer is not None:
        _check_layer(layer, shape[0])
    if isinstance(x, QuantizedTokens):
        if not isinstance(w, QuantizedArray) or w.activation_scheme != "dynamic":
            raise JaxquantError(
                "matmul: x is quantized already, which w is not made for; "
                'allowed: a QuantizedArray with activation_scheme="dynamic"'
            )
        if prologue is not None:
            raise JaxquantError(
                f"matmul: x is quantized already and has a prologue, {type(prologue).__name__}; "
                "allowed: one of both"
            )
    if prologue is not None:
        came = list(x.shape)
        x = jax.eval_shape(prologue, x, layer)
        what = f"{type(prologue).__name__} of x {came} is {list(x.shape)}, which"
    else:
        what = f"x {list(x.shape)}"
    if x.ndim < 1 or x.shape[-1] != shape[-1]:
        raise JaxquantError(
            f"matmul: {what} does not fit w stored as {list(shape)}: "
            "their last axes are contracted and must be equal"
        )
    N = shape[-2]
    stack = [] if layer is None else [(shape[0], N)]
    if bias is not None and bias.shape not in [(N,), *stack]:
        allowed = " or ".join(str(list(s)) for s in [(N,), *stack])
        raise JaxquantError(f"matmul: bias is {list(bias.shape)}; allowed: {allowed}")
    if residual is not None and residual.shape != (*x.shape[:-1], N):
        raise JaxquantError(
            f"matmul: residual is {list(residual.shape)}; allowed: {[*x.shape[:-1], N]}"
        )
