"""Small exports of other programs, and what is read from them."""

import json
from pathlib import Path

from kto_core.data import dataset

CASES = Path(__file__).parent / "cases"
THUMB = {"role": "user", "content": "Name a river."}
SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = [{"role": "user", "content": "Name a river."}]
NILE = ("Name a river.", "The Nile.", True)
DUNNO = ("Name a river.", "Dunno.", False)


def said(rows):
    return [(r.prompt[-1]["content"], r.completion[0]["content"], r.label) for r in rows]


def loaded(tmp_path, content, name="export.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return dataset.load(str(path))


def argilla(**responses):
    given = {k: [{"value": x, "user_id": "u"} for x in v] for k, v in responses.items()}
    return {"id": "1", "status": "completed", "fields": {"prompt": "Name a river.", "response": "Dunno."},
            "responses": given}  # fmt: skip
