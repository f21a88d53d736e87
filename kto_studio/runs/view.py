"""What the table of runs is asked for, and its HTML. Pure; every text from outside is escaped."""

from __future__ import annotations

import html
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from kto_core.compare import table
from kto_core.compare.facts import Facts
from kto_core.jobs import duration
from kto_core.plain_text import cut
from kto_core.planning.rate import short
from kto_core.runs.events import TERMINAL
from kto_studio.shared import views
from kto_studio.shared.curves import number

PAGE = 50  # rows
MOST = 8  # runs that are compared
TAGS = 24  # that are offered as filters
HEADS = (("name",), ("state",), ("data", "model"), ("changed",), ("rate",), ("eval_loss", "loss"), ("margin",),
         ("verdict",), ("seconds", "memory"), ("started",))  # fmt: skip
NUMBERS = ("rate", "eval_loss", "margin", "seconds")  # their cells are aligned to the right
TONES = {"better": "good", "worse": "bad", "drifted": "bad"}


@dataclass(frozen=True)
class View:
    """What a page asks for. n: grows with each wish, so that the page knows whether the newest one is drawn."""

    sort: str = table.NEWEST
    down: bool = True
    page: int = 1
    state: str = ""
    tag: str = ""
    chosen: tuple[str, ...] = ()
    n: int = 0

    @classmethod
    def read(cls, text: object) -> View:
        """From what the page keeps; whatever cannot be used is as at the beginning."""
        try:
            found = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            found = None
        found = found if isinstance(found, dict) else {}
        fresh = asdict(cls())
        kept = {k: found[k] for k, v in fresh.items() if type(found.get(k)) is type(v)}
        chosen = found.get("chosen")
        ids = [c for c in chosen if isinstance(c, str)] if isinstance(chosen, list) else []
        kept["chosen"] = tuple(dict.fromkeys(ids))[:MOST]
        made = cls(**kept)
        made = made if made.sort in table.COLUMNS else replace(made, sort=table.NEWEST, down=True)
        return made if made.state in views.LABELS else replace(made, state="")

    def text(self) -> str:
        """For the page to keep."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def rows(self, facts: Sequence[Facts], words: str) -> list[Facts]:
        """All that it asks for, in its order."""
        return table.ordered(table.filtered(facts, words, self.tag, self.state), self.sort, self.down)


def drawn(view: View, facts: Sequence[Facts], words: str = "") -> str:
    """Filters, the table's page and what turns it."""
    if not facts:
        return (
            '<div class="empty"><h2>No run yet</h2><p>Each run that you start in the Train tab is a line here, with '
            "its settings and its result.</p></div>"
        )
    rows = view.rows(facts, words)
    pages = max(1, math.ceil(len(rows) / PAGE))
    page = min(max(1, view.page), pages)
    shown = rows[(page - 1) * PAGE : page * PAGE]
    body = "".join(_row(f, f.id in view.chosen) for f in shown)
    none = '<p class="card-text">No run matches.</p>' if not rows else ""
    return (
        f'<div data-view="{html.escape(view.text())}" data-most="{MOST}">{_filters(view, facts)}'
        f'<div class="report runs"><table><thead><tr><th scope="col"><span class="sr">Compare</span></th>'
        f"{''.join(_head(view, names) for names in HEADS)}</tr>"
        f"</thead><tbody>{body}</tbody></table></div>{none}{_pager(view, page, pages, len(rows), len(facts))}</div>"
    )


def _filters(view: View, facts: Sequence[Facts]) -> str:
    """Buttons of the states and tags that there are; a filter that is on is there in any case."""
    states = Counter(f.state for f in facts if not f.problem)
    known = [s for s in views.LABELS if states[s] or s == view.state]
    found = table.tags(facts)
    tags = found[:TAGS] + [view.tag] * (bool(view.tag) and view.tag not in found[:TAGS])
    buttons = [_filter("state", s, f"{views.LABELS[s]} <b>{states[s]:,}</b>", view.state) for s in known]
    buttons += [_filter("tag", t, f"#{html.escape(t)}", view.tag) for t in tags]
    many = len(known) > 1 or tags or view.state
    return f'<div class="run-filters" role="group" aria-label="Filters">{"".join(buttons)}</div>' if many else ""


def _filter(what: str, value: str, shown: str, on: str) -> str:
    pressed = str(value == on).lower()
    value = html.escape(value)
    return f'<button type="button" data-do="{what}" data-value="{value}" aria-pressed="{pressed}">{shown}</button>'


def _head(view: View, names: Sequence[str]) -> str:
    """One head with a button for each value of the column."""
    sort = (' aria-sort="descending"' if view.down else ' aria-sort="ascending"') if view.sort in names else ""
    number_ = ' class="n"' if names[0] in NUMBERS else ""
    buttons = "".join(_sort(view, table.COLUMNS[name]) for name in names)
    return f'<th scope="col"{number_}{sort}>{buttons}</th>'


