"""Chat templates of strangers, rendered with every round of a loop, every call and every result counted.

Jinja's sandbox keeps a template from reaching outside. It does not keep it from running for hours or writing gigabytes;
`render` does: a template that takes more than `SECONDS` of this thread's time, or makes more than `SIZE` characters on
the way, ends with a ModelError. Filters, tests and globals are those of transformers, so the text is the same.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from jinja2 import Template, nodes, pass_context
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from kto_core.errors import ModelError
from kto_core.jobs import check_cancel

SECONDS = 3.0  # of processor time for one conversation; templates take thousandths
SIZE = 256 * 2**20  # characters made on the way, results of all steps together
GROWTH = 200  # … and so many for each character of the conversation
SOURCE = 2**20  # characters of a template; the longest known have 20 thousand
NUMBER = 100_000  # the largest width, count or precision that a call may ask for
BITS = 10_000  # of a whole number
CONTAINER = 256  # characters that a list or an object counts for: those inside each other are looked at one by one
EVERY = 64  # steps between two looks at the clock and at cancel
SPELLED = {"tojson", "string", "join", "format", "pprint", "xmlattr", "urlencode", "replace", "indent", "wordwrap"}
WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{6}|\*)|:[^{}]*\d{6}|:[^{}\s]*\{")  # of a format: huge, or out of a variable
_active = threading.local()
T = TypeVar("T")


class _Meter:
    """What one rendering has taken so far."""

    def __init__(self, allowed: int, cancel: threading.Event | None):
        self.left, self.cancel, self.steps = allowed, cancel, 0
        self.until = time.thread_time() + SECONDS

    def step(self, size: int = 0) -> None:
        self.steps += 1
        if self.steps % EVERY == 0:
            check_cancel(self.cancel)
            if time.thread_time() > self.until:
                raise ModelError(
                    f"The model's chat template did not come to an end within {SECONDS:g} s of computing. Choose "
                    "another model."
                )
        if size:
            self.made(size)

    def room(self, size: int) -> None:
        """Before something of that size is made."""
        if size > self.left:
            raise ModelError("The model's chat template writes without end. Choose another model.")

    def made(self, size: int) -> None:
        self.room(size)
        self.left -= size

    def result(self, value: T) -> T:
        if isinstance(value, str | bytes):
            self.made(len(value))
        elif isinstance(value, list | tuple | dict | set):
            self.made(8 * len(value))
        return value

    def number(self, value: object) -> None:
        if isinstance(value, int) and abs(value) > NUMBER:
            self.room(self.left + 1)


def _meter() -> _Meter:
    found = getattr(_active, "meter", None)
    return found or _Meter(SIZE, None)  # only while something is compiled outside of `render`


def _spelled(value: object, most: int) -> int:
    """About how long a value is as text, looked at no further than ``most``."""
    total, todo = 0, [value]
    while todo and total <= most:
        one = todo.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, dict):
            todo += one.keys()
            todo += one.values()
            total += CONTAINER
        elif isinstance(one, list | tuple | set):
            todo += one
            total += CONTAINER
        else:
            total += 16
    return total


class _Each:
    """What a loop runs over, each round counted."""

    def __init__(self, values: Collection[Any], size: int = 0):
        self._values, self._size = values, size

    def __iter__(self) -> Iterator[Any]:
        meter = _meter()
        for value in self._values:
            meter.step(self._size)
            yield value

    def __len__(self) -> int:
        return len(self._values)


def _join(first: object, *rest: object) -> str:
    """The operator ``~``."""
    meter = _meter()
    meter.step(sum(_spelled(part, meter.left) for part in (first, *rest)))
    return "".join(map(str, (first, *rest)))


def _part(value: T) -> T:
    """A slice."""
    meter = _meter()
    meter.step()
    return meter.result(value)


@pass_context
def _counted(context: Context, value: T) -> T:
    """Everything that a template writes passes here."""
    meter = _meter()
    meter.step(_spelled(value, meter.left))
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are counted."""

    @functools.wraps(function)
    def inner(*args: Any, **keywords: Any) -> Any:
        meter = _meter()
        meter.step()
        if name in SPELLED:
            args = tuple(list(a) if isinstance(a, range | Iterator) else a for a in args)
        _look(meter, name, args, keywords)
        return meter.result(function(*args, **keywords))

    return inner


