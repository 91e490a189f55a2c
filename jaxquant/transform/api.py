"""`fp8`: traces a function of ordinary arrays, and runs it on QuantizedArrays."""

import dataclasses
import functools
import itertools
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.array import QuantizedArray
from jaxquant.errors import JaxquantError
from jaxquant.transform import rules as rules, shards as shards, view as views  # the rules
from jaxquant.transform.evaluate import Evaluator
from jaxquant.transform.usage import Fp8Report, Use, make_report
from jaxquant.transform.view import View
from jaxquant.tree import path_name


def fp8[**P, R](fn: Callable[P, R], *, weight_only: bool = False) -> Callable[P, R]:
    """A function that runs `fn`, which knows ordinary arrays only, on QuantizedArrays.

    `fn` is traced as if each QuantizedArray in its arguments were an array of its `shape` and
    `dtype`. The program is then run with the weights as they are stored: a `dot_general` that
    contracts a weight's contraction axis is `jaxquant.matmul`, and `ragged_dot` is a product of
    the groups that have rows; transposes, reshapes, conversions and slices of a stack on the way
    there cost nothing, slices of whole blocks and matrices gathered from a stack a copy in FP8.
    Whatever else needs the values of a weight gets them dequantized, of a table just the rows that
    are looked up; `fp8_report` says where.

    It composes with jit, vmap, grad (to activations and unquantized parameters; quantized
    weights are constants) and all else, inside and outside. As under `jax.jit`, side effects of
    `fn` happen when it is traced, once for each signature: the tree, shapes and dtypes of the
    arguments. Leaves that are no arrays, Python numbers among them, are static and part of it.
    Outside of jit the program runs operation by operation, as `fn` would.

    Args:
      fn: the function; if it is a pytree that holds QuantizedArrays, such as an Equinox module,
        these count as arguments. Those in a closure are not seen: pass them.
      weight_only: leave activations in their dtype, whatever the arrays' `activation_scheme`.

    Returns:
      A function with the arguments of `fn`. A QuantizedArray that `fn` returns as it came stays
      one. Without any in the arguments it just calls `fn`.

    Raises:
      JaxquantError: when called: `fn` needs the value of an array to trace; an argument that is
        neither array nor hashable.

    Warns once for each weight that enters no FP8 product.

    >>> from jaxquant import quantize_tree
    >>> qparams, _ = quantize_tree({"kernel": jnp.ones((256, 128))})
    >>> fp8(lambda params, x: x @ params["kernel"])(qparams, jnp.ones((1, 256)))[0, 0].item()
    256.0
    """
    program = _Program(fn, weight_only)

    @functools.wraps(fn, updated=())
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return program(args, kwargs)

    return run


