"""Evaluates a jaxpr with Views among its values.

An equation that none of them enters runs as it is. For the others there are rules, by the name of
the primitive: layout steps give another View, `dot_general` gives the product, and what has a
jaxpr inside is entered. Without a rule, or where a rule finds that the blocks do not fit, the Views
are dequantized, once each in a trace, and the equation runs on those arrays.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jaxquant.transform import view as views
from jaxquant.transform.usage import Use
from jaxquant.transform.view import View

# A rule gives the values of the equation's results; or None or the reason why it has none, and
# then the equation runs on dequantized arrays.
Rule = Callable[["Evaluator", JaxprEqn, list[Any]], "list[Any] | str | None"]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


class Evaluator:
    """Evaluates jaxprs in one trace.

    Attributes:
      uses: all uses of quantized arrays, keyed so that a part traced twice counts once.
      site: where this jaxpr is: the positions of the equations around it, the outer ones first.
      times: how often it runs.
    """

    def __init__(
        self,
        uses: dict[tuple, Use] | None = None,
        site: tuple[int, ...] = (),
        times: int = 1,
        line: str = "",
        arrays: dict[tuple, tuple[View, jax.Array]] | None = None,
    ):
        self.uses = {} if uses is None else uses
        self.site = site
        self.times = times
        self._around = line
        self._eqn: JaxprEqn | None = None
        self._arrays = {} if arrays is None else arrays

    @property
    def line(self) -> str:
        """The line of user code of the current equation."""
        # What a library has jitted is traced without the frames around it.
        line = source_info_util.summarize(self._eqn.source_info) if self._eqn else ""
        return line or self._around

    def inner(self, *position: int, times: int = 1) -> "Evaluator":
        """An evaluator for the jaxpr of the current equation, in a trace of its own."""
        return Evaluator(self.uses, (*self.site, *position), self.times * times, self.line)

    def inline(self, jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
        """Evaluates the jaxpr of the current equation as if its equations stood here."""
        inlined = Evaluator(self.uses, self.site, self.times, self.line, self._arrays)
        return inlined.run(jaxpr, args)

    def run(self, jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
        """The results of the jaxpr; Views stay Views where only their layout changes."""
        env: dict[Any, Any] = {}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        env.update(zip(jaxpr.constvars, jaxpr.consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        last = _last_uses(jaxpr)
        outer = self.site
        for i, eqn in enumerate(jaxpr.eqns):
            self.site, self._eqn = (*outer, i), eqn
            stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
            with (
                source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
                eqn.ctx.manager,
            ):
                results = self._apply(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
            for v in last[i]:
                env.pop(v, None)  # so that memory is freed where nothing is jitted
        self.site, self._eqn = outer, None
        return [read(v) for v in jaxpr.outvars]

    def _apply(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        reason = None
        if any(isinstance(x, View) for x in operands):
            results = None
            if eqn.primitive.name in RULES:
                results = RULES[eqn.primitive.name](self, eqn, operands)
            if isinstance(results, list):
                return results
            reason = results
        return bind(eqn, [self.array(x, eqn, reason or "") for x in operands])

    def array(self, x: Any, eqn: JaxprEqn | None = None, reason: str = "") -> Any:
        """An array as it is; a View dequantized, noted as a use by `eqn` (None: as a result)."""
        if not isinstance(x, View):
            return x
        primitive, line = "a result", "the end of the function"
        if eqn is not None:
            primitive, line = eqn.primitive.name, self.line
        self.note(x.leaf, primitive, line, reason)
        offset = x.offset if isinstance(x.offset, int) else id(x.offset)
        key = (id(x.stored), offset, x.dims, x.dtype)
        if key not in self._arrays:  # the view is kept, so that the ids stay taken
            self._arrays[key] = (x, views.dequantize(x))
        return self._arrays[key][1]

    def note(self, leaf: int, primitive: str, line: str | None = None, reason: str = "") -> None:
        """Notes a use at the current equation."""
        self.add([Use(leaf, (), 1, primitive, line, reason)])

    def add(self, uses: Iterable[Use]) -> None:
        """Notes uses whose sites are relative to the current equation."""
        for use in uses:
            line = self.line if use.line == "" else use.line
            use = use._replace(site=self.site + use.site, times=self.times * use.times, line=line)
            self.uses[use.leaf, use.site, use.primitive] = use


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Runs an equation on arrays."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A hashable value that goes through a transformation as static data."""

    value: Any


def enter(
    evaluator: Evaluator, wrap: Callable[[Callable], Callable], jaxpr: Jaxpr, operands: list[Any]
) -> list[Any]:
    """Evaluates a jaxpr within `wrap`, a transformation such as jit.

    Inside, quantized arrays are numbered by operand, so that calls that differ in their leaves
    only share what jit caches; uses come back as static data, from the cache as well.
    """
    local = [
        dataclasses.replace(x, leaf=i) if isinstance(x, View) else x for i, x in enumerate(operands)
    ]
    results, uses = wrap(run_entered)(_Static(jaxpr), *local)
    leaves = {i: x.leaf for i, x in enumerate(operands) if isinstance(x, View)}
    evaluator.add(use._replace(leaf=leaves[use.leaf]) for use in uses.value)

    def outside(x: Any) -> Any:
        if not isinstance(x, View):
            return x
        stored = operands[x.leaf].stored if x.stored is None else x.stored
        return dataclasses.replace(x, stored=stored, leaf=leaves[x.leaf])

    return list(map(outside, results))


def run_entered(jaxpr: _Static, *operands: Any) -> tuple[list[Any], _Static]:
    """What `enter` wraps."""
    evaluator = Evaluator()
    results = evaluator.run(jaxpr.value, operands)

    def leave(x: Any) -> Any:  # a View without its weight, if that is outside already
        if isinstance(x, View) and x.stored is operands[x.leaf].stored:
            return dataclasses.replace(x, stored=None)
        return x

    return list(map(leave, results)), _Static(tuple(evaluator.uses.values()))


def _last_uses(jaxpr: Jaxpr) -> list[list[Any]]:
    """For each equation, the variables that nothing after it reads."""
    read = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    last: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        dead = []  # what it makes and nothing reads, too
        for v in (*eqn.invars, *eqn.outvars):
            if not isinstance(v, Literal) and v not in read:
                read.add(v)
                dead.append(v)
        last.append(dead)
    return last[::-1]
