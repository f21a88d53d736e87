"""The documents: links lead somewhere, terms are the glossary's, examples work, figures are measured ones."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PAGES = sorted(p for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/*.md") for p in ROOT.glob(pattern))
PLAIN = [p for p in PAGES if p != GLOSSARY]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def names(pages: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in pages]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(read(path)) if kind == language]


# ---- links ----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them from headings."""
    found: dict[str, int] = {}
    out = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCED.sub("", text), re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        n = found[slug] = found.get(slug, -1) + 1
        out.add(f"{slug}-{n}" if n else slug)
    return out


def broken(page: Path, text: str) -> list[str]:
    """Links of a page to files of the project, or to anchors, that are not there."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    bad = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(read(target))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_somewhere(page):
    assert broken(page, read(page)) == []


def test_a_link_to_nowhere_is_found():
    text = "[a](nothing.md) [b](#no-such) [c](RESULTS.md#nope) [d](RESULTS.md#summary) ![e](../docs/no.png) [f](https://x.y)"
    assert broken(RESULTS, text) == ["nothing.md", "#no-such", "RESULTS.md#nope", "../docs/no.png"]
    page = "# A `b` & c: d\n## Two GPUs\n## Two GPUs\n```\n# no\n```\n"
    assert anchors(page) == {"a-b--c-d", "two-gpus", "two-gpus-1"}


def test_headings_that_the_code_names_are_there():
    headings = {h.strip() for h in re.findall(r"^#+ (.+)$", read(RESULTS), re.M)}
    named = {}
    for folder in ("kto_core", "kto_studio", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for heading in re.findall(r'`RESULTS\.md`, "([^"]+)"', re.sub(r"\s+(# )?", " ", read(path))):
                named[heading] = path.name
    assert "Where the time of a step goes" in named
    assert {h: name for h, name in named.items() if h not in headings} == {}


def test_pages_are_linked_from_the_readme_or_from_each_other():
    linked = {
        (page.parent / unquote(link).partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s:]+)\)", read(page))
    }
    assert [p for p in (ROOT / "docs").glob("*.md") if p not in linked] == []


# ---- words ----------------------------------------------------------------------------------------------------------


def unwanted() -> list[str]:
    """The glossary's second column."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in read(GLOSSARY).splitlines() if line.startswith("|")]
    assert all(len(row) == 3 for row in rows)
    words = [w.strip() for row in rows if row[0] != "Term" for w in row[1].split(";") if not set(row[1]) <= set("- ")]
    return [w for w in words if w]


def said(text: str, words: list[str]) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    prose = " ".join(re.sub(r"\]\([^)]*\)", "]", prose).split()).lower()
    return [w for w in words if re.search(rf"(?<!\w){re.escape(w.lower())}(?!\w)", prose)]


@pytest.mark.parametrize("page", PLAIN, ids=names(PLAIN))
def test_a_page_uses_the_glossarys_terms(page):
    assert said(read(page), unwanted()) == []


REASONS = {"prompt cut from the left", "label not understood"}  # kept as they are: other programs count by them


def texts(path: Path) -> list[str]:
    """The texts of a module that a person may read: every string of several words that is no docstring."""
    nodes = list(ast.walk(ast.parse(read(path))))
    docs = {
        id(n.body[0].value)
        for n in nodes
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and isinstance(n.body[0], ast.Expr)
    }
    strings = [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]
    return [n.value for n in strings if " " in n.value and n.value not in REASONS]


@pytest.mark.parametrize("folder", ["kto_core", "kto_studio"])
def test_page_terminal_and_errors_use_the_glossarys_terms(folder):
    """Labels, help texts, messages and errors stand in the code as strings."""
    words, found = unwanted(), {}
    for path in (ROOT / folder).rglob("*.py"):
        if bad := [(text[:80], w) for text in texts(path) for w in said(text, words)]:
            found[str(path.relative_to(ROOT))] = bad
    assert found == {}


def test_settings_presets_use_the_glossarys_terms():
    words = unwanted()
    assert {p.name: bad for p in (ROOT / "presets").glob("*.yaml") if (bad := said(read(p), words))} == {}


def test_an_unwanted_word_in_a_module_is_found(tmp_path):
    module = tmp_path / "m.py"
    module.write_text(
        '"""A data set."""\ndef f(n):\n    "a data set"\n    return f"read the data set {n}", "dataset"\n'
    )
    assert texts(module) == ["read the data set "] and said(texts(module)[0], unwanted()) == ["data set"]