def _sort(view: View, column: table.Column) -> str:
    arrow = ("↓" if view.down else "↑") if view.sort == column.name else ""
    return (
        f'<button type="button" data-do="sort" data-value="{column.name}" data-down="{str(not column.lower).lower()}" '
        f'title="Sort by {column.title.lower()}">{column.title}<i aria-hidden="true">{arrow}</i></button>'
    )


def _row(f: Facts, chosen: bool) -> str:
    title = html.escape(f.title)
    box = f'<input type="checkbox" data-run="{html.escape(f.id)}" aria-label="Compare {title}"{" checked" * chosen}>'
    if f.problem:
        cells = f'<td colspan="{len(HEADS) - 1}"><span class="bad">cannot be read: {html.escape(f.problem)}</span></td>'
    else:
        cells = "".join(
            (
                f"<td>{state(f)}</td>",
                f"<td>{_two(html.escape(f.data), html.escape(f.model))}</td>",
                f"<td>{_changed(f)}</td>",
                f'<td class="n">{short(f.rate) if f.rate else ""}</td>',
                f'<td class="n">{_two(_number(f.eval_loss), _number(f.loss, "training {}"))}</td>',
                f'<td class="n">{margin(f)}</td>',
                f"<td>{verdict(f)}</td>",
                f'<td class="n">{_two(duration(f.seconds) if f.seconds else "", _number(f.memory, "{} GiB"))}</td>',
                f'<td class="when">{_when(f.started)}</td>',
            )
        )
    return f'<tr aria-selected="{str(chosen).lower()}"><td>{box}</td><td>{_name(f)}</td>{cells}</tr>'


def _name(f: Facts) -> str:
    """Name, id, tags and the first line of the note."""
    under = f'<span class="run-id">{html.escape(f.id)}</span>' if f.name else ""
    note = (
        f'<span class="run-note" title="{html.escape(f.note)}">{html.escape(cut(f.note, 90))}</span>' if f.note else ""
    )
    return f'<b class="run-title">{html.escape(f.title)}</b>{under}{tags(f)}{note}'


def tags(f: Facts) -> str:
    """The run's tags."""
    return "".join(f'<span class="kind run-tag">#{html.escape(tag)}</span>' for tag in f.tags)


def state(f: Facts) -> str:
    """A chip, and how far it came where that is not the end."""
    if not f.state:
        return '<span class="run-id">reading…</span>'
    name = html.escape(views.LABELS.get(f.state, f.state))
    done = f"{f.step:,} of {f.total_steps:,}" if f.total_steps and f.step < f.total_steps else ""
    ended = f.state in TERMINAL and not f.step
    return _two(f'<span class="chip chip-{html.escape(f.state)}">{name}</span>', "" if ended else done)


def margin(f: Facts) -> str:
    """The margin of rewards with its interval."""
    if f.margin is None:
        return ""
    low, high = f.interval or (None, None)
    return _two(f"{f.margin:+.3g}", f"{low:+.2g} to {high:+.2g}" if low is not None else "")


def verdict(f: Facts) -> str:
    """Its word."""
    tone = TONES.get(f.verdict, "")
    return f'<span class="run-verdict {tone}">{html.escape(f.verdict)}</span>' if f.verdict else ""


def _changed(f: Facts) -> str:
    shown = ", ".join(f"{html.escape(k)} <b>{html.escape(v)}</b>" for k, v in f.changed)
    return f'<span class="clamp" title="{html.escape(table.changes(f))}">{shown}</span>' if shown else ""


def _two(first: str, second: str) -> str:
    """A value over another one."""
    return f"{first}<small>{second}</small>" if second else first


def _number(value: float | None, form: str = "{}") -> str:
    return "" if value is None else form.format(number(value))


def _when(started: float | None) -> str:
    if not started:
        return ""
    at = time.localtime(started)
    return _two(time.strftime("%Y-%m-%d", at), time.strftime("%H:%M", at))


def _pager(view: View, page: int, pages: int, found: int, all_: int) -> str:
    of = f" of {all_:,}" if found != all_ else ""
    parts = [f'<span class="place" role="status">{found:,}{of} run{"s" * (found != 1)}'
             f"{f' · page {page} of {pages}' if pages > 1 else ''}</span>"]  # fmt: skip
    if pages > 1:
        parts += [_turn("Previous", page - 1, page > 1), _turn("Next", page + 1, page < pages)]
    off = "" if view.chosen else " hidden"  # the script follows the choice
    parts.append(f'<button type="button" data-do="none" data-value=""{off}>Clear selection</button>')
    parts.append(f'<button type="button" data-do="go" data-value="" class="go"{off}>See the chosen runs ↓</button>')
    return f'<div class="run-pager">{"".join(parts)}</div>'


def _turn(name: str, page: int, there: bool) -> str:
    off = "" if there else " disabled"
    return f'<button type="button" data-do="page" data-value="{page}"{off}>{name}</button>'
