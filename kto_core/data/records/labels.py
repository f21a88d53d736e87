"""Labels as people write them -> desirable or not; what is a scale is never read as 0/1.

Whether a number is one of two labels or a point on a scale shows in the whole data set only. `Labels` reads one data
set: it notes the numbers of each column, and is `stale` when a later row shows that earlier ones were misread. Its
reader then begins again with `again()`. Standard library only; this module knows nothing of messages and files.
"""

from __future__ import annotations

import re
from typing import Any

from . import scales
from .mapping import Columns
from .names import spelled
from .turns import DroppedRow, shorten

COLUMNS = ("label", "kto_tag", "rating", "score", "stars", "feedback")  # the first that a row has is its label
STARS = "stars"  # always a scale
GRADES = ("rating", "score", STARS)  # a 1 there may be the worst of five stars, so it is no yes by itself
NEUTRAL, SCALE = "neutral label", "label on a scale"  # reasons of dropped rows
READ_FROM = "label read from column "  # a change, with the column
MOST_ANSWERS = 256  # labelled answers of one conversation; each becomes a row with all turns before it

_WORDS = {  # good: bad
    "true": "false", "yes": "no", "y": "n", "t": "f", "👍": "👎", "good": "bad", "up": "down", "thumbup": "thumbdown",
    "thumbsup": "thumbsdown", "upvote": "downvote", "positive": "negative", "like": "dislike", "liked": "disliked",
    "accept": "reject", "accepted": "rejected", "desirable": "undesirable",
}  # fmt: skip
_BAD = frozenset(_WORDS.values())
_NONE = frozenset(("", "nan", "null", "none"))
_THUMB_LOOKS = re.compile("[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")  # variation selectors, skin tones
_JOINTS = re.compile(r"[\s_-]+")  # thumbs_up, thumbs-up, thumbs up
_NUMBER = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?)\s*(%?)")
_TWO, _THREE, _MANY = range(3)  # 1/0 or 1/−1; 1/0/−1 with a neutral middle; a scale


class Labels:
    """How the labels of one data set are read.

    Args:
        good_from: numbers from here on are desirable; None: those above ``bad_to``.
        bad_to: numbers up to here are undesirable; None: those below ``good_from``. With neither, 1 is desirable, 0
            and −1 are not, unless the column holds other numbers, or is one of `GRADES` and holds 1 alone: then none
            of its numbers is a label.
        columns: which columns its owner named.
    """

    def __init__(
        self, good_from: float | None = None, bad_to: float | None = None, columns: dict[str, str] | None = None
    ):
        self.columns = Columns(columns)
        self.good_from, self.bad_to = good_from, bad_to
        self.thresholds = good_from is not None or bad_to is not None
        self.stale = False
        self.numbers: dict[str, scales.Numbers] = {}
        self._kinds: dict[str, int] = {}
        self._settled = False

    def again(self) -> Labels:
        """For reading from the start: it knows what was learnt, and has counted nothing."""
        new = Labels(self.good_from, self.bad_to, self.columns.given)
        new._kinds = dict(self._kinds)
        return new

    def settled(self) -> Labels:
        """The same reading, for single rows of the set: it learns and counts nothing more."""
        new = self.again()
        new._settled = True
        new.columns.noting = False
        return new

    def close(self) -> None:
        """All rows were read: what can be told only now may make the reading `stale`."""
        for column, seen in self.numbers.items():
            scale = self._alone(column, seen) or spelled(column) == STARS
            if scale and not self.thresholds and self._kinds.get(column) != _MANY:
                self._kinds[column] = _MANY
                self.stale = True

    @staticmethod
    def _alone(column: str, seen: scales.Numbers) -> bool:
        return spelled(column) in GRADES and seen.low == seen.high == 1

    def of(self, obj: dict[str, Any], changes: list[str]) -> bool:
        """The label of a record.

        Raises:
            DroppedRow: "no label" (missing, null, NaN, empty), "label not understood", or a number that is none.
        """
        value = obj.get("label")
        if value is True or value is False:
            return value
        column = "label" if value is not None else column_of(obj)
        if column == "label" and self.columns.label == "label":
            return self.read(value)
        if column == "label":
            changes.append(READ_FROM + self.columns.label)
            return self.read(value, self.columns.label)
        label = self.read(obj[column], column)
        changes.append(READ_FROM + column)
        return label

    def read(self, value: object, column: str = "label") -> bool:
        """One value as a label. Raises DroppedRow like `of`."""
        if value is True or value is False:
            return value
        if value is None:
            raise DroppedRow("no label")
        if isinstance(value, (int, float)):  # a union would be made anew for each row
            if value != value:
                raise DroppedRow("no label", "NaN")
            if abs(value) < 1e300:  # neither infinite nor an integer that no float holds
                return self._number(float(value), column, False)
        elif isinstance(value, str):
            text = _THUMB_LOOKS.sub("", value).strip().lower()
            if found := _NUMBER.fullmatch(text):
                if abs(number := float(found[1])) < 1e300:
                    return self._number(number, column, bool(found[2]))
            else:
                word = _JOINTS.sub("", text)
                if word in _WORDS:
                    return True
                if word in _BAD:
                    return False
                if word in _NONE:
                    raise DroppedRow("no label", shorten(value))
                if word == "neutral":
                    raise DroppedRow(NEUTRAL, shorten(value))
        raise DroppedRow("label not understood", shorten(value))

    def _number(self, number: float, column: str, percent: bool) -> bool:
        kind = self._kind(number, column, percent)
        if self.thresholds:
            if (label := scales.side(number, self.good_from, self.bad_to)) is not None:
                return label
            raise DroppedRow(NEUTRAL, f"{column} {number:g}")
        if kind == _MANY:
            raise DroppedRow(SCALE, f"{column} {number:g}")
        if kind == _THREE and not number:
            raise DroppedRow(NEUTRAL, f"{column} {number:g}")
        return number == 1

    def _kind(self, number: float, column: str, percent: bool) -> int:
        """What the numbers of a column are, as far as it is known; a settled reading only looks it up."""
        before = self._kinds.get(column, _TWO)
        own = _MANY if percent or number not in (-1, 0, 1) else _THREE if number == -1 else _TWO
        if self._settled:
            return max(before, own)
        if own > before:
            self._kinds[column] = own
            if (seen := self.numbers.get(column)) and not self.thresholds:
                self.stale |= own == _MANY or 0 in seen.counts  # a zero was read as bad, but beside −1 it is neutral
        seen = self.numbers.get(column)
        if seen is None:
            seen = self.numbers[column] = scales.Numbers()
        seen.add(number)
        return max(before, own)

    # --- the whole data set -------------------------------------------------------------------------------------------

    def misfit(self) -> str:
        """Why the thresholds do not fit the numbers that were read, in a sentence; "" if they do."""
        return scales.misfit(self.numbers, self.good_from, self.bad_to) if self.thresholds else ""

    def scale_columns(self) -> dict[str, dict[float, int]]:
        """Columns whose numbers are, or may be, a scale -> how often each number is there."""
        return {
            column: dict(sorted(seen.counts.items()))
            for column, seen in self.numbers.items()
            if self.thresholds or self._kinds.get(column) == _MANY or spelled(column) in GRADES
        }

    def summary(self) -> str:
        """What a scale's values are and how they were read, or what to do about it; "" if no label is on a scale."""
        said = []
        for column, seen in self.numbers.items():
            if self.thresholds:
                good = f"good above {self.bad_to:g}" if self.good_from is None else f"good from {self.good_from:g}"
                bad = f"bad below {self.good_from:g}" if self.bad_to is None else f"bad to {self.bad_to:g}"
                said.append(f"Column {column} is read as a scale: {good}, {bad}. Values (rows): {seen}.")
            elif self._alone(column, seen):
                said.append(
                    f"Column {column} holds no number but 1 (rows: {seen.counts[1.0]:,}), which may be a yes or the "
                    "worst of five stars, so it is not read as a label. Set --good-from 1 if a 1 is good, or "
                    "--bad-to 1 if it is bad."
                )
            elif spelled(column) in GRADES and self._kinds.get(column, _TWO) != _MANY and 1 in seen.counts:
                low = "0 is bad" if seen.low == 0 else "-1 is bad" if 0 not in seen.counts else "-1 is bad, 0 left out"
                said.append(
                    f"Column {column} is read as yes and no: 1 is good, {low}. Values (rows): {seen}. If it is a "
                    "scale, set good_from and bad_to."
                )
            elif self._kinds.get(column) == _MANY:
                said.append(
                    f"Column {column} is a scale, not yes or no, so none of its numbers is read as a label. Values "
                    f"(rows): {seen}. {scales.advice(seen)}"
                )
        return " ".join(said)