def _look(meter: _Meter, name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Before a filter or a method of a text is called, the text being the first of ``args``."""
    given: list[Any] = [
        a for a in (*args, *keywords.values()) if isinstance(a, str | bytes | int | float | list | tuple | dict)
    ]
    for value in given[1:]:
        meter.number(value)
    if name in SPELLED:
        sizes = [_spelled(value, meter.left) for value in given]
        meter.room(sum(sizes))
        if name == "join":
            items = max((len(g) for g in given if isinstance(g, list | tuple | dict)), default=len(given[0]))
            meter.room(sum(sizes) + items * max((len(g) for g in given if isinstance(g, str)), default=0))
        elif name in ("replace", "indent", "wordwrap") and len(given) > 1:
            text = str(given[0])
            old = str(given[1]) if name == "replace" else "\n"
            new = len(str(given[2])) if name == "replace" and len(given) > 2 else 0
            if name != "replace":
                new = max(g if isinstance(g, int) else len(g) if isinstance(g, str) else 0 for g in given[1:])
            meter.room(len(text) + (text.count(old) + 1) * new)
        elif name == "format" and WIDTH.search(str(given[0]) if given else ""):
            meter.room(meter.left + 1)


class _Rewritten(NodeTransformer):
    """Loops, ``~`` and slices through what counts them."""

    def visit_For(self, node: nodes.For, *args: Any) -> nodes.Node:
        self.generic_visit(node, *args)
        size = sum(len(data.data) for part in (*node.body, *node.else_) for data in _texts(part))
        node.iter = nodes.Filter(node.iter, "kto_each", [nodes.Const(size)], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any) -> nodes.Node:
        self.generic_visit(node, *args)
        first, *rest = node.nodes
        return nodes.Filter(first, "kto_join", rest, [], None, None, lineno=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem, *args: Any) -> nodes.Node:
        self.generic_visit(node, *args)
        if not isinstance(node.arg, nodes.Slice):
            return node
        return nodes.Filter(node, "kto_part", [], [], None, None, lineno=node.lineno)


def _texts(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    source_size = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise ModelError(f"The model's chat template has more than {SOURCE:,} characters. Choose another model.")
        tree: nodes.Template = _Rewritten().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call(self, context: Context, obj: Any, *args: Any, **keywords: Any) -> Any:
        meter = _meter()
        macro = type(obj).__name__ == "Macro"
        meter.step(context.vars.get("kto_size", 0) if macro else 0)
        if isinstance(obj, LoopContext) and args:
            args = (_Each(args[0]), *args[1:])
        owner = getattr(obj, "__self__", None)
        for value in (*args, *keywords.values()):
            meter.number(value)
        if isinstance(owner, str | bytes):
            name = getattr(obj, "__name__", "")
            if name in ("translate", "expandtabs"):
                meter.room(meter.left + 1)
            _look(meter, name, (owner, *args), keywords)
        return meter.result(super().call(context, obj, *args, **keywords))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def counted(*args: Any, **keywords: Any) -> str:
            _look(_meter(), "format", (value.__self__, *args), keywords)
            return wrapped(*args, **keywords)

        return counted

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter()
        meter.step()
        sizes = [len(v) for v in (left, right) if isinstance(v, str | bytes | list | tuple)]
        whole = [abs(v) for v in (left, right) if isinstance(v, int)]
        if operator == "+":
            meter.room(sum(sizes))
        elif operator == "%" and isinstance(left, str):
            if WIDTH.search(left):
                meter.room(meter.left + 1)
            meter.room(len(left) + _spelled(right, meter.left))
        elif operator == "*" and sizes and whole:
            meter.room(8 * sizes[0] * whole[0])
        elif len(whole) == 2:
            bits = [v.bit_length() for v in whole]
            if (bits[0] * whole[1] if operator == "**" else sum(bits)) > BITS:
                meter.room(meter.left + 1)
        return meter.result(super().call_binop(context, operator, left, right))


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs = _compile_jinja_template("").environment
    ours = _Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        finalize=_counted,
    )
    ours.filters = {name: _guarded(name, function) for name, function in theirs.filters.items()}
    ours.filters |= {"kto_each": _Each, "kto_join": _join, "kto_part": _part}
    ours.tests = dict(theirs.tests)
    ours.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    return ours


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    environment = _environment()
    return environment.from_string(template, globals={"kto_size": len(template)})


@contextlib.contextmanager
def cancelled_by(cancel: threading.Event | None) -> Iterator[None]:
    """Inside, what this thread renders ends when ``cancel`` is set."""
    before, _active.cancel = getattr(_active, "cancel", None), cancel
    try:
        yield
    finally:
        _active.cancel = before


def render(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    generation: bool = False,
    **variables: Any,
) -> str:
    """A conversation through a chat template, as ``tokenizer.apply_chat_template`` renders it.

    Args:
        variables: the texts of the special tokens, by their names, and switches of the template.

    Raises:
        ModelError: the template takes more time or room than any should.
        jinja2.TemplateError, and what else a template raises: it refuses these messages.
        Cancelled: by `cancelled_by`.
    """
    if not messages:
        raise ValueError("there are no messages")
    given = _spelled([messages, tools], SIZE)
    before = getattr(_active, "meter", None)
    meter = _active.meter = _Meter(SIZE + GROWTH * given, getattr(_active, "cancel", None))
    try:
        pieces = []
        for piece in _compiled(template).generate(
            messages=messages, tools=tools, documents=None, add_generation_prompt=generation, **variables
        ):
            meter.step(len(piece))
            pieces.append(piece)
        return "".join(pieces)
    except RecursionError:
        raise ModelError("The model's chat template calls itself without end. Choose another model.") from None
    except MemoryError:
        raise ModelError("The model's chat template takes more memory than there is. Choose another model.") from None
    finally:
        _active.meter = before
