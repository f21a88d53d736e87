"""Train, chat, export, again and again in one process: its memory comes back. Run as a script it is that process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import make_data, resolved

ROOT = Path(__file__).resolve().parents[2]
WARM = 2  # rounds after which libraries, caches and thread stacks are there


def rounds(model: str, data: str, count: int, export: bool) -> list[float]:
    """MiB that the process holds after each round."""
    import psutil

    from kto_core.chat import chat
    from kto_core.runs import folders
    from kto_core.training import start as starting

    held = []
    for _ in range(WARM + count):
        for engine in ("trl", "packed"):
            run = folders.create(resolved(model, data, max_steps=3, engine=engine, learning_rate=1e-4))
            starting.start(run, block=True)
            assert run.state().state == "finished", run.state().error
        loaded = chat.load(run)
        assert "".join(loaded.stream([{"role": "user", "content": "Hi"}], max_new_tokens=8, temperature=0)) is not None
        loaded.unload()
        assert chat.current() is None
        if export:
            from kto_core.export.export import merge

            merge(run)
        folders.delete(run)
        held.append(psutil.Process().memory_info().rss / 2**20)
        print(f"{held[-1]:.1f} MiB", file=sys.stderr, flush=True)
    return held


def measured(model, data, count, export) -> list[float]:
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(data), str(count), str(int(export))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def require_flat(held: list[float]) -> None:
    assert held[-1] <= 1.05 * held[WARM - 1], [round(h) for h in held]


def test_three_rounds(tiny_model, tmp_path):
    require_flat(measured(tiny_model, make_data(tmp_path / "rows.jsonl"), 3, False))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ten_rounds_of_the_demo_model(demo_model, tmp_path, record_property):
    """269 MB of weights that were kept once would show."""
    held = measured(demo_model, make_data(tmp_path / "rows.jsonl"), 10, True)
    record_property("memory", [round(h) for h in held])
    print([round(h) for h in held])
    require_flat(held)


if __name__ == "__main__":
    model, data, count, export = sys.argv[1:]
    print(json.dumps(rounds(model, data, int(count), bool(int(export)))))
