"""How to use what was uploaded, for the model card: a command for each program, right for this run."""

from __future__ import annotations

import json
from pathlib import Path

from .sources import records

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


def use(run, repo: str, base: str, what: list[str], files: list[str]) -> str:
    """The section as Markdown.

    Args:
        base: the base's Hub id, or what is known of its name. what: of "adapter", "merged", "gguf".
        files: paths in the repository.
    """
    parts = []
    if "merged" in what:
        parts.append(_merged(repo))
    if "adapter" in what:
        folder = next((f.rpartition("/")[0] for f in files if f.endswith("adapter_config.json")), "")
        parts.append(_adapter(run, repo, base, folder))
    if "gguf" in what:
        parts.append(_gguf(run, repo, [f for f in files if f.endswith(".gguf")]))
    return "\n\n".join(parts)


def _merged(repo: str) -> str:
    return (
        "The merged model, with transformers:\n\n```python\nfrom transformers import pipeline\n\n"
        f'chat = pipeline("text-generation", "{repo}")\n'
        'print(chat([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])\n```\n\n'
        f"With vLLM:\n\n```\nvllm serve {repo}\n```"
    )


def _adapter(run, repo: str, base: str, folder: str) -> str:
    inner = f', subfolder="{folder}"' if folder else ""
    text = (
        "The adapter, with PEFT:\n\n```python\nfrom peft import PeftModel\nfrom transformers import "
        "AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{repo}"{inner})\n```'
    )
    if folder:  # vLLM takes no folder of a repository
        return text
    name = repo.split("/")[-1]
    return f"{text}\n\nWith vLLM:\n\n```\n{vllm_adapter(base, name, repo, rank_of(run.adapter))}\n```"


def vllm_adapter(base: str, name: str, place: str, rank: int) -> str:
    """vLLM's command for an adapter. It takes ranks up to 16 by itself, and only some numbers above."""
    most = next((r for r in RANKS if r >= rank), rank)
    return f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {name}={place}"


def rank_of(adapter: Path) -> int:
    """The largest rank of an adapter's layers."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return int(max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]))


def _gguf(run, repo: str, names: list[str]) -> str:
    tags = [tag(name) for name in names]
    first = f":{tags[0]}" if tags and tags[0] else ""
    return (
        "The GGUF files, with Ollama, llama.cpp or LM Studio. Ollama takes `template` and `params` of this repository "
        "itself; beside a downloaded file, use its Modelfile.\n\n"
        f"{_table(run, repo, names)}\n\n```\nollama run hf.co/{repo}{first}\nllama-server -hf {repo}{first}\n```"
    )


def _table(run, repo: str, names: list[str]) -> str:
    """Each file with its size, and at how many places of the merged model's own answers it agrees with that."""
    folder = run.path / "exports" / "gguf"
    lines = ["| File | Size | Agrees with the merged model | Ollama |", "|---|---|---|---|"]
    known = records(folder)
    for name in names:
        file, verdict = folder / name, known.get(name, {}).get("check") or {}
        size = f"{file.stat().st_size / 1e9:.2f} GB" if file.is_file() else ""
        said, found = "not checked", verdict.get("agreement")
        if found and found["of"]:
            said = f"at {found['same']:,} of {found['of']:,} places ({found['same'] / found['of']:.0%})"
        if verdict.get("ok") is False:
            said += "; the check failed"
        command = f"`ollama run hf.co/{repo}:{tag(name)}`" if tag(name) else ""
        lines.append(f"| `{name}` | {size} | {said} | {command} |")
    return "\n".join(lines)


def tag(name: str) -> str:
    """What Ollama and llama.cpp call a file of a repository: its kind in capitals, at the end of its name."""
    return Path(name).stem.rpartition("-")[2].upper() if "-" in name else ""
