"""Which column is which: what is recognized is shown, what the owner says is done, what does not fit is said."""

import json

import pytest

from kto_core import cli
from kto_core.config import column_map, resolving
from kto_core.data import dataset, pages
from kto_core.errors import ConfigError, DataError, MapError

STRANGE = [{"frage": f"Q {i}?", "antwort": f"A {i}.", "urteil": n, "id": i} for i, n in enumerate((5, 1, 4, 2))]
MAP = "prompt=frage,completion=antwort,label=urteil"


def written(folder, rows, name="rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(folder / name)


def read(folder, rows, columns="", **more):
    loaded = dataset.load(written(folder, rows), columns=columns, **more)
    assert [r.label for r in loaded.rows] == loaded.rows.labels  # read again, one by one
    return loaded


def said(loaded):
    return [(r.prompt[-1]["content"], r.completion[0]["content"], r.label) for r in loaded.rows]


def called(capsys, *args) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- what is recognized


@pytest.mark.parametrize(
    "row,mapping",
    [
        ({"prompt": "Q?", "completion": "A.", "label": 1}, {"prompt": ["prompt"], "completion": ["completion"],
          "label": ["label"]}),
        ({"instruction": "Q?", "input": "x", "output": "A.", "kto_tag": True, "system": "S"},
         {"prompt": ["instruction", "input"], "completion": ["output"], "label": ["kto_tag"], "system": ["system"]}),
        ({"Question": "Q?", "Response": "A.", "Rating": "good"},
         {"prompt": ["Question"], "completion": ["Response"], "label": ["Rating"]}),
        ({"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}], "label": 1},
         {"label": ["label"], "messages": ["conversations"]}),
        ({"question": "Q?", "chosen": "A.", "rejected": "B."},
         {"prompt": ["question"], "chosen": ["chosen"], "rejected": ["rejected"]}),
        ({"prompt": "Q?", "chosen": "A.", "rejected": "B."},
         {"prompt": ["prompt"], "chosen": ["chosen"], "rejected": ["rejected"]}),
        ({"prompt": "Q?", "history": [["a", "b"]], "completion": "A.", "label": 1},
         {"prompt": ["prompt"], "completion": ["completion"], "label": ["label"], "history": ["history"]}),
    ],
)  # fmt: skip
def test_what_is_recognized_is_in_the_report(tmp_path, row, mapping):
    report = read(tmp_path, [row]).report
    assert report.mapping == mapping and report.columns == list(row) and not report.mapped
    assert report.to_dict()["mapping"] == mapping


def test_a_file_of_two_forms_names_the_columns_of_both(tmp_path):
    rows = [{"prompt": "Q?", "completion": "A.", "label": 1}] * 2 + [{"question": "Q?", "answer": "A.", "label": 0}]
    assert read(tmp_path, rows).report.mapping["prompt"] == ["prompt", "question"]


# ---- what its owner says


def test_strange_columns_are_read_as_they_are_mapped(tmp_path):
    loaded = read(tmp_path, STRANGE, MAP, good_from=4, bad_to=2)
    assert said(loaded) == [(f"Q {i}?", f"A {i}.", n > 2) for i, n in enumerate((5, 1, 4, 2))]
    report = loaded.report
    assert report.mapping == {"prompt": ["frage"], "completion": ["antwort"], "label": ["urteil"]}
    assert report.mapped == column_map.parse(MAP) and "Column urteil is read as a scale" in report.scale
    assert loaded.rows[0].extra == {"urteil": 5, "id": 0} and dict(report.unused) == {"id": 4}
    shown = pages.preview(loaded.source, good_from=4, bad_to=2, columns=MAP)
    assert [r["label"] for r in shown] == [True, False, True, False]


ROW = {"prompt": "P?", "question": "Q?", "completion": "C.", "answer": "A.", "label": False, "rating": "good"}
TALK = [{"role": "user", "content": "T?"}, {"role": "assistant", "content": "T."}]


@pytest.mark.parametrize(
    "row,columns,outcome",
    [
        (ROW, "", ("P?", "C.", False)),
        (ROW, "prompt=question", ("Q?", "C.", False)),
        (ROW, "completion=answer", ("P?", "A.", False)),
        (ROW, "label=rating", ("P?", "C.", True)),
        (ROW, "prompt=question, completion=answer, label=rating", ("Q?", "A.", True)),
        (ROW | {"chosen": "X", "rejected": "Y"}, "completion=answer", ("P?", "A.", False)),
        (ROW | {"chosen": True}, "label=chosen", ("P?", "C.", True)),
        (ROW | {"messages": TALK}, "messages=messages", ("T?", "T.", False)),
        (ROW | {"mine": TALK}, "messages=mine,label=rating", ("T?", "T.", True)),
        ({"a": "P?", "b": "C.", "rating": "good"}, "prompt=a,completion=b", ("P?", "C.", True)),
        ({"a,b": "P?", " c ": "C.", "x=y": 1}, json.dumps({"prompt": "a,b", "completion": " c ", "label": "x=y"}),
         ("P?", "C.", True)),
        ({"a, b": "P?", "c=d": "C.", "label": 1}, "prompt=a, b,completion=c=d", ("P?", "C.", True)),
    ],
)  # fmt: skip
def test_what_the_owner_says_goes_before_what_is_recognized(tmp_path, row, columns, outcome):
    loaded = read(tmp_path, [row], columns)
    assert said(loaded) == [outcome] and not loaded.report.dropped
    for column, target in {c: t for t, c in column_map.parse(columns).items()}.items():
        assert loaded.report.mapping[target] == [column]


def test_a_pair_is_mapped(tmp_path):
    rows = [{"titel": "Q?", "besser": "A.", "schlechter": "B.", "sys": "S"}]
    loaded = read(tmp_path, rows, "prompt=titel,chosen=besser,rejected=schlechter,system=sys")
    assert said(loaded) == [("Q?", "A.", True), ("Q?", "B.", False)]
    assert [m["role"] for m in loaded.rows[0].prompt] == ["system", "user"]


def test_nothing_is_lost_of_what_is_not_read(tmp_path):
    row = read(tmp_path, [ROW], "prompt=question,completion=answer,label=rating").rows[0]
    assert row.extra == {"original_prompt": "P?", "original_completion": "C.", "original_label": False,
                         "rating": "good"}  # fmt: skip


def test_a_row_without_a_mapped_column_is_dropped_and_counted(tmp_path):
    report = read(tmp_path, [{"a": "Q?", "completion": "A.", "label": 1}, ROW], "prompt=a").report
    assert dict(report.dropped) == {"mapped column missing": 1} and report.issues[0]["detail"] == "a"


def test_one_star_is_no_yes_under_the_name_of_a_label_either(tmp_path):
    rows = [{"prompt": "Q?", "completion": "A.", "Score": 1}] * 2
    report = read(tmp_path, rows, "label=Score").report
    assert not report.kept and "no number but 1" in report.problem


# ---- what does not fit


@pytest.mark.parametrize(
    "columns,why",
    [
        ("prmpt=a", "'prmpt' is none of prompt, completion, label, .* Did you mean prompt"),
        ("prompt", "prompt has no column"),
        ("prompt=a,prompt=b", "prompt is given twice"),
        ("prompt=a,completion=a", "a is given twice"),
        ("{broken", "must be TARGET=COLUMN"),
    ],
)
def test_a_map_that_is_none_is_refused_in_one_sentence(tmp_path, capsys, columns, why):
    with pytest.raises(DataError, match=why):
        dataset.load(written(tmp_path, STRANGE), columns=columns)
    with pytest.raises(ConfigError, match=why):
        resolving.resolve("demo", {"map": columns})
    code, _, err = called(capsys, "data", "check", written(tmp_path, STRANGE), "--map", columns)
    assert code == 1 and len(err.strip().splitlines()) == 1


def test_a_column_that_is_not_there_is_named_and_nothing_is_written(tmp_path, capsys):
    path, out = written(tmp_path, STRANGE), tmp_path / "out.jsonl"
    with pytest.raises(MapError, match="no row has the column fragen. .*frage, antwort, urteil, id"):
        dataset.load(path, columns="prompt=fragen,completion=antwort,label=urteil")
    flags = ("--map", "system=nowhere")
    code, _, err = called(capsys, "data", "convert", path, "--to", "trl", "--out", out, *flags)
    assert code == 1 and "column nowhere" in err and not list(tmp_path.glob("out*"))
    code, _, err = called(capsys, "train", "--preset", "demo", "--data", path, "--dry-run", *flags)
    assert code == 1 and "column nowhere" in err


def test_nothing_recognized_shows_the_command_that_maps(tmp_path, capsys):
    code, _, err = called(capsys, "data", "check", written(tmp_path, STRANGE))
    assert code == 1 and "Found: frage, antwort, urteil, id" in err and f"--map {MAP}" in err
    pair = [{"titel": "Q?", "chosen": "The answer is four.", "rejected": "The answer is five."}]
    code, _, err = called(capsys, "data", "check", written(tmp_path, pair))
    assert code == 1 and "--map prompt=titel." in err


@pytest.mark.parametrize("columns", [{}, {"prompt": "a"}, {"prompt": "a b,label=c", "label": "ü"}, {"label": "x "}])
def test_a_map_as_text_and_back(columns):
    assert column_map.parse(column_map.written(columns)) == columns


# ---- where it is kept


def test_convert_and_train_keep_it(tmp_path, capsys):
    path, out = written(tmp_path, STRANGE), tmp_path / "out.jsonl"
    flags = ("--map", MAP, "--good-from", "4", "--bad-to", "2")
    code, said, _ = called(capsys, "data", "convert", path, "--to", "trl", "--out", out, "--json", *flags)
    assert code == 0 and json.loads(said)["mapping"]["prompt"] == ["frage"]
    kept = json.loads((tmp_path / "out.jsonl.reading.json").read_text())
    assert kept["map"] == MAP and kept["good_from"] == 4 and kept["source"] == path and len(kept["sha256"]) == 64
    again = dataset.load(str(out)).report
    assert (again.desirable, again.undesirable) == (2, 2) and again.mapping["label"] == ["label"]
    code, said, _ = called(capsys, "train", "--preset", "demo", "--data", path, "--dry-run", "--json", *flags)
    found = json.loads(said)
    assert code == 0 and found["train_rows"] == 4 and found["config"]["map"] == MAP
    resolved = resolving.resolve("demo", {"data": path, "map": MAP})
    resolving.save_config(resolved, tmp_path / "config.yaml")
    assert resolving.load_config(tmp_path / "config.yaml").config.reading["columns"] == MAP


def test_check_says_what_was_mapped_and_what_was_recognized(tmp_path, capsys):
    rows = [{"frage": "Q?", "answer": "A.", "rating": word} for word in ("good", "bad")]
    code, out, _ = called(capsys, "data", "check", written(tmp_path, rows), "--map", "prompt=frage")
    assert code == 0 and "prompt = frage*, completion = answer, label = rating (*: given with --map)" in out
