"""Settings files: YAML with names, numbers, words and lists in it, looked through before anything is built of it."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core.errors import ConfigError
from kto_core.guards.bounded import Unreadable, read_text
from kto_core.plain_text import cut, one_line, shown, whole

if TYPE_CHECKING:
    import yaml

BYTES = 1 << 18  # of the file; one of ours has three thousand
TEXT = 1 << 13  # characters of one value
NAMES = 300  # at the top: a file of ours has under fifty
PARTS = 5000  # names, values and lists in all
DEPTH = 10


def read(path: Path) -> dict[str, Any]:
    """The values of a settings file; {} of an empty one.

    Raises:
        ConfigError: it cannot be read, is no YAML, or holds what no setting can be; the sentence says which.
    """
    try:
        text = read_text(path, BYTES)
    except FileNotFoundError:
        raise SettingsError(path, "it does not exist", "Check its name.") from None
    except Unreadable as e:
        raise SettingsError(path, str(e), "Fix it, or choose another.") from None
    try:
        values = _loaded(text)
    except _Wrong as e:
        raise SettingsError(path, str(e)) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise SettingsError(path, "it must contain lines of the form `name: value`")
    if len(values) > NAMES:
        raise SettingsError(path, f"it has {len(values):,} settings")
    return values


class SettingsError(ConfigError):
    """A file that holds no settings; ``why`` without its name and the remedy."""

    def __init__(self, path: Path, why: str, remedy: str = "Fix it."):
        super().__init__(f"The settings file {path} cannot be read: {why}. {remedy}")
        self.why = why


class _Wrong(Exception):
    pass


def _loaded(text: str) -> object:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
    try:
        _look(text, loader)
        values = yaml.load(text, Loader=loader)
    except yaml.YAMLError as e:
        raise _Wrong(f"it is no valid YAML ({one_line(' '.join(cut(str(e), 400).split()), 300)})") from None
    except (ValueError, OverflowError, RecursionError) as e:  # a date or a number that there is not
        raise _Wrong(f"it has a value that cannot be read ({one_line(e, 100)})") from None
    return _plain(values)


def _look(text: str, loader: type[yaml.SafeLoader | yaml.CSafeLoader]) -> None:
    """Go through the file without building anything: aliases multiply, and brackets pile up."""
    import yaml

    depth = 0
    for parts, event in enumerate(yaml.parse(text, Loader=loader)):
        if isinstance(event, yaml.AliasEvent):
            raise _Wrong(f"it has an alias (*{one_line(event.anchor, 40)}), which settings files may not have")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > TEXT:
            raise _Wrong(f"it has a value of {len(event.value):,} characters ({shown(event.value, 40)})")
        if depth > DEPTH:
            raise _Wrong("it is nested too deeply")
        if parts > PARTS:
            raise _Wrong("it has too many values")


def _plain(value: object) -> object:
    """Numbers and texts that every reader can take."""
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 63:
        raise _Wrong(f"it has {shown(value, 40)}, larger than any setting can be")
    if value is None or isinstance(value, bool | int | float | date):
        return value
    raise _Wrong(f"it has a value of a kind that no setting has ({type(value).__name__})")
