"""Commands that serve what a run has exported: for what is there, with this run's values, as a shell reads them."""

import json
import shlex

import pytest

from kto_core import cli
from kto_core.errors import ExportError
from kto_core.export import serving


def by(run) -> dict[tuple[str, str], list[str]]:
    return {(c.program, c.what): shlex.split(c.text) for c in serving.commands(run)}


def test_only_what_is_there_is_served_and_every_path_is_whole(run, tmp_path):
    config = run.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 24, "rank_pattern": {"q_proj": 40}}))
    found = by(run)
    assert set(found) == {("vLLM", "adapter")}
    words = found["vLLM", "adapter"]
    assert words[:3] == ["vllm", "serve", run.config().config.model] and "--enable-lora" in words
    assert words[words.index("--max-lora-rank") + 1] == "64"
    assert words[-1] == f"{run.id}={run.adapter.resolve()}"

    moved = run.path.rename(tmp_path / "a run; it's mine")
    from kto_core.runs.folders import find

    run = find(str(moved))
    folder = run.path / "exports" / "gguf"
    folder.mkdir(parents=True)
    (folder / "My Model-kto-q4_k_m.gguf").write_bytes(b"x")
    (folder / "My Model-kto-f16.gguf").write_bytes(b"x")
    (folder / "Modelfile-q4_k_m").write_text("FROM x")
    (run.path / "exports" / "merged").mkdir()
    assert ("vLLM", "merged") not in by(run)  # half made
    (run.path / "exports" / "merged" / "export.json").write_text('{"source": "x"}')
    found = by(run)
    small = "My Model-kto-q4_k_m.gguf"
    assert ("Ollama", "My Model-kto-f16.gguf") not in found  # it has no Modelfile
    made = found["Ollama", small]
    assert made == ["ollama", "create", "my-model-kto-q4_k_m", "-f", str(folder.resolve() / "Modelfile-q4_k_m"), "&&",
                    "ollama", "run", "my-model-kto-q4_k_m"]  # fmt: skip
    assert found["llama.cpp", small] == ["llama-server", "-m", str(folder.resolve() / small)]
    assert found["LM Studio", small][-1] == str(folder.resolve() / small)
    assert found["vLLM", "merged"] == ["vllm", "serve", str((run.path / "exports" / "merged").resolve())]


def test_the_command_prints_them(run, capfd):
    assert cli.main(["export", "serve", str(run.path)]) == 0
    assert "# vLLM: adapter\nvllm serve " in capfd.readouterr().out
    assert cli.main(["export", "serve", str(run.path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["commands"][0]["program"] == "vLLM"


def test_a_run_without_adapter_has_nothing_to_serve(run):
    import shutil

    shutil.rmtree(run.path / "adapter")
    with pytest.raises(ExportError, match="no finished adapter"):
        serving.commands(run)
    assert cli.main(["export", "serve", str(run.path)]) == 1
