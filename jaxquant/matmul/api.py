"""`matmul`: checks the operands and picks an implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.array import QuantizedArray
from jaxquant.errors import JaxquantError
from jaxquant.matmul import mosaic_gpu, xla

# Tried in this order. One that cannot run raises NotImplementedError with the reason; the plain
# XLA reference runs anywhere, so it is last.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu.matmul, "xla": xla.matmul}


def matmul(
    x: Float[Array, "*batch K"],
    w: QuantizedArray | Float[Array, "*L N K"],
    *,
    layer: Int[Array, ""] | int | None = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """`x @ w^T` for a K-major weight, quantized or not.

    For a QuantizedArray with blocks (bo, bi) and `activation_scheme="dynamic"`,

        y[m, n] = sum_k (xq[m, k] * sx[m, k // 128]) * (wq[n, k] * sw[n // bo, k // bi])

    in float32, where (xq, sx) is x quantized per token and 128 columns. With
    `activation_scheme=None` x stays as it is. A transposed QuantizedArray (`[in, out]`, a Flax
    kernel) is stored K-major too, so there `y = x @ w`.

    Args:
      x: `[..., K]`, floating.
      w: `[N, K]`, or a stack `[L, N, K]` with `layer`.
      layer: which matrix of the stack, possibly traced.
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
    _check(x, w, layer)
    out_dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    if not isinstance(w, QuantizedArray):
        return xla.plain_matmul(x, w, layer, out_dtype)
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise JaxquantError(
                f"matmul: implementation is {implementation!r}; "
                f"allowed: {', '.join(IMPLEMENTATIONS)}"
            )
        return IMPLEMENTATIONS[implementation](x, w, layer, out_dtype)
    reasons = []
    for run in IMPLEMENTATIONS.values():
        try:
            return run(x, w, layer, out_dtype)
        except NotImplementedError as reason:
            reasons.append(str(reason))
    raise NotImplementedError("; ".join(reasons))


def _check(x: Any, w: Any, layer: Any) -> None:
    # The storage is K-major whatever the logical layout, so look at that.
    shape = w.qvalue.shape if isinstance(w, QuantizedArray) else w.shape
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise JaxquantError(f"matmul: x has dtype {x.dtype}; allowed: a floating dtype")
    if len(shape) != (2 if layer is None else 3):
        want = "[N, K] (a stack [L, N, K] needs layer=)" if layer is None else "[L, N, K]"
        raise JaxquantError(f"matmul: w is stored as {list(shape)}; allowed: {want}")
    if x.ndim < 1 or x.shape[-1] != shape[-1]:
        raise JaxquantError(
            f"matmul: x {list(x.shape)} does not fit w stored as {list(shape)}: "
            "their last axes are contracted and must be equal"
        )