def fp8_report(fn: Callable, *args: Any, **kwargs: Any) -> Fp8Report:
    """What `fp8(fn)(*args, **kwargs)` does with each QuantizedArray; computes nothing.

    Args:
      fn: the function, not transformed.
      *args: its arguments; ShapeDtypeStructs stand for arrays as well.
      **kwargs: its keyword arguments.

    Returns:
      For each weight how many FP8 products it enters, and where it is dequantized: the primitive,
      the line of user code and the reason. It prints as a table.

    Raises:
      JaxquantError: as in `fp8`; there is no QuantizedArray in the arguments.

    >>> from jaxquant import quantize_tree
    >>> qparams, _ = quantize_tree({"kernel": jnp.ones((256, 128))})
    >>> report = fp8_report(lambda params, x: x @ params["kernel"], qparams, jnp.ones((1, 256)))
    >>> print(report.summary())
    1 FP8 matmuls of 1 quantized arrays; 0 dequantized, 0 in no matmul
    """
    program, uses = _Program(fn), []
    call = program.read(args, kwargs)
    if not call.paths:
        raise JaxquantError(
            "fp8_report: no QuantizedArray among the arguments; make them with "
            "jaxquant.quantize_tree"
        )

    def run(arrays: list[Any]) -> None:
        uses.extend(program.evaluate(call, arrays)[1])

    jax.eval_shape(run, call.arrays)
    return make_report(call.paths, call.shapes, uses)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arguments of one call.

    Attributes:
      arrays: the leaves that are arrays, QuantizedArrays among them.
      signature: all else: the tree and the static leaves, hashable.
      paths: of the QuantizedArrays.
      shapes: of the QuantizedArrays.
    """

    arrays: list[Any]
    signature: Any
    paths: list[str]
    shapes: list[tuple[int, ...]]


class _Program:
    """What `fp8` makes of a function."""

    def __init__(self, fn: Callable, weight_only: bool = False):
        leaves = jax.tree_util.tree_leaves(fn, is_leaf=_is_quantized)
        self._held = fn if any(map(_is_quantized, leaves)) else None
        self._fn = fn
        self._weight_only = weight_only
        self._warned: set[str] = set()

        # One function for all calls: jax caches its traces.
        def call(signature: Any, *arrays: Any) -> Any:
            treedef, static = signature
            leaves = list(arrays)
            for i, _, leaf in static:
                leaves.insert(i, leaf)
            args, kwargs, held = jax.tree_util.tree_unflatten(treedef, leaves)
            return (fn if held is None else held)(*args, **kwargs)

        call.__name__ = call.__qualname__ = getattr(fn, "__name__", "fp8")
        self._trace = jax.make_jaxpr(call, static_argnums=0, return_shape=True)

    def __call__(self, args: Any, kwargs: Any) -> Any:
        call = self.read(args, kwargs)
        if not call.paths:
            return self._fn(*args, **kwargs)
        result, uses = self.evaluate(call, call.arrays)
        self._warn(call, result, uses)
        return result

    def read(self, args: Any, kwargs: Any) -> _Call:
        """Takes the arguments of a call apart."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(
            (args, kwargs, self._held), is_leaf=_is_quantized
        )
        static = []
        for i, (path, leaf) in enumerate(flat):
            if not _is_array(leaf):
                _check_hashable(_name(path), leaf)
                static.append((i, type(leaf), leaf))  # the type, as True == 1 == 1.0
        quantized = [(path, leaf) for path, leaf in flat if _is_quantized(leaf)]
        return _Call(
            [leaf for _, leaf in flat if _is_array(leaf)],
            (treedef, tuple(static)),
            [_name(path) for path, _ in quantized],
            [leaf.shape for _, leaf in quantized],
        )

    def evaluate(self, call: _Call, arrays: Sequence[Any]) -> tuple[Any, list[Use]]:
        """The result of the function, and the uses of the quantized arrays."""
        logical = [_logical(x) if _is_quantized(x) else x for x in arrays]
        try:
            jaxpr, out = self._trace(call.signature, *logical)
        except _INSPECTION_ERRORS as e:
            raise JaxquantError(
                f"fp8: the function needs the value of an array{_line_of(e)}, but it is traced "
                "with shapes and dtypes only, as under jit; use jnp.where or jax.lax.cond there, "
                "or make it a static argument"
            ) from e
        quantized = [x for x in arrays if _is_quantized(x)]
        whole = iter([views.view_of(self._scheme(x), i) for i, x in enumerate(quantized)])
        # In the dtype of the trace: numpy's int64 is int32 there.
        others = (jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x for x in arrays)
        args = [next(whole) if _is_quantized(x) else x for x in others]
        evaluator = Evaluator()
        results = [
            quantized[x.leaf]
            if isinstance(x, View) and views.is_whole(x, quantized[x.leaf])
            else evaluator.array(x)
            for x in evaluator.run(jaxpr, args)
        ]
        tree = jax.tree_util.tree_structure(out)
        return jax.tree_util.tree_unflatten(tree, results), list(evaluator.uses.values())

    def _scheme(self, qa: QuantizedArray) -> QuantizedArray:
        return dataclasses.replace(qa, activation_scheme=None) if self._weight_only else qa

    def _warn(self, call: _Call, result: Any, uses: list[Use]) -> None:
        # What is in no product: but for what the function only hands on.
        busy = {use.leaf for use in uses if use.line is None}
        if len(busy) == len(call.paths):
            return
        used = {use.leaf for use in uses}
        returned = {id(x) for x in jax.tree_util.tree_leaves(result, is_leaf=_is_quantized)}
        quantized = [x for x in call.arrays if _is_quantized(x)]
        report = make_report(call.paths, call.shapes, uses)
        lines = [
            f"{leaf.path} ({leaf.notes})"
            for i, leaf in enumerate(report.leaves)
            if i not in busy
            and leaf.path not in self._warned
            and (i in used or id(quantized[i]) not in returned)
        ]
        self._warned |= set(call.paths)
        if lines:
            more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
            warnings.warn(
                f"fp8: quantized, but in no FP8 product: {', '.join(lines[:4])}{more}; "
                "jaxquant.fp8_report says more",
                skip_file_prefixes=_NOT_USER_CODE,
            )


# Frames that no warning and no report points at: ours and JAX's.
_NOT_USER_CODE = (os.path.dirname(__file__), os.path.dirname(jax.__file__))
source_info_util.register_exclusion(_NOT_USER_CODE[0])

_INSPECTION_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _line_of(e: BaseException) -> str:
    """` at file:line` of the innermost frame that is not JAX's."""
    frames = traceback.extract_tb(e.__traceback__)
    frames = [f for f in frames if not f.filename.startswith(_NOT_USER_CODE)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _logical(qa: QuantizedArray) -> jax.ShapeDtypeStruct:
    """What the function sees: with the sharding, where that is part of the type."""
    sharding = jax.typeof(qa.qvalue).sharding
    spec = list(sharding.spec)
    matrix = [[spec.pop(-2)], [spec.pop()]]
    for names, dims in zip(matrix, (qa.out_dims, qa.in_dims), strict=True):
        names += [None] * (len(dims) - 1)  # the first of several dimensions is sharded
    spec += itertools.chain(*(reversed(matrix) if qa.transposed else matrix))
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec)) if any(spec) else None
    return jax.ShapeDtypeStruct(qa.shape, qa.dtype, sharding=sharding)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def _check_hashable(name: str, leaf: Any) -> None:
    try:
        hash(leaf)
    except TypeError:
        raise JaxquantError(
            f"fp8: {name} is a {type(leaf).__name__}, neither an array nor hashable; allowed: "
            "pytrees of arrays and of hashable values, which are static"
        ) from None


def _name(path: tuple[Any, ...]) -> str:
    """The path of a leaf in its argument; of an argument that is one, what fn would call it."""
    (kind, *rest) = path
    if kind.idx == 2:
        return path_name(rest)
    return path_name(rest[1:]) or f"argument {path_name(rest)}"
