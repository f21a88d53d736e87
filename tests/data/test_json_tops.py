"""JSON files and table cells as people have them: rows under a key or by columns, messages in a cell."""

import json

import pytest
from program_exports import DUNNO, NILE, PROMPT, loaded, said

from kto_core.data import dataset

# --- tops of JSON files -----------------------------------------------------------------------------------------------

COLUMNS = {"prompt": ["Name a river.", "Name a river."], "completion": ["The Nile.", "Dunno."], "label": [True, False]}
ROWS = [dict(zip(COLUMNS, r, strict=True)) for r in zip(*COLUMNS.values(), strict=True)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "top",
    [
        {"rows": ROWS},
        {"version": "1", "records": ROWS},
        {"features": [], "rows": [{"row_idx": i, "row": r, "truncated_cells": []} for i, r in enumerate(ROWS)]},
        COLUMNS,
        {k: {str(i): v for i, v in enumerate(c)} for k, c in COLUMNS.items()},
        {"columns": list(COLUMNS), "index": [0, 1], "data": [list(r.values()) for r in ROWS]},
    ],
    ids=["rows", "records", "viewer", "columns", "pandas", "split"],
)
def test_rows_under_a_key_and_by_columns(tmp_path, top, indent):
    assert said(loaded(tmp_path, json.dumps(top, indent=indent)).rows) == [NILE, DUNNO]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]},
        {"messages": [*PROMPT, {"role": "assistant", "content": "x"}], "label": True, "rows": [1]},
    ],
)  # fmt: skip
def test_one_record_with_lists_stays_one_record(tmp_path, row):
    assert loaded(tmp_path, row).report.kept == (2 if "chosen" in row else 1)


# --- messages in cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': \"It's\"} {'role': 'assistant', 'content': 'a } {b'}]",
        "[{'role': 'user', 'content': \"It's\"}\n {'role': 'assistant', 'content': 'a } {b'}]",
        "array([{'role': 'user', 'content': \"It's\"},\n {'role': 'assistant', 'content': 'a } {b'}], dtype=object)",
        "[{'role': 'user', 'content': \"It's\"}, {'role': 'assistant', 'content': 'a ' '} {b'}]",
        '[{"role": "user", "content": "It\'s"}, {"role": "assistant", "content": "a } {b"}]',
    ],
    ids=["blank", "line", "array", "python", "json"],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_messages_in_a_cell(tmp_path, cell, kind):
    import pandas

    path = tmp_path / f"t.{kind}"
    frame = pandas.DataFrame({"messages": [cell], "label": [True]})
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    (row,) = dataset.load(str(path)).rows
    assert (row.prompt[0]["content"], row.completion[0]["content"]) == ("It's", "a } {b")


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': 'a'} ... {'role': 'user', 'content': 'b'}]",
        "[{'role': 'user', 'content': open('/etc/passwd')}]",
        "[{'role': 'user', 'content': " + "[" * 5000 + "]",
    ],
)
def test_messages_that_cannot_be_read_are_no_text(tmp_path, cell):
    import pandas

    path = tmp_path / "t.csv"
    pandas.DataFrame({"prompt": [cell], "completion": ["x"], "label": [True]}).to_csv(path, index=False)
    assert dataset.load(str(path)).report.dropped == {"messages in a cell cannot be read; save the data as JSONL": 1}


@pytest.mark.parametrize(
    "text", ["[1] see", '{"role": 1}', "[{'a': 1}]", "array of things", "[{'role': 'x'}] is a list"]
)
def test_other_text_in_a_cell_stays_text(tmp_path, text):
    import pandas

    path = tmp_path / "t.csv"
    pandas.DataFrame({"prompt": ["Hi"], "completion": [text], "label": [True]}).to_csv(path, index=False)
    assert dataset.load(str(path)).rows[0].completion[0]["content"] == text
