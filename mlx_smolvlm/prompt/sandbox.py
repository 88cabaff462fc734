"""A jinja2 environment that limits the time and the memory of a template.

jinja2's own sandbox isolates a template from the rest of the process, but does not prevent it
from running forever or filling the memory. Here every operation is charged to the budget of the
rendering: a number of characters, and seconds of CPU time. Filters, methods and operators whose
cost in a single call has no bound are checked before the call, or are not available. Python
code runs between any two operations, so Ctrl-C works.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.filters
from jinja2 import nodes, runtime, utils
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST_SOURCE = 2**17  # characters of a template; published ones have up to 2**15
ROOM = 2**20  # characters that a template may produce without any input
ROOM_PER_INPUT = 64  # further characters for each character of the input
CPU_SECONDS = 2.0  # per rendering; a usual one takes a thousandth of this
OPERATION = 16  # cost of an operation, in characters
ELEMENT = 32  # cost of an element of a list, in characters
LARGEST_PRODUCT = 64  # product of the lengths of a call's arguments, as a multiple of the room
LARGEST_BITS = 1024  # of an integer
LARGEST_INDENT = 16  # spaces, in tojson and indent

# These exclude all filters and methods that take a width, a precision or a format.
FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int"),
    *("items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "replace", "reverse", "safe", "select", "selectattr", "sort", "string"),
    *("title", "trim", "upper", "wordcount"),
)
_STR_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha"),
    *("isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable"),
    *("isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix"),
    *("removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
)
METHODS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (str, _STR_METHODS),
    (Mapping, ("copy", "get", "items", "keys", "values")),
    ((list, tuple), ("copy", "count", "index")),
    ((int, float), ("bit_length", "is_integer")),
)
_SEQUENCES = (list, tuple, KeysView, ValuesView, ItemsView)

# Filters that the environment itself inserts into templates. The space makes sure that no
# template can name them.
_SPEND, _CONCAT, _SLICE = " spend", " concat", " slice"

T = TypeVar("T")


class LimitError(jinja2.TemplateError):
    """A template exceeded a limit; `reason` is a clause such as "it computes for more than 2 s"."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped, since {reason}")


class Budget:
    """Characters and time left for one rendering, for an input of `size` characters."""

    def __init__(self, size: int) -> None:
        self.total = self.room = ROOM + ROOM_PER_INPUT * size
        self._deadline = time.thread_time() + CPU_SECONDS

    def spend(self, size: int = 0) -> None:
        """Charge one operation and `size` characters, and check the time.

        Raises:
            LimitError: No characters or no time are left.
        """
        self.room -= OPERATION + size
        if self.room < 0:
            raise LimitError("it computes or writes more than any conversation needs")
        if time.thread_time() > self._deadline:
            raise LimitError(f"it computes for more than {CPU_SECONDS:g} s")

    def charge(self, value: T) -> T:
        """Charge the size of `value`, and return `value`."""
        self.spend(weigh(value, self.room))
        return value

    def check_product(self, *values: Any) -> None:
        """Raise LimitError if the product of the sizes of a call's arguments is too large."""
        product = 1
        for value in values:
            product *= max(1, weigh(value, self.total))
        if product > LARGEST_PRODUCT * self.total:
            raise LimitError("it joins, repeats or replaces texts that are too long")


_budget: ContextVar[Budget] = ContextVar("budget")


def weigh(value: Any, limit: int) -> int:
    """Return the size of `value` and its elements at any depth, in characters.

    A list that occurs twice in another one counts twice, as if printed. Counting stops above
    `limit`.
    """
    total, stack = 0, [value]
    while stack and total <= limit:
        one = stack.pop()
        if isinstance(one, str | range):
            total += len(one)
        elif isinstance(one, _SEQUENCES):
            total += ELEMENT * len(one)
            stack.extend(one)
        elif isinstance(one, dict):
            total += 2 * ELEMENT * len(one)
            stack.extend(one.keys())
            stack.extend(one.values())
        elif isinstance(one, _Namespace):
            total += 2 * ELEMENT * object.__getattribute__(one, "_size")
    return total