def test_an_unwanted_word_is_found():
    assert len(unwanted()) > 60
    text = "A data\nset that `goes on`, on the [card](x.md).\n```\nmend it\n```\nHalf up to 54. Foretold!"
    assert set(said(text, unwanted())) == {"data set", "half up to", "foretold"}


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").split()) < 1000


# ---- examples -------------------------------------------------------------------------------------------------------

EXAMPLES = [
    line
    for page in (ROOT / "README.md", ROOT / "docs" / "data-formats.md")
    for block in blocks(page, "json")
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_row_is_read_whole(line):
    from kto_core.data.importers import known
    from kto_core.data.records import rows

    obj = json.loads(line)
    records = list(known.plain(obj))  # a program's export is more than one where an answer was corrected
    assert len(records) == (2 if "correction" in obj.get("responses", ()) else 1)
    worse = next((obj[k] for k in ("rejected", "rejected_response", "completions") if k in obj), [])
    worse = worse or (obj["output"] if isinstance(obj.get("output"), list) else [])
    several = isinstance(worse, list) and worse and "role" not in worse[0]
    answers = len(worse) + ("chosen" in obj) if several else 2 if worse else 1
    parsed = [rows.parse(r, 1) for r in records]
    assert all(len(found) == answers for found, _, _ in parsed)
    changes = [c for _, _, some in parsed for c in some]
    assert not [c for c in changes if "left out" in c or "dropped" in c or "removed" in c]


def test_the_documented_labels_are_understood():
    from kto_core.data.records.rows import parse_label

    table = read(ROOT / "docs" / "data-formats.md").partition("## Labels")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    for label, column in ((True, 0), (False, 1)):
        values = [json.loads(v) for row in rows for v in re.findall(r"`([^`]+)`", row[column])]
        assert len(values) >= 7 and all(parse_label(v) is label for v in values)


def test_the_example_table_is_read(tmp_path):
    from kto_core.data import dataset

    (block,) = blocks(ROOT / "docs" / "data-formats.md", "csv")
    (tmp_path / "rows.csv").write_text(block, encoding="utf-8")
    report = dataset.load(str(tmp_path / "rows.csv")).report
    assert (report.rows, report.desirable, report.undesirable) == (2, 1, 1)


def commands() -> list[list[str]]:
    """The arguments of every `python -m kto_core …` in a code block."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("python -m kto_core ")]


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_every_example_command_is_valid(argv):
    from kto_core import cli

    cli.parser(argv).parse_args(argv)


def test_every_command_has_an_example():
    import argparse

    from kto_core import cli

    def paths(parser: argparse.ArgumentParser, way: tuple[str, ...] = ()):
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not below:
            yield way
        for action in below:
            for name, child in action.choices.items():
                yield from paths(child, (*way, name))

    page = "\n".join(blocks(ROOT / "docs" / "command-line.md", "bash"))
    there = list(paths(cli.parser()))
    assert len(there) > 10
    assert [way for way in there if f"python -m kto_core {' '.join(way)}" not in page] == []


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_readmes_presets_are_the_files():
    from kto_core.config import resolving

    table = read(ROOT / "README.md").partition("## Presets")[2].partition("\n## ")[0]
    rows = {c[0]: c[1:] for c in ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()) if c}
    columns = [(i, name) for i, names in enumerate(rows[""]) for name in names.split("/")]  # two may share one
    for i, name in columns:
        c = resolving.resolve(name, {}).config
        shown = {
            "batch × accumulation": f"{c.per_device_train_batch_size}×{c.gradient_accumulation_steps}",
            "LoRA r / alpha": f"{c.r}/{c.lora_alpha}",
            "beta": f"{c.beta:g}",
            "max length": str(c.max_length),
        }
        assert {k: rows[k][i] for k in shown} == shown, name
    assert [name for _, name in columns] == list(resolving.presets())


@pytest.mark.parametrize("name", ["README.md", "docs/engine.md", "docs/several-gpus.md", "docs/tour.md"])
def test_a_figure_in_a_table_is_one_of_the_results(name):
    """Rounded or as it is, and not a figure that nobody measured."""
    text = FENCED.sub("", read(ROOT / name)).partition("## Presets")
    prose = text[0] + text[2].partition("\n## ")[2]  # the presets are checked above
    measured = re.findall(r"\d+\.\d+", read(RESULTS))
    for figure in re.findall(r"^\|.*?$", prose, re.M):
        for value in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", figure):
            digits = len(value.partition(".")[2])
            assert any(round(float(m) + 1e-9, digits) == float(value) for m in measured), (value, figure)
