"""A GGUF file opened in llama.cpp: llama-cpp-python is taken if it is installed, else cyllama; both are llama.cpp.

In a child process only: an assertion there aborts it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kto_core.errors import ExportError

CONTEXT = 2048  # tokens of prompt and answer


def engine():
    """The class that opens a file: ``engine()(path, threads)``."""
    return LlamaCppPython if importlib.util.find_spec("llama_cpp") else Cyllama


def require_cyllama() -> None:
    if not importlib.util.find_spec("cyllama"):
        raise ExportError(
            "The package cyllama is not installed. Install it: python -m pip install 'cyllama>=0.2.18,<0.8'"
        )


class Cyllama:
    name = "cyllama"

    def __init__(self, path: str, threads: int):
        require_cyllama()
        from cyllama.llama import llama_cpp as native

        self.native = native
        native.disable_logging()
        native.ggml_backend_load_all()
        params = native.LlamaModelParams()
        params.n_gpu_layers = 0  # the GPU may be somebody else's

        class Model(native.LlamaModel):
            """`get_logits_ith` looks for the size of the vocabulary here, where cyllama 0.2.18 does not have it."""

            @property
            def n_vocab(self) -> int:
                return self.get_vocab().n_vocab

        try:
            self.model = Model(path, params)
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

    def logits(self):
        """Of the place that `first` or `next` came to: one number for each token."""
        return self.context.get_logits_ith(-1)

    def forget(self) -> None:
        """What comes next is another text."""
        self.context.kv_cache_clear()
        self.at = 0

    def ends(self, token: int) -> bool:
        return self.vocab.is_eog(token)

    def text(self, ids: list[int]) -> str:
        return self.vocab.detokenize(ids, remove_special=False, unparse_special=False)


class LlamaCppPython:
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

    def logits(self):
        """Of the place that `first` or `next` came to: one number for each token."""
        found = self.native.llama_get_logits_ith(self.model.ctx, -1)
        return found[: self.model.n_vocab()]

    def forget(self) -> None:
        """What comes next is another text."""
        self.model.reset()

    def ends(self, token: int) -> bool:
        return self.native.llama_vocab_is_eog(self.vocab, token)

    def text(self, ids: list[int]) -> str:
        return self.model.detokenize(ids).decode(errors="replace")
