"""Small files of rows, and what holds for the report of each."""

import csv
import gzip
import json
from pathlib import Path

from kto_core.data.reading import sources

OBJECTS = [
    {"prompt": f"What is {i}?", "completion": f"It is {i} ☂.", "label": i % 3 > 0, "category": "numbers"}
    for i in range(9)
]
ROOT = Path(sources.__file__).parents[3]
LINES = [json.dumps(o, ensure_ascii=False) for o in OBJECTS]


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(path: Path, objects) -> Path:
    return write(path, "".join(json.dumps(o) + "\n" for o in objects))


def sums_hold(report) -> bool:
    found = report.to_dict()
    drops = sum(1 for i in report.issues if i["kind"] == "dropped")
    return (
        found["rows"] == found["kept"] + sum(found["dropped"].values())
        and found["kept"] == found["desirable"] + found["undesirable"] == len(report.row_lengths)
        and drops == sum(found["dropped"].values())
    )


def as_csv(path: Path, **how) -> Path:
    with open(path, "w", encoding=how.pop("encoding", "utf-8"), newline="") as f:
        writer = csv.DictWriter(f, list(OBJECTS[0]), **how)
        writer.writeheader()
        writer.writerows(OBJECTS)
    return path


def as_parquet(path: Path, objects) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), path)
    return path


KINDS = {
    "a.jsonl": lambda p: write(p, "\n".join(LINES)),
    "crlf.jsonl": lambda p: write(p, "\r\n".join(LINES) + "\r\n\r\n"),
    "bom.jsonl": lambda p: write(p, b"\xef\xbb\xbf" + "\n".join(LINES).encode()),
    "utf16.jsonl": lambda p: write(p, "\n".join(LINES).encode("utf-16")),
    "blank.jsonl": lambda p: write(p, "\n\n" + "\n \n".join(LINES) + "\n\n"),
    "a.jsonl.gz": lambda p: write(p, gzip.compress("\n".join(LINES).encode())),
    "noname.gz": lambda p: write(p, gzip.compress("\n".join(LINES).encode())),
    "list.json": lambda p: write(p, json.dumps(OBJECTS, indent=1)),
    "bom.json": lambda p: write(p, b"\xef\xbb\xbf" + json.dumps(OBJECTS).encode()),
    "data.json": lambda p: write(p, json.dumps({"data": OBJECTS})),
    "version.json": lambda p: write(p, json.dumps({"version": "x" * 9000, "data": OBJECTS})),
    "lines.json": lambda p: write(p, "\n".join(LINES)),
    "list.jsonl": lambda p: write(p, json.dumps(OBJECTS)),
    "pretty.jsonl": lambda p: write(p, json.dumps(OBJECTS, indent=2)),
    "list.json.gz": lambda p: write(p, gzip.compress(json.dumps(OBJECTS).encode())),
    "lines.txt": lambda p: write(p, "\n".join(LINES)),
    "a.csv": as_csv,
    "semicolon.csv": lambda p: as_csv(p, delimiter=";"),
    "excel.csv": lambda p: as_csv(p, delimiter="\t", encoding="utf-16"),
    "bom.csv": lambda p: as_csv(p, encoding="utf-8-sig"),
    "a.csv.gz": lambda p: write(p, gzip.compress(as_csv(p.with_name("plain.csv")).read_bytes())),
    "a.parquet": lambda p: as_parquet(p, OBJECTS),
}
