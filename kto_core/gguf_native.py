"""What touches llama.cpp or its converter. Runs in a child process (`kto_core.child`): an assertion there aborts it.

llama-cpp-python is taken if it is installed, else cyllama; both are llama.cpp, and quantize to the same bytes.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

from .child import tell
from .errors import ExportError

FTYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17}  # llama.h: enum llama_ftype
CONTEXT = 2048  # tokens of prompt and answer in a check


def convert(script: str, model: str, out: str, outtype: str, name: str) -> None:
    """Run llama.cpp's ``convert_hf_to_gguf.py`` on the folder ``model``; it sees its own gguf package, not ours."""
    import runpy

    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, model, "--outfile", out, "--outtype", outtype, "--model-name", name]
    runpy.run_path(script, run_name="__main__")


def quantize(source: str, out: str, quant: str, threads: int) -> str:
    """GGUF -> GGUF with the weights as ``quant``. Returns the name of the library that did it."""
    if importlib.util.find_spec("llama_cpp"):
        import ctypes

        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = FTYPES[quant], threads
        code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
        if code:
            raise ExportError(f"llama.cpp could not write {quant} (code {code}).")
        return "llama-cpp-python"
    _require_cyllama()
    from cyllama.llama import llama_cpp as native

    params = native.LlamaModelQuantizeParams()
    params.ftype, params.nthread = FTYPES[quant], threads
    try:
        native.model_quantize(source, out, params)
    except RuntimeError as e:
        raise ExportError(f"llama.cpp could not write {quant}: {e}.") from e
    return "cyllama"


def check(path: str, prompt: str, max_tokens: int, threads: int) -> dict:
    """Load a GGUF, put ``prompt`` into its own chat template, answer.

    Returns:
        ``text``, ``tokens`` (of the answer), ``stopped_at_eos``, ``tokens_per_second`` (of generation alone),
        ``file_type``, ``chat_template`` (bool), ``bos``, ``eos``, ``pad`` (ids, or None), ``engine``; greedy, so that
        two checks of one file agree.

    Raises:
        ExportError: not a GGUF file, it does not load, or its template does not render.
    """
    from . import gguf

    facts = gguf.read_facts(path)
    text = gguf.prompt_text(facts, prompt)
    tell(None, "Loading the file in llama.cpp…")
    engine = _LlamaCppPython if importlib.util.find_spec("llama_cpp") else _Cyllama
    model = engine(path, threads)
    double = facts.add_bos and bool(facts.bos_text) and text.startswith(facts.bos_text)  # the template wrote it itself
    ids = model.tokenize(text, add_special=not double)
    if len(ids) + max_tokens > CONTEXT:
        raise ExportError(f"This question is too long for a check ({len(ids):,} tokens). Ask a shorter one.")
    tell(None, "Answering…")
    answer: list[int] = []
    stopped = False
    token, started = model.first(ids), 0.0
    for i in range(max_tokens):
        if i == 1:
            started = time.perf_counter()
        if stopped := model.ends(token):
            break
        answer.append(token)
        token = model.next(token)
    seconds = time.perf_counter() - started if started else 0.0
    return {
        "text": model.text(answer),
        "tokens": len(answer),
        "stopped_at_eos": stopped,
        "tokens_per_second": (len(answer) - 1) / seconds if seconds else 0.0,
        "file_type": facts.file_type,
        "chat_template": bool(facts.template),
        "bos": facts.bos,
        "eos": facts.eos,
        "pad": facts.pad,
        "engine": engine.name,
    }


def _require_cyllama() -> None:
    if not importlib.util.find_spec("cyllama"):
        raise ExportError("The package cyllama is missing. Install it: python -m pip install 'cyllama>=0.2.18,<0.8'")


class _Cyllama:
    name = "cyllama"

    def __init__(self, path: str, threads: int):
        _require_cyllama()
        from cyllama.llama import llama_cpp as native

        self.native = native
        native.disable_logging()
        native.ggml_backend_load_all()
        params = native.LlamaModelParams()
        params.n_gpu_layers = 0  # the GPU may be somebody else's
        try:
            self.model = native.LlamaModel(path, params)
        except (ValueError, RuntimeError, OSError) as e:
            raise ExportError(f"llama.cpp cannot load {Path(path).name}: {e}. Create it again.") from e
        self.vocab = self.model.get_vocab()
        params = native.LlamaContextParams()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        self.context = native.LlamaContext(self.model, params)
        self.sampler = native.LlamaSampler(native.LlamaSamplerChainParams())
        self.sampler.add_greedy()
        self.at = 0

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return list(self.vocab.tokenize(text, add_special=add_special, parse_special=True))

    def first(self, ids: list[int]) -> int:
        self.context.decode(self.native.llama_batch_get_one(ids, self.at))
        self.at += len(ids)
        return self.sampler.sample(self.context, -1)

    def next(self, token: int) -> int:
        return self.first([token])

    def ends(self, token: int) -> bool:
        return self.vocab.is_eog(token)

    def text(self, ids: list[int]) -> str:
        return self.vocab.detokenize(ids, remove_special=False, unparse_special=False)


class _LlamaCppPython:
    name = "llama-cpp-python"

    def __init__(self, path: str, threads: int):
        import llama_cpp

        self.native = llama_cpp
        try:
            self.model = llama_cpp.Llama(
                path, n_ctx=CONTEXT, n_gpu_layers=0, n_threads=threads, n_threads_batch=threads, verbose=False
            )
        except (ValueError, RuntimeError, OSError) as e:
            raise ExportError(f"llama.cpp cannot load {Path(path).name}: {e}. Create it again.") from e
        self.vocab = llama_cpp.llama_model_get_vocab(self.model.model)

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=add_special, special=True)

    def first(self, ids: list[int]) -> int:
        self.model.eval(ids)
        return self.model.sample(temp=0.0)

    def next(self, token: int) -> int:
        return self.first([token])

    def ends(self, token: int) -> bool:
        return self.native.llama_vocab_is_eog(self.vocab, token)

    def text(self, ids: list[int]) -> str:
        return self.model.detokenize(ids).decode(errors="replace")
