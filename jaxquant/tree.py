"""Rules that pick what becomes FP8, and `quantize_tree`, which applies them to a pytree."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant import blocked
from jaxquant.array import QuantizedArray, nbytes
from jaxquant.config import QuantConfig, keeps_module
from jaxquant.errors import JaxquantError
from jaxquant.report import QuantReport, TensorReport


def _are_neighbours_from_the_end(dims: Any) -> bool:
    if dims == ():
        return True
    if not isinstance(dims, tuple) or not all(type(i) is int for i in dims):
        return False
    return dims == tuple(range(dims[0], dims[0] + len(dims))) and dims[-1] < 0


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the parameters whose '/'-joined path the pattern matches.

    Attributes:
      pattern: a regular expression, matched with `re.search`.
      config: a config of its own for what matches; default the call's.
      skip: leave what matches as it is.
      transposed: whether the parameter is `[..., in, out]`; default: exactly those named `kernel`,
        as in Flax. Everything else is taken for `[..., out, in]`.
      contracting: instead, the dimensions that a product contracts, counted from the end:
        (-3,) for `[..., in, heads, head_dim]`, (-3, -2) for `[..., heads, head_dim, out]`,
        (-2, -1) for `[..., out, heads, head_dim]`. What follows them are outputs (if nothing
        does, the one before is), what is left in front are stacked matrices. A parameter with
        two dimensions has one each way, whatever the numbers.
      note: what reports give as the reason; default: the pattern.
    """

    pattern: str
    config: QuantConfig | None = None
    skip: bool = False
    transposed: bool | None = None
    contracting: tuple[int, ...] = ()
    note: str = ""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as e:
            raise JaxquantError(f"rule {self.pattern!r} is no regular expression: {e}") from None
        dims = self.contracting
        if not _are_neighbours_from_the_end(dims):
            raise JaxquantError(
                f"rule {self.pattern!r}: contracting is {dims!r}; allowed: a tuple of neighbours, "
                "counted from the end, such as (-3,) or (-3, -2)"
            )
        if dims and self.transposed is not None:
            raise JaxquantError(
                f"rule {self.pattern!r} has both transposed and contracting; leave one out"
            )

    @property
    def reason(self) -> str:
        """For reports."""
        return self.note or f"rule {self.pattern}"


