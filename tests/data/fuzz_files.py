"""Coverage-guided fuzzing of data files: ``python tests/fuzz_files.py CORPUS_FOLDER [-max_total_time=600]``.

Any bytes under any name: a report whose sums hold, or a DataError; everything else stops the fuzzer, which then writes
the input. Flags are libFuzzer's. Needs atheris, of requirements-dev.txt.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import atheris  # noqa: E402

OURS = [
    "kto_core.data.records.rows",
    "kto_core.data.records.turns",
    "kto_core.data.records.columns",
    "kto_core.data.records.rendered",
    "kto_core.data.records.sides",
    "kto_core.data.reading.sources",
    "kto_core.data.reading.tables",
    "kto_core.data.report",
    "kto_core.data.dataset",
]
with atheris.instrument_imports(include=OURS):
    from tests.data.test_data_fuzz import FILES, read

SEEDS = [
    b'{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "c", "label": false}\n',
    b'[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": "no"}]',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": 1}\r\n',
    b'\xef\xbb\xbf{"chosen": [{"role": "assistant", "content": "x"}], "rejected": "y", "prompt": [{}]}\n',
    b'prompt,completion,label\r\n"a\nb",c,yes\r\n,,\r\n',
    b"\x1f\x8b\x08\x00",
]


def one(data: bytes) -> None:
    """The first byte chooses the file's name."""
    if data:
        read(FILES[data[0] % len(FILES)], data[1:])


def main() -> None:
    folders = [Path(a) for a in sys.argv[1:] if not a.startswith("-")]
    if not folders:
        raise SystemExit(__doc__)
    folders[0].mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(SEEDS):
        for kind in range(len(FILES)):
            (folders[0] / f"seed-{i}-{kind}").write_bytes(bytes([kind]) + seed)
    atheris.Setup([*sys.argv, f"-artifact_prefix={folders[0]}/found-"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
