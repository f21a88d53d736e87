"""The table of runs and the chosen ones beside each other as HTML: what is asked for, escaped texts, curves."""

import json
import re

import pytest

from kto_core import labels
from kto_core.compare import facts as facts_of_runs
from kto_core.compare.facts import Facts
from kto_core.config import resolving
from kto_core.errors import ConfigError
from kto_core.runs import run_list
from kto_core.runs.events import RunState, fold
from kto_studio.runs import beside, tab
from kto_studio.runs.view import MOST, PAGE, View, drawn
from kto_studio.shared import live, readings
from kto_studio.train import form as train_form
from kto_studio.train import from_config
from tests.support import bad_runs

EVIL = '<img src=x onerror="window.pwned=1">\'&'
ROWS = [
    Facts("a", "One", "finished", 3, 3, "rows.jsonl", "demo", "demo", (("beta", "0.2"),), 1e-4, 0.3, 0.4, 1.5,
          (1.0, 2.0), "better", 75.0, 9.5, ("best",), "keep", 1.7e9),
    Facts("b", state="stopped", step=2, total_steps=9, started=1.8e9),
    Facts("c", problem="config.yaml: broken", started=1.6e9),
]  # fmt: skip


def ids(html: str) -> list[str]:
    return re.findall(r'data-run="([^"]*)"', html)


# ---- the view


@pytest.mark.parametrize("text", [None, 5, "", "{", "[]", "null", "[" * 10**5,
    '{"sort": 5, "page": "x", "chosen": 7}', '{"sort": "id", "down": false, "state": "<b>"}',
    '{"chosen": [1, {}, null]}',
])  # fmt: skip
def test_a_view_of_anybody_is_the_one_at_the_beginning(text):
    assert View.read(text) == View()


def test_a_view_survives_the_page_and_has_bounds():
    made = View("margin", False, 3, "failed", "best", ("a", "b"), 7)
    assert View.read(made.text()) == made
    many = json.dumps({"chosen": [f"r{i}" for i in range(30)] + ["r1"], "page": 10**9, "n": 3})
    assert len(View.read(many).chosen) == MOST and 'data-run="a"' in drawn(View.read(many), ROWS)


# ---- the table


def test_a_table_shows_what_is_asked_for():
    assert ids(drawn(View(), ROWS)) == ["b", "a", "c"], "newest first"
    assert ids(drawn(View("margin"), ROWS))[0] == "a"
    assert ids(drawn(View(tag="best"), ROWS)) == ["a"] and ids(drawn(View(state="stopped"), ROWS)) == ["b"]
    assert ids(drawn(View(), ROWS, "KEEP one")) == ["a"] and "No run matches" in drawn(View(), ROWS, "nothing")
    shown = drawn(View("margin", chosen=("b",)), ROWS)
    assert 'aria-sort="descending"' in shown and shown.count(" checked") == 1
    for text in ("1e-4", "+1.5", "+1 to +2", "better", "9.5 GiB", "1 min 15 s", "#best", "cannot be read: config.yaml"):
        assert text in shown, text
    assert "No run yet" in drawn(View(), [])


def test_thousands_of_runs_are_pages():
    rows = [Facts(f"r{i}", started=float(i)) for i in range(5000)]
    first, last = drawn(View(), rows), drawn(View(page=10**6), rows)
    assert len(ids(first)) == PAGE and ids(first)[0] == "r4999" and ids(last)[-1] == "r0"
    assert "page 1 of 100" in first and 'data-value="2"' in first and "page 100 of 100" in last
    assert len(first) < 100_000


def test_text_of_a_run_is_text():
    row = Facts(EVIL, EVIL, "finished", data=EVIL, model=EVIL, changed=((EVIL, EVIL),), verdict="better", tags=(EVIL,),
                note=EVIL)  # fmt: skip
    bad = Facts(EVIL, EVIL, problem=EVIL)
    shown = drawn(View(chosen=(EVIL,), tag=EVIL), [row, bad]) + beside.cards([row, bad], [EVIL, ""])
    shown += beside.plot([row], [RunState()], "loss", "step") + beside._answers(EVIL, EVIL, [EVIL, "x" + EVIL, None])
    assert "<img" not in shown and 'onerror="' not in shown and "&lt;img" in shown


# ---- beside each other


def a_run(folder, beta: float = 0.5, **settings):
    made = bad_runs.make(folder)
    resolving.save_config(
        resolving.resolve("demo", {"data": "rows.jsonl", "beta": beta} | settings), made / "config.yaml"
    )
    return made


def test_only_what_differs_is_a_line_and_one_run_needs_none(runs_dir):
    for name, beta in (("a", 0.1), ("b", 0.2)):
        a_run(runs_dir / name, beta)
    live.forget()
    facts, runs = tab._chosen(View(chosen=("a", "b", "gone")).text())
    shown = beside.details(facts, runs)
    assert [f.id for f in facts] == ["a", "b"] and "<code>beta</code>" in shown and "<code>r</code>" not in shown
    assert "Settings that differ" not in beside.details(facts[:1], runs[:1])
    a_run(runs_dir / "c", 0.2)
    live.forget()
    assert "are the same" in beside.details(*tab._chosen(View(chosen=("b", "c")).text()))


