"""Rows written again, and the table: nothing is lost, every way of searching finds."""

import gzip
import json
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from row_files import KINDS, ROOT, jsonl, write

from kto_core.data import dataset, pages
from kto_core.data.reading import json_text
from kto_core.errors import DataError, DiskError

# --- saving ---


@pytest.mark.parametrize("name", ["nexus_behaviors.jsonl", "truthfulqa_kto.jsonl", "sharegpt_pairs.json"])
def test_convert_both_ways_loses_nothing(tmp_path, shared_data, name):
    first = dataset.convert(shared_data / name, "trl", tmp_path / "a.jsonl")
    dataset.convert(tmp_path / "a.jsonl", "chatml", tmp_path / "b.jsonl.gz")
    dataset.convert(tmp_path / "b.jsonl.gz", "trl", tmp_path / "c.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    again = dataset.load(tmp_path / "b.jsonl.gz").rows
    assert len(again) == first.report.kept
    for a, b in zip(first.rows, again, strict=True):
        assert replace(a, line=0) == replace(b, line=0)
    assert set(json.loads(gzip.decompress((tmp_path / "b.jsonl.gz").read_bytes()).splitlines()[0])) >= {
        "conversations", "label",
    }  # fmt: skip
    assert not list(tmp_path.glob("*.part"))


def test_save_refuses_and_cleans_up(tmp_path, monkeypatch):
    loaded = dataset.load(KINDS["a.jsonl"](tmp_path / "a.jsonl"))
    for form, out in (("alpaca", "b.jsonl"), ("trl", "b.csv"), ("trl", "b.parquet")):
        with pytest.raises(DataError):
            dataset.save(loaded.rows, tmp_path / out, form)
    with pytest.raises(DiskError):
        dataset.save(loaded.rows, tmp_path / "a.jsonl" / "b.jsonl")
    dataset.save(loaded.rows, tmp_path / "a.jsonl", "chatml")  # over its own source
    assert len(dataset.load(tmp_path / "a.jsonl").rows) == 9

    def full(obj):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json_text, "encode", full)
    with pytest.raises(DiskError, match="No space left"):
        dataset.save(loaded.rows, tmp_path / "d.jsonl")
    assert not list(tmp_path.glob("d.jsonl*"))


# --- the table ---


def test_page(shared_data):
    rows = dataset.load(shared_data / "nexus_behaviors.jsonl").rows
    start = time.process_time()  # of this process: the machine may have other work
    found, total = pages.page(rows, 0, search="delete")
    assert time.process_time() - start < 0.3
    every = [i for i, r in enumerate(rows) if "delete" in json.dumps([r.prompt, r.completion, r.extra]).lower()]
    assert total == len(every) and [r["index"] for r in found] == every[:50]
    found = [pages.page(rows, p, search="DELETE")[0] for p in range(total // 50 + 1)]
    assert [r["index"] for p in found for r in p] == every
    good, n = pages.page(rows, 2, 10, label=True)
    assert n == 2284 and len(good) == 10 and all(r["label"] is True for r in good)
    bad, m = pages.page(rows, 0, 50, "delete", False)
    assert m + pages.page(rows, 0, 50, "delete", True)[1] == total
    assert pages.page(rows, 999) == ([], 4570) and pages.page(rows, search="no such words here")[1] == 0
    assert pages.page(list(rows), 1, 7, "delete", None) == (pages.page(rows, 1, 7, "delete")[0], total)
    call = next(r for r in pages.page(rows, 0)[0] if r["tools"])
    assert call["completion"] and call["turns"] >= 2 and call["line"] >= 1 and isinstance(call["system"], bool)


@pytest.mark.parametrize("needle", ["café", "CAFÉ", "ß", "strasse", "a/b", 'say "x"', "tab\t", "€", "kelvin", "1.5"])
def test_search_finds_what_is_written_in_any_way(tmp_path, needle):
    texts = ["Café", "straße STRASSE", "a/b", 'say "x"', "tab\there", "5 € \u212aelvin"]
    objects = [{"prompt": t, "completion": "A.", "label": True, "score": 1.5} for t in texts]
    rows = dataset.load(jsonl(tmp_path / "a.jsonl", objects)).rows  # with \u escapes
    raw = dataset.load(write(tmp_path / "b.jsonl", "\n".join(json.dumps(o, ensure_ascii=False) for o in objects))).rows
    want = pages.page(list(rows), search=needle)
    assert pages.page(rows, search=needle) == pages.page(raw, search=needle) == want and want[1]


# --- size ---


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """500 MB of JSONL: check under 60 s and 2 GiB, first page of the preview under 3 s."""
    rng, words = random.Random(1), ["the", "model", "answers", "briefly", "when", "asked", "about", "rows", "of", "it"]
    with open(tmp_path / "a.jsonl", "w") as f:
        for i in range(1_000_000):
            p, c = " ".join(rng.choices(words, k=40)), " ".join(rng.choices(words, k=40))
            f.write(json.dumps({"prompt": f"{i} {p}", "completion": c, "label": i % 3 > 0, "n": i % 7}) + "\n")
    code = (
        "import resource, sys, time; from kto_core.data import dataset, pages; s = time.monotonic();"
        "assert len(pages.preview(sys.argv[1])) == 50; first = time.monotonic() - s;"
        "loaded = dataset.load(sys.argv[1]); assert loaded.report.kept == 1_000_000; loaded.report.to_dict();"
        "print(first, time.monotonic() - s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "a.jsonl"], check=True, capture_output=True, cwd=ROOT)
    first, whole, gib = map(float, told.stdout.split())
    assert first < 3 and whole < 60 and gib < 2
