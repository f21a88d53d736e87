"""The bodies of calls: read with a bound, and looked at before Gradio does, so that a wrong one is a sentence and no
trace in the terminal."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import gradio as gr
import orjson
from gradio.data_classes import CancelBody, PredictBody, ResetBody
from gradio.exceptions import Error
from pydantic import BaseModel, ValidationError

MAX_DEPTH = 40  # of lists and objects in a call; the pages send less than ten
_MODELS: dict[str, type[BaseModel]] = {
    "predict": PredictBody,
    "join": PredictBody,
    "cancel": CancelBody,
    "reset": ResetBody,
}
_NEVER_SENT = ("batched", "simple_format", "oauth_token", "event_id")  # by a page; each changes how a call is read

_SCALARS: dict[type[gr.components.Component], type | tuple[type, ...]] = {
    gr.Textbox: str,
    gr.Number: (int, float),
    gr.Slider: (int, float),
    gr.Checkbox: bool,
}  # Gradio passes any

_refused: ContextVar[list | None] = ContextVar("refused", default=None)


async def read(receive: Callable, limit: int) -> bytes | None:
    """The whole body; None: it is larger than ``limit``, or the sender went away."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit or message["type"] == "http.disconnect":
            return None
    return body


def again(body: bytes, receive: Callable) -> Callable:
    """A ``receive`` that gives the body that was read, then whatever comes."""
    given = False

    async def replay():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def problem(path: str, body: bytes, blocks: gr.Blocks, may_send_file: Callable[[str], bool]) -> str:
    """What is wrong with the body of a call, one sentence; empty: nothing that can be seen before it runs.

    Args:
        path: of the route; its last part says what a body must have.
        blocks: the page whose functions are called.
        may_send_file: whether the caller may name this file in a message.
    """
    try:
        data = orjson.loads(body)  # refuses NaN, and what is nested without end
        call = _MODELS[path.rpartition("/")[2]].model_validate(data)
    except (orjson.JSONDecodeError, ValidationError):
        return "This call is not understood."
    try:
        if not all(may_send_file(file) for file in _files(data)):
            return "This call names a file that is not for it."
    except RecursionError:
        return "This call is nested too deeply."
    if not isinstance(call, PredictBody):
        return ""
    if any(data.get(name) for name in _NEVER_SENT):
        return "This call has a field that no page sends."
    if (fn := blocks.fns.get(-1 if call.fn_index is None else call.fn_index)) is None:
        return "There is no such function; reload the page."
    if not fn.cancels and len(call.data) != len(fn.inputs):
        return f"This function takes {len(fn.inputs)} values, not {len(call.data)}."
    return _event_problem(fn.fn, call.event_data)


def _files(value, depth: int = 0) -> Iterator[str]:
    """Everything that Gradio could take for a file and copy, or for an address and fetch."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        if isinstance(path := value.get("path"), str):
            yield path
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _files(part, depth + 1)


def _event_problem(fn: Callable | None, data) -> str:
    try:
        hints = typing.get_type_hints(fn) if fn else {}
    except Exception:  # a function without readable annotations asks for no event
        hints = {}
    for kind in hints.values():
        if inspect.isclass(kind) and issubclass(kind, gr.EventData):
            try:
                kind(None, data)
            except Exception:
                return "This call does not say what was chosen."
    return ""


def watch() -> list:
    """Begin a request; the list is filled if its call fails for a reason that the caller has been told."""
    told: list = []
    _refused.set(told)
    return told


def explain(blocks: gr.Blocks) -> None:
    """Make values of a wrong type an error that the caller is told, and no trace in the terminal."""
    preprocess, process = blocks.preprocess_data, blocks.process_api

    async def preprocess_data(fn, inputs, *args, **kwargs):
        try:
            _check_scalars(fn, inputs)
            return await preprocess(fn, inputs, *args, **kwargs)
        except Error as e:
            e.print_exception = False
            raise
        except Exception as e:
            name = type(e).__name__
            text = f"The page sent a value that one of its fields does not take ({name}); reload it."
            raise Error(text, print_exception=False) from None

    async def process_api(*args, **kwargs):
        try:
            return await process(*args, **kwargs)
        except Error as e:
            if not e.print_exception and (told := _refused.get()) is not None:
                told.append(str(e))
            raise

    blocks.preprocess_data = preprocess_data  # type: ignore[method-assign,assignment]  # ours calls Gradio's
    blocks.process_api = process_api  # type: ignore[method-assign]


def _check_scalars(fn, inputs: list) -> None:
    for i, (block, value) in enumerate(zip(fn.inputs, inputs, strict=False)):
        kind = next((kind for component, kind in _SCALARS.items() if isinstance(block, component)), None)
        if kind is None or value is None or i in fn.component_prop_inputs:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{type(block).__name__} takes no {type(value).__name__}")
