"""The picture of the measured speeds."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# ---- picture.py -----------------------------------------------------------------------------------------------------


def test_the_picture_is_what_the_figures_make():
    """Whoever changes the figures draws it anew: `python benchmarks/picture.py`."""
    import picture

    assert picture.OUT.read_text(encoding="utf-8") == picture.draw(json.loads(picture.DATA.read_text(encoding="utf-8")))


def test_the_pictures_figures_are_those_of_the_results():
    import picture

    figures = json.loads(picture.DATA.read_text(encoding="utf-8"))
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for bar in figures["bars"]:
        assert f"| {bar['rows_per_s']:.2f} | {bar['tokens_per_s']:,} |" in results, bar["name"]
    for key in ("date", "versions", "command"):
        assert figures[key] in results.replace("\n", " ")


def test_a_picture_has_bars_in_proportion_and_says_them_in_words(tmp_path):
    import xml.etree.ElementTree as ET

    import picture

    bars = [{"name": "A & B", "rows_per_s": 2, "peak_gib": 1}, {"name": "C", "rows_per_s": 8, "peak_gib": 2}]
    figures = {"title": "T <1>", "unit": "rows a second", "date": "D", "machine": "M", "bars": bars}
    (tmp_path / "f.json").write_text(json.dumps(figures))
    assert picture.main(["--data", str(tmp_path / "f.json"), "--out", str(tmp_path / "p.svg")]) == 0
    svg = "{http://www.w3.org/2000/svg}"
    root = ET.parse(tmp_path / "p.svg").getroot()
    first, second = (float(r.get("width")) for r in root.iter(f"{svg}rect") if r.get("class") != "ground")
    assert second == pytest.approx(4 * first) and root.find(f"{svg}title").text == "T <1>: rows a second"
    assert root.find(f"{svg}desc").text == "Bar chart, rows a second: A & B 2.0; C 8.0."
    assert any("(4.0×), 2.0 GiB" in "".join(t.itertext()) for t in root.iter(f"{svg}text"))


def test_the_pictures_colours_can_be_told_from_the_ground():
    import re

    import picture

    def contrast(a: str, b: str) -> float:
        def light(colour: str) -> float:
            parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

        return max(light(a), light(b)) / min(light(a), light(b))

    for theme in picture.STYLE.split("@media"):
        colours = dict(re.findall(r"(\.?\w+) \{[^}]*(?:fill|stroke): (#\w{6})", theme))
        assert len(colours) == 6
        for name, colour in colours.items():
            least = {"text": 7, ".note": 7, ".ground": 1}.get(name, 3)
            assert contrast(colour, colours[".ground"]) >= least, (name, colour)