PLAIN = Labels().settled()  # one row alone, without a data set


def parse_label(value: object) -> bool:
    """One value alone as a label. Raises DroppedRow like `Labels.of`."""
    return PLAIN.read(value)


def may_be_many(obj: dict[str, Any]) -> bool:
    """Whether a record has no label of its own, or a list of them: `of_answers` then knows more."""
    given = obj.get(column_of(obj))
    return given is None or isinstance(given, list)


def column_of(obj: dict[str, Any]) -> str:
    """The column that a record's label is read from: the first one it has, an empty one only if there is no other."""
    if "label" in obj:
        return "label"
    there = [c for c in COLUMNS if c in obj]
    return next((c for c in there if obj[c] not in (None, "")), there[0] if there else "label")


def of_answers(obj: dict[str, Any], messages: object, roles: list[str], labels: Labels) -> dict[int, bool | DroppedRow]:
    """Labels of single answers of a conversation: place of the message -> label; {} if the record has one label.

    They stand in a list under ``label``, one for each answer or one for each message, or in the messages themselves.

    Args:
        messages: the messages as they were written.
        roles: their roles as we name them.

    Raises:
        DroppedRow: a list of another length, or more labelled answers than `MOST_ANSWERS`.
    """
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    column, given = column_of(obj), obj.get(column_of(obj))
    columns = dict.fromkeys(answers, column)
    if isinstance(given, list):
        if len(given) == len(answers):
            values = dict(zip(answers, given, strict=True))
        elif len(given) == len(roles):
            values = {i: given[i] for i in answers}
        else:
            raise DroppedRow("not one label for each answer", f"{len(given)} labels, {len(answers)} answers")
    elif given is None and isinstance(messages, list):
        said = [m if isinstance(m, dict) else {} for m in messages]
        columns = {i: column_of(said[i]) for i in answers}
        values = {i: said[i][name] for i, name in columns.items() if name in said[i]}
    else:
        return {}
    values = {i: value for i, value in values.items() if value is not None}
    if len(values) > MOST_ANSWERS:
        raise DroppedRow("too many labelled answers in one conversation", f"{len(values):,}, at most {MOST_ANSWERS}")
    found: dict[int, bool | DroppedRow] = {}
    for i, value in values.items():
        try:
            found[i] = labels.read(value, columns[i])
        except DroppedRow as e:
            found[i] = e
    return found