def curve_of(html: str) -> dict:
    return json.loads(re.search(r'data-curve="([^"]*)"', html)[1].replace("&quot;", '"'))


def test_curves_lie_over_each_other_by_step_or_by_time():
    states = [
        fold([{"t": 1.7e9 + i * pace, "kind": "metric", "step": i, "loss": v} for i, v in enumerate(values)])
        for pace, values in ((60.0, [0.5, 0.4, 0.3, None, 0.2, 0.1]), (10.0, [0.5, float("nan"), 0.45]))
    ]
    told = curve_of(beside.plot(ROWS[:2], states, "loss", "step"))
    assert [(line[0], line[2]) for line in told["lines"]] == [("One", [0, 1, 2, 4, 5]), ("b", [0, 2])]
    assert len({line[1] for line in told["lines"]}) == 2
    told = curve_of(beside.plot(ROWS[:2], states, "loss", "time"))
    assert told["x"] == "minutes" and [line[2] for line in told["lines"]] == [[0, 1, 2, 4, 5], [0, 0.33]]
    assert "no value of kl" in beside.plot(ROWS[:2], states, "kl", "step")
    assert (
        "Loss" in beside.plot(ROWS[:1], states[:1], "no such metric", "?") and beside.plot([], [], "loss", "step") == ""
    )


# ---- ticks


def test_a_tick_sends_only_what_is_new(runs_dir, monkeypatch):
    monkeypatch.setattr(run_list, "BUDGET", 60)
    a_run(runs_dir / "a")
    a_run(runs_dir / "b")
    live.forget()
    view, chosen = View().text(), View(chosen=("a",), n=3).text()
    live.table().facts()
    key = tab._table_key(view, "")
    assert tab._table_key(view, "") == key and tab._table_key(chosen, "") == key, "a choice does not draw the table"
    assert tab._table_key(view, "x") != key and tab._table_key(View(page=2).text(), "") != key
    before = tab._cards_key(chosen)
    labels.change(runs_dir / "a", add=["new"])
    live.forget()
    assert tab._table_key(view, "") != key and tab._cards_key(chosen) != before
    assert "#new" in tab._table(view, "")[0] and "#new" in tab._cards(chosen)[1]


# ---- start from these settings


def test_a_runs_settings_fill_the_form(runs_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("")
    source = str(tmp_path / "data" / "rows.jsonl")
    overrides = {"data": source, "beta": 0.2, "learning_rate": 3e-5, "model": "owner/name", "verdict": False,
                 "run_name": "old", "target_modules": ["q_proj"], "good_from": 4.0}  # fmt: skip
    config = resolving.resolve("3b", overrides).config
    form = from_config.form(config)
    assert form["preset"] == "3b" and form["model"] == "owner/name" and "run_name" not in form["values"]
    found = from_config.data_id(config)
    assert found == "file:rows.jsonl" and from_config.remarks(config, found) == []
    assert readings.of(found) == {"good_from": 4.0}, "as the run read it, where nothing else was said"
    again = train_form.resolve(train_form.restore(form), found).config
    assert again.model_dump(exclude={"run_name"}) == config.model_dump(exclude={"run_name"})
    readings.keep(found, good_from=5.0)
    assert (
        "other columns or thresholds" in from_config.remarks(config, found)[0] and readings.of(found)["good_from"] == 5
    )


def test_what_does_not_come_along_is_said(runs_dir):
    config = resolving.resolve("demo", {"data": "/elsewhere/x.jsonl", "adapter": "/gone/adapter"}).config
    found = from_config.data_id(config)
    first, second = from_config.remarks(config, found)
    assert found == "" and "x.jsonl" in first and "/elsewhere" not in first and "adapter" in second
    assert from_config.form(config)["adapter"] == ""
    a_run(runs_dir / "base")
    config = resolving.resolve(
        "demo", {"data": "owner/set", "data_split": "test", "adapter": str(runs_dir / "base/adapter")}
    )
    assert from_config.data_id(config.config) == "hub:owner/set@test"
    assert from_config.form(config.config)["adapter"] == "base"


@pytest.mark.parametrize("text", ["preset: /etc/passwd.yaml\n", "preset: [a]\n", "preset: ../demo.yaml\n", "- 1\n",
                                  "beta: 99\n"])  # fmt: skip
def test_a_file_that_a_page_sends_names_no_other_file(tmp_path, text):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        from_config.read(str(file))
    file.write_text("preset: 3b\nbeta: 0.2\nrun_name: mine\n")
    form = from_config.form(from_config.read(str(file)), name=True)
    assert form["preset"] == "3b" and form["values"] == {"beta": 0.2, "run_name": "mine"}


def test_a_page_asks_little_of_thousands_of_runs(monkeypatch, runs_dir):
    """What is chosen is looked at, not all runs."""
    for i in range(6):
        a_run(runs_dir / f"r{i}")
    live.forget()
    live.table().facts()
    asked = []
    real = facts_of_runs.Table._fact
    monkeypatch.setattr(
        facts_of_runs.Table, "_fact", lambda self, run, end: asked.append(run.id) or real(self, run, end)
    )
    view = View(chosen=("r1", "r2")).text()
    tab._cards_key(view), tab._details_key(view), tab._plot_key(view, "loss", "step"), tab._table_key(view, "")
    assert set(asked) == {"r1", "r2"}