# Right for Hugging Face names and for Flax ones. First match wins.
DEFAULT_RULES = (
    Rule(r"(^|/)\w*embed\w*(/|$)|(^|/)(wte|wpe)(/|$)", skip=True, note="embedding"),
    Rule(r"(^|/)(lm_head|head|logits\w*)(/|$)|^(model/)?output/", skip=True, note="head"),
    Rule(r"(^|/)\w*norm\w*(/|$)|(^|/)ln(_\w+)?(/|$)", skip=True, note="norm"),
    Rule(r"(^|/)(gate|router|shared_expert_gate)(/|$)", skip=True, note="router gate"),
    Rule(r"(^|/)(vision\w*|visual|patch\w*)(/|$)", skip=True, note="vision"),
    Rule(r"(^|/)(\w+_proj|wqkv|w[123oqkv])(/(weight|kernel))?$", note="projection"),
    # Flax's attention, in linen and in NNX: [in, heads, head_dim], and [heads, head_dim, out].
    Rule(r"(^|/)(query|key|value)/kernel$", contracting=(-3,), note="projection"),
    Rule(r"(^|/)out/kernel$", contracting=(-3, -2), note="projection"),
    Rule(r"(^|/)(weight|kernel)$", note="matrix"),
)
_HEAD = DEFAULT_RULES[1]
# The last default says nothing of the layout: a third axis may be layers, heads or a window.
_MATRIX_ONLY = DEFAULT_RULES[-1]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one parameter.

    Attributes:
      config: None if it is kept.
      contracting: the dimensions that a product contracts, counted from the end.
      reason: why.
      rule: the one that matched, or None.
    """

    config: QuantConfig | None
    contracting: tuple[int, ...]
    reason: str
    rule: Rule | None


def decide(
    path: str,
    shape: Sequence[int],
    dtype: Any,
    config: QuantConfig,
    rules: Iterable[Rule] = DEFAULT_RULES,
) -> Decision:
    """Whether the parameter at a '/'-joined path becomes FP8, and why (not)."""
    slashed = path.replace(".", "/")  # names of a flat dict, as in a checkpoint
    texts = {path, slashed}
    rule = next((r for r in rules if any(re.search(r.pattern, text) for text in texts)), None)

    def keep(reason: str) -> Decision:
        return Decision(None, (), reason, rule)

    if len(shape) < 2:
        return keep(f"{len(shape)}-D")
    if not jnp.issubdtype(dtype, jnp.floating):
        return keep(f"dtype {dtype}")
    if entry := keeps_module(config, slashed.split("/")):
        return keep(f"modules_to_not_convert: {entry}")
    if rule is None:
        return keep("no rule matches")
    if rule.skip and not (rule is _HEAD and config.quantize_head):
        return keep(rule.reason)
    if rule is _MATRIX_ONLY and len(shape) > 2:
        return keep(f"{len(shape)}-D: a rule must say which dimensions contract")
    transposed = rule.transposed
    if transposed is None:
        is_kernel = slashed.rsplit("/", 1)[-1] == "kernel"
        transposed = rule.contracting[-1] != -1 if rule.contracting else is_kernel
    contracting = (-2,) if transposed else (-1,)
    if rule.contracting and len(shape) > 2:
        contracting = rule.contracting
    if len(shape) < max(-contracting[0], len(contracting) + 1):
        return keep(f"{len(shape)}-D: contracting={contracting} does not fit")
    return Decision(rule.config or config, contracting, rule.reason, rule)


def quantize_tree(
    params: Any,
    config: QuantConfig | None = None,
    rules: Sequence[Rule | str] | None = None,
) -> tuple[Any, QuantReport]:
    """Quantizes the projections of a parameter tree: linen dicts, nnx.State, any pytree.

    Args:
      params: the tree. Leaves that are QuantizedArrays already stay as they are.
      config: default `QuantConfig()`; its `modules_to_not_convert` are honoured.
      rules: regular expressions or Rules on '/'-joined paths, first match wins, what none matches
        is kept. Default: the projections of attention and MLP; never embeddings, heads, norms,
        biases or router gates.

    Returns:
      The tree with QuantizedArrays in place of what was picked, and a QuantReport.

    Raises:
      JaxquantError: a rule that matches nothing; nothing to quantize; NaN or Inf in a parameter
        that is quantized; a QuantizedArray of another config.

    >>> params = {"mlp": {"kernel": jnp.ones((256, 512)), "bias": jnp.ones((512,))}}
    >>> qparams, report = quantize_tree(params)
    >>> qparams["mlp"]["kernel"].shape
    (256, 512)
    """
    config = config or QuantConfig()
    if isinstance(rules, str | Rule):
        raise JaxquantError(
            f"rules is {rules!r}; allowed: a sequence of regular expressions or Rules"
        )
    ruleset = DEFAULT_RULES if rules is None else tuple(map(_as_rule, rules))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_quantized)
    paths = [path_name(path) for path, _ in leaves]
    new, entries, errors, matched = [], [], [], set()
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "shape"):
            raise JaxquantError(f"{path}: {type(leaf).__name__}; allowed: arrays")
        decision = decide(path, leaf.shape, leaf.dtype, config, ruleset)
        matched.add(decision.rule)
        result, error, reason = leaf, None, decision.reason
        if _is_quantized(leaf):
            reason = "already FP8"
            if decision.config is not None:
                _check_same_config(path, leaf, decision.config)
        elif decision.config is not None:
            result, error = _quantize_measured(leaf, decision.config, decision.contracting)
        new.append(result)
        errors.append(error)
        entries.append(
            TensorReport(
                path, tuple(leaf.shape), _is_quantized(result), reason, nbytes(leaf), nbytes(result)
            )
        )
    if rules is not None:
        _check_all_used(ruleset, matched, paths)
    if not any(_is_quantized(leaf) for leaf in new):
        raise JaxquantError(
            "quantize_tree: FP8 was asked for and no parameter was quantized; say which with "
            f"rules=[...]. The paths are: {_some(paths)}"
        )
    measured = jax.device_get(errors)  # one wait for all
    for path, leaf, error in zip(paths, new, measured, strict=True):
        if error is not None and not np.isfinite(error):
            blocked.check_finite(leaf, path)
    report = QuantReport(
        tuple(
            dataclasses.replace(entry, relative_error=None if error is None else float(error))
            for entry, error in zip(entries, measured, strict=True)
        )
    )
    return jax.tree_util.tree_unflatten(treedef, new), report


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as '/'-joined names; the box around a Flax parameter adds none."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_measured(
    w: jax.Array, config: QuantConfig, contracting: tuple[int, ...]
) -> tuple[QuantizedArray, jax.Array]:
    first, after = w.ndim + contracting[0], w.ndim + contracting[-1] + 1
    ins, outs = w.shape[first:after], w.shape[after:]
    transposed = bool(outs)
    if not transposed:
        first -= 1
        outs = w.shape[first : first + 1]
    sides = (ins, outs) if transposed else (outs, ins)
    matrix = w.reshape(*w.shape[:first], *map(math.prod, sides))
    qa = dataclasses.replace(
        blocked.quantize(matrix.mT if transposed else matrix, config),
        transposed=transposed,
        in_dims=ins if len(ins) > 1 else (),
        out_dims=outs if len(outs) > 1 else (),
    )
    return qa, relative_error(w, qa)


def relative_error(w: jax.Array, qa: QuantizedArray) -> jax.Array:
    """`||w - dequantize(qa)|| / ||w||` (Frobenius), a float32 scalar; 0 if both are zero."""
    error, norm = error_norms(w, qa)
    return jnp.where(norm == 0, error, error / norm)


def error_norms(w: jax.Array, qa: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """`||w - dequantize(qa)||` and `||w||` (Frobenius), float32 scalars."""
    # Squares of large weights would overflow, those of small ones vanish.
    unit = jnp.max(qa.scale, initial=0)
    to_units = 1 / unit

    def norm(x: jax.Array) -> jax.Array:
        x = x * to_units
        if jax.default_backend() == "cpu":
            # XLA:CPU sums fast what lies in memory, and slowly what it has yet to compute.
            x = lax.optimization_barrier(x)
        return unit * jnp.sqrt(jnp.sum(x * x))

    w = w.astype(jnp.float32)
    return norm(w - qa.dequantize(jnp.float32)), norm(w)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _as_rule(rule: Rule | str) -> Rule:
    return rule if isinstance(rule, Rule) else Rule(rule)


def _check_same_config(path: str, qa: QuantizedArray, config: QuantConfig) -> None:
    # That float32 scales were asked for and are powers of two may be chance.
    mantissa = np.asarray(qa.scale).view(np.uint32) & 0x7FFFFF
    same = (
        qa.block_size == config.weight_block_size
        and jnp.dtype(qa.qvalue.dtype) == config.fmt_dtype
        and not (config.scale_fmt == "ue8m0" and mantissa.any())
    )
    if not same:
        raise JaxquantError(
            f"{path} is FP8 already ({qa!r}), but {config.describe()} was asked for; "
            "quantize the original weights instead"
        )


def _check_all_used(rules: Iterable[Rule], matched: set, paths: Sequence[str]) -> None:
    for rule in rules:
        if rule not in matched:
            raise JaxquantError(
                f"rule {rule.pattern!r} matches no parameter that no rule before it matches; "
                f"the paths are: {_some(paths)}"
            )


def _some(paths: Sequence[str], n: int = 6) -> str:
    more = f", ... ({len(paths)} in all)" if len(paths) > n else ""
    return ", ".join(paths[:n]) + more
