"""Chat templates: a checkpoint's Jinja program from messages to the prompt text.

A template comes with the checkpoint, so it is untrusted code. It is rendered as transformers
renders it, byte for byte, in Jinja's sandbox, with a budget on the work it may do.
"""

import functools
import json
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import JaxquantError

# One render may make this many characters in all; a step and a call count as so many of them.
# A million-token conversation stays far below; an endless template stops within seconds.
_BUDGET = 100_000_000
_STEP = 20
_CALL = 200
# Operations that write out whole containers, whose text can be far longer than they are.
_WRITERS = frozenset({"+", "~", "%", "format", "join", "pprint", "string", "tojson"})
# Operations that can make as much as the product of their value's and an argument's size.
_MULTIPLIERS = frozenset(
    {"batch", "center", "expandtabs", "indent", "join", "ljust", "rjust", "slice", "tojson"}
    | {"wordwrap", "zfill"}
)
_FORMATS = frozenset({"%", "format", "format_map"})


class ChatTemplate:
    """A compiled chat template; `source` names its file in errors."""

    def __init__(self, text: str, source: str):
        self._text = text
        self._source = source

    @functools.cached_property
    def _compiled(self):
        environment = _Sandbox()
        tree = environment.parse(self._text)
        _CountWork().visit(tree)
        tree.set_environment(environment)
        code = environment.compile(tree)
        template = environment.template_class.from_code(
            environment, code, environment.make_globals(None)
        )
        return environment, template

    def render(
        self, messages: str | Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **extra
    ) -> str:
        """The prompt text of `messages`.

        `extra` are further variables of the template (special tokens, `tools`, `documents`, a
        template's own switches). Raises JaxquantError, with the template's line, for messages that
        are malformed or that the template refuses, for a template that is broken, that tries to
        leave the sandbox ("unsafe") or that asks for too much work.
        """
        variables: dict[str, Any] = {"tools": None, "documents": None}
        variables |= {name: _plain(value, name) for name, value in extra.items()}
        variables["messages"] = _template_messages(as_messages(messages))
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            environment, template = self._compiled
            environment.spent = 0
            return template.render(variables)
        except Exception as error:  # untrusted code may raise anything
            raise JaxquantError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        if isinstance(error, TemplateSyntaxError):
            line = error.lineno
        else:
            lines = [
                number
                for frame, number in traceback.walk_tb(error.__traceback__)
                if frame.f_code.co_filename == "<template>"
            ]
            line = lines[-1] if lines else None
        where = f"chat template {self._source}"
        if isinstance(error, SecurityError):
            where += ": unsafe"
        if line is not None:
            where += f", line {line}"
        known = isinstance(error, TemplateError)
        what = str(error) if known else f"{type(error).__name__}: {error}"
        return f"{where}: {' '.join(what.split())}"


def as_messages(prompt: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages `[{"role": ..., "content": ...}, ...]`; a bare string is one message of the user.

    Raises JaxquantError for anything else, with the index of the message and its field. An
    assistant's message with "tool_calls" may do without "content".
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not prompt:
        came = "an empty list" if isinstance(prompt, Sequence) else type(prompt).__name__
        raise JaxquantError(
            f'messages: got {came}; pass a string or [{{"role": "user", "content": "..."}}, ...]'
        )
    messages = []
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            raise JaxquantError(
                f"messages[{i}]: got {type(message).__name__}; "
                'each message is a dict {"role": ..., "content": ...}'
            )
        if not isinstance(message.get("role"), str):
            raise JaxquantError(
                f"messages[{i}]['role']: got {message.get('role')!r}; "
                "it is a string such as 'user', 'assistant' or 'system'"
            )
        content = message.get("content")
        if not isinstance(content, str | list) and not (
            content is None and "tool_calls" in message
        ):
            raise JaxquantError(
                f"messages[{i}]['content']: got {content!r}; it is a string or a list of parts"
            )
        messages.append(_plain(message, f"messages[{i}]"))
    return messages


def _template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: without None, reasoning under each name in use."""
    shown = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[name] for name in names if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        shown.append(message)
    return shown


def _plain(value: Any, path: str) -> Any:
    """A copy of `value` out of JSON's types alone, whose methods the sandbox knows."""
    if value is None or isinstance(value, bool):
        return value
    for scalar in (str, int, float):
        if isinstance(value, scalar):
            return getattr(scalar, f"__{scalar.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key, path): _plain(item, f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise JaxquantError(
        f"{path}: got {type(value).__name__}; chat templates take strings, numbers, lists and dicts"
    )


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text; it renders as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Macro) -> str:
        return caller()


