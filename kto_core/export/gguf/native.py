"""llama.cpp's converter and its quantizer. Run in a child process (`guards.child`): an assertion there aborts it.
What reads a GGUF is confined (`guards.confine`): it writes into the folder of its result only, and has no network.

llama-cpp-python is taken if it is installed, else cyllama; both are llama.cpp, and quantize to the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from kto_core.errors import ExportError
from kto_core.guards import confine

from .llama import require_cyllama
from .writing import FTYPES

# Families with layers that draft further tokens: transformers does not load them, and the converter expects them unless
# it is told otherwise.
DRAFTING = ("qwen3_5", "qwen3_next", "glm4_moe", "deepseek_v3")


def convert(script: str, model: str, out: str, outtype: str, name: str) -> None:
    """Run llama.cpp's ``convert_hf_to_gguf.py`` on the folder ``model``; it sees its own gguf package, not ours."""
    import runpy

    sys.path.insert(0, str(Path(script).parent))
    more = ["--no-mtp"] if _lacks_draft_head(Path(model)) else []
    sys.argv = [script, model, "--outfile", out, "--outtype", outtype, "--model-name", name, *more]
    runpy.run_path(script, run_name="__main__")


def _lacks_draft_head(model: Path) -> bool:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    parts = [config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))]
    return any(str(part.get("model_type", "")).startswith(DRAFTING) for part in parts)


def quantize(source: str, out: str, quant: str, threads: int) -> str:
    """GGUF -> GGUF with the weights as ``quant``. Returns the name of the library that did it."""
    confine.close_in([Path(out).parent])
    if importlib.util.find_spec("llama_cpp"):
        import ctypes

        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = FTYPES[quant], threads
        code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
        if code:
            raise ExportError(f"llama.cpp could not write {quant} (code {code}).")
        return "llama-cpp-python"
    require_cyllama()
    from cyllama.llama import llama_cpp as native

    params = native.LlamaModelQuantizeParams()
    params.ftype, params.nthread = FTYPES[quant], threads
    try:
        native.model_quantize(source, out, params)
    except RuntimeError as e:
        raise ExportError(f"llama.cpp could not write {quant}: {e}.") from e
    return "cyllama"