class _Namespace(utils.Namespace):
    """A namespace whose repr does not include its values, which may be nested namespaces."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        object.__setattr__(self, "_size", len(values))
        super().__init__(values)

    def __repr__(self) -> str:
        return "<Namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment, with the globals and filters that transformers provides to templates."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,  # do not evaluate constants while compiling
            finalize=_charge_output,
        )
        self.filters = {
            **{name: _charge_result(self.filters[name]) for name in FILTERS},
            **{"tojson": _charge_result(_to_json), "indent": _charge_result(_indent)},
            **{_SPEND: _spend, _CONCAT: _concat, _SLICE: _slice},
        }
        for name in ("indent", "join", "replace", "trim"):
            self.filters[name] = _bound_product(self.filters[name])
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _charge_result(function) for name, function in tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern[:100]),
        }

    def read(self, source: str) -> jinja2.Template:
        """Compile the template `source`.

        Raises:
            jinja2.TemplateError: The source is too long or not a template.
        """
        if len(source) > LONGEST_SOURCE:
            raise LimitError(
                f"it has {len(source):,} characters; at most {LONGEST_SOURCE:,} are allowed"
            )
        tree = _ChargeInserter().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may access the attribute `attr` of `obj`."""
        for kind, names in METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Reject `str.format` like any other method, since a format may state a width."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return `obj[argument]`, or the attribute of that name."""
        _budget.get().spend()
        return super().getitem(obj, argument)

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an arithmetic operator."""
        budget = _budget.get()
        if operator == "%" and isinstance(left, str):
            raise LimitError("it formats texts with %, which is not supported; use ~")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    budget.spend(max(0, times) * max(1, weigh(many, budget.room)))
        _check_integer(left)
        _check_integer(right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_integer(1 << min(abs(left.bit_length() * right), LARGEST_BITS))
        return budget.charge(super().call_binop(context, operator, left, right))

    def call(
        __self,  # noqa: N805
        __context: runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the result of a call in a template."""
        budget = _budget.get()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = tuple(map(_expand_iterator, args))
            budget.check_product(owner, *args)
        budget.spend()
        return budget.charge(super().call(__context, __obj, *args, **kwargs))


def render(template: jinja2.Template, values: dict[str, Any]) -> str:
    """Render a template of `BoundedEnvironment` with the variables `values`.

    Raises:
        LimitError: The template exceeds a limit.
        Exception: Any other error of an expression in the template.
    """
    token = _budget.set(Budget(weigh(list(values.values()), 2**40)))
    try:
        return template.render(values)
    finally:
        _budget.reset(token)


class _ChargeInserter(NodeTransformer):
    """Inserts filters that charge the budget where jinja2 has no hook."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        """Turn a template's own text into an expression, so that it is charged as output."""
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Replace `a ~ b` by a filter."""
        self.generic_visit(node)
        return _make_filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """Replace a slice, such as `a[1:2]`, by a filter."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _make_filter(node.node, _SLICE, [end or nodes.Const(None) for end in ends])

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """Charge new values, comparisons, and blocks that may run more than once."""
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            step = _make_filter(nodes.Const(None, lineno=node.lineno), _SPEND)
            node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        is_made = isinstance(node, nodes.List | nodes.Dict | nodes.Compare)
        if is_made or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return _make_filter(node, _SPEND)  # type: ignore[arg-type]
        return node


def _make_filter(node: nodes.Expr, name: str, args: list[nodes.Expr] | None = None) -> nodes.Filter:
    """Return the expression `node | name(args)`."""
    return nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)


def _charge_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, a filter or test, so that it charges its result."""

    @functools.wraps(function)  # keeps the attributes by which jinja2 marks functions
    def call(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend()
        return budget.charge(function(*args, **kwargs))

    return call


def _bound_product(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, a filter, so that it checks the product of its arguments' sizes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_expand_iterator, args))
        _budget.get().check_product(*args, *kwargs.values())
        return function(*args, **kwargs)

    return call


def _expand_iterator(value: Any) -> Any:
    """Return `value`, an iterator as a list, since its length is not known."""
    return _budget.get().charge(list(value)) if isinstance(value, Iterator) else value


@jinja2.pass_eval_context  # keeps jinja2 from calling it for constants while compiling
def _charge_output(eval_context: nodes.EvalContext, value: T) -> T:
    """Charge a value that the template writes."""
    return _budget.get().charge(value)


def _spend(value: T) -> T:
    """Charge a new value, or the run of a block."""
    return _budget.get().charge(value)


def _concat(values: list[Any]) -> str:
    """Return the concatenated texts of `values`."""
    _budget.get().charge(values)
    return "".join(map(str, values))


def _slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """Return `value[start:stop:step]`; the elements of a list have already been charged."""
    part = value[start:stop:step]
    budget = _budget.get()
    if isinstance(part, list | tuple):
        budget.spend(ELEMENT * len(part))
    else:
        budget.charge(part)
    return part


def _check_integer(value: Any) -> None:
    """Raise LimitError for an integer that is slow to compute with."""
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise LimitError(f"it computes with an integer of more than {LARGEST_BITS} bits")


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON as transformers writes it, without escapes of non-ASCII characters."""
    _check_indent(indent)
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Call jinja2's filter `indent` after checking the width."""
    _check_indent(width)
    return jinja2.filters.do_indent(text, width, first, blank)


def _check_indent(width: int | str | None) -> None:
    """Raise LimitError if the indentation is too wide."""
    size = len(width) if isinstance(width, str) else width or 0
    if size > LARGEST_INDENT:
        raise LimitError(f"it indents by {size}; at most {LARGEST_INDENT} are allowed")


def _raise_exception(message: str) -> NoReturn:
    """Let a template refuse messages, with its own error message."""
    raise jinja2.TemplateError(message)
