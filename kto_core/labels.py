"""What its user says of a run: a name, tags and a note. They lie in RUN/label.json, apart from the run's settings.

The file is written whole and nobody who trains reads it, so that it may change at any time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kto_core.errors import DiskError, RunError
from kto_core.files import write_whole
from kto_core.guards import bounded
from kto_core.plain_text import one_line, shown

FILE = "label.json"
NAME, TAG, TAGS, NOTE = 100, 40, 20, 2000  # characters of a name and of a tag, tags, characters of a note
_TAG = re.compile(rf"[^\s,]{{1,{TAG}}}")
_NAME = re.compile(rf"[^/\\\x00-\x1f]{{0,{NAME}}}")  # as `RunConfig.run_name`


@dataclass(frozen=True)
class Label:
    """What is said of a run.

    Attributes:
        name: in place of the one in its settings; "": that one.
        tags: in the order of the alphabet. note: may have several lines.
    """

    name: str = ""
    tags: tuple[str, ...] = ()
    note: str = ""


NONE = Label()


def read(run_dir: Path) -> Label:
    """The label, as far as the file can be used."""
    found: dict[str, Any] = bounded.read_dict(run_dir / FILE)
    name, tags, note = found.get("name"), found.get("tags"), found.get("note")
    usable = {tag for tag in tags if isinstance(tag, str) and is_tag(tag)} if isinstance(tags, list) else set()
    return Label(
        name if isinstance(name, str) and _is_name(name) else "",
        tuple(sorted(usable))[:TAGS],
        note[:NOTE] if isinstance(note, str) else "",
    )


def is_tag(text: str) -> bool:
    """Whether it can be a tag: one printable word without commas that does not begin with a dash."""
    return bool(_TAG.fullmatch(text)) and not text.startswith("-") and one_line(text) == text


def split(text: str) -> list[str]:
    """Tags as they are typed in one line, with commas or spaces between them."""
    return [tag for tag in re.split(r"[\s,]+", text) if tag]


def change(
    run_dir: Path,
    *,
    name: str | None = None,
    note: str | None = None,
    tags: Iterable[str] | None = None,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
) -> Label:
    """Change what is given and keep the rest; the new label.

    Args:
        name: "" takes back the name. note: "" deletes it.
        tags: in place of all. add, remove: a tag that is there already, or is not, is no problem.

    Raises:
        RunError: a name, tag or note that cannot be one; nothing was changed.
        DiskError: the run's folder cannot be written.
    """
    old = read(run_dir)
    new = old
    if name is not None:
        name = name.strip()
        if not _is_name(name):
            raise RunError(f"A run's name has at most {NAME} characters without slashes, unlike {shown(name, 60)}.")
        new = replace(new, name=name)
    if note is not None:
        note = note.strip()
        if len(note) > NOTE:
            raise RunError(f"A note has at most {NOTE:,} characters, not {len(note):,}. Shorten it.")
        new = replace(new, note=note)
    wanted = (set(old.tags if tags is None else tags) | set(add)) - set(remove)
    if wrong := sorted(tag for tag in wanted | set(remove) if not is_tag(tag)):
        raise RunError(
            f"{shown(wrong[0], 60)} cannot be a tag. A tag is one word of at most {TAG} characters without commas "
            "that does not begin with a dash."
        )
    if len(wanted) > TAGS:
        raise RunError(f"A run has at most {TAGS} tags, not {len(wanted)}. Remove some first.")
    new = replace(new, tags=tuple(sorted(wanted)))
    if new != old:
        _keep(run_dir / FILE, new)
    return new


def _keep(file: Path, label: Label) -> None:
    try:
        if label == NONE:
            file.unlink(missing_ok=True)
        else:
            write_whole(file, json.dumps(asdict(label), ensure_ascii=False, indent=1))
    except OSError as e:
        raise DiskError.of(file, e) from e


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and one_line(text) == text