class _CountWork(NodeTransformer):
    """Rewrites what the sandbox cannot intercept, loops and `~`, to pass through its filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        # A step costs the text that the loop's body writes, too.
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        cost = nodes.Const(_STEP + text)
        node.iter = nodes.Filter(
            node.iter, "loop steps", [cost], [], None, None, lineno=node.iter.lineno
        )
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "~", [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' settings, and a budget that bounds a template's work.

    The budget stops endless loops and the plain memory bombs. It is no wall against an author
    who studies it: run such a checkpoint where memory is limited.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, LoopControlExtension],
            finalize=self._finalize,
        )
        self.spent = 0
        self.filters["tojson"] = _tojson
        self.filters["~"] = lambda parts: "".join(map(str, parts))
        self.filters = {name: self._guard(name, f) for name, f in self.filters.items()}
        self.filters["loop steps"] = self._counted
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def spend(self, cost: int) -> None:
        self.spent += cost
        if self.spent > _BUDGET:
            raise TemplateRuntimeError(
                f"stopped: it asks for more work than {_BUDGET:,} characters and loop steps"
            )

    def unsafe_undefined(self, obj: Any, attribute: str):
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1)
            if bits + right.bit_length() > 10_000:
                raise TemplateRuntimeError(f"stopped: a number too large from {operator!r}")
        elif operator == "*":
            self.spend(_size(left) * _size(right))
        elif not numbers:
            self._check(operator, left, (right,))
        return self._spend_on(super().call_binop(context, operator, left, right))

    # Jinja's own names: keyword arguments of the template must not collide with them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        name, value = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        __self.spend(_CALL)
        __self._check(name, value, (*args, *kwargs.values()))
        return __self._spend_on(super().call(__context, __obj, *args, **kwargs))

    def _guard(self, name: str, function: Any) -> Any:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # behind Jinja's context

        @functools.wraps(function)  # keeps the mark that makes Jinja pass its context
        def guarded(*args: Any, **kwargs: Any) -> Any:
            value, *arguments = args[first:]
            self._check(name, value, (*arguments, *kwargs.values()))
            return self._spend_on(function(*args, **kwargs))

        return guarded

    def _check(self, name: str, value: Any, arguments: tuple[Any, ...]) -> None:
        """Pays for the operation `name` before it runs, and stops one that makes too much."""
        self.spend(_STEP)
        if name in _WRITERS:
            for operand in (value, *arguments):
                self.spend(_text_size(operand))
        if name in _FORMATS:
            self.spend(max(_widths(value, arguments), default=0))
        elif name in _MULTIPLIERS and not isinstance(value, int):
            self.spend(max(1, _size(value)) * max(map(_size, arguments), default=0))
        elif name == "replace" and isinstance(value, str):
            old, new = map(str, arguments[:2])
            self.spend(value.count(old) * len(new))

    def _spend_on(self, value: Any) -> Any:
        if isinstance(value, str):
            self.spend(len(value))
        return value

    def _finalize(self, value: Any) -> Any:
        self.spend(_text_size(value))
        return value

    def _counted(self, iterable: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in iterable:
            self.spend(max(cost, _STEP))
            yield item


def _size(value: Any) -> int:
    if isinstance(value, str | list | tuple | dict):
        return len(value)
    return abs(value) if isinstance(value, int) else 0


def _widths(template: Any, arguments: tuple[Any, ...]) -> list[int]:
    """The numbers that may be widths in a format: "{:>99}", "%99d", "%*d" % (99, 1), "{:{}}"."""
    if not isinstance(template, str):
        return []
    widths = [int(digits) for digits in re.findall(r"(?:% ?|[:<>^=.+#-])(\d{1,18})", template)]
    if re.search(r"%[^a-zA-Z%]*\*|:[^}]*\{", template):
        for argument in arguments:
            parts = argument.values() if isinstance(argument, dict) else argument
            parts = [argument] if isinstance(argument, int | str) else parts
            widths += [abs(part) for part in parts if isinstance(part, int)]
    return widths


def _text_size(value: Any) -> int:
    """About what it costs to write `value` out; counts no further than the budget."""
    size = 0
    stack = [value]
    while stack and size <= _BUDGET:
        item = stack.pop()
        size += len(item) if isinstance(item, str) else _STEP
        if isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return size


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """The template's `dict`: makes dicts, and is no class whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """The template's `namespace`, without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _Namespace._check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)  # attributes of `self` are the template's
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")
