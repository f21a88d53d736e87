"""What transformers can do for one thread at a time: its first import, and building a model.

Its package replaces itself in ``sys.modules`` while it is imported. A second thread that asks meanwhile waits for the
import and is then handed the replaced module, which has no names: ``ImportError: cannot import name 'AutoTokenizer'``.
The app has such threads: rows are counted, a run starts, a model is loaded.

While it builds a model it exchanges functions of torch and of its own classes, for all threads, and puts back what it
found. Two threads that overlap put back each other's: no model of the process has its tied weights from then on.
"""

from __future__ import annotations

import logging
import sys
import threading

one_model_at_a_time = threading.RLock()

_lock = threading.RLock()


def transformers_ready() -> None:
    """Import transformers whole; call it before ``from transformers import …`` in what runs in threads.

    Not where Unsloth trains: it has to be imported first (`unsloth_model`), and does so in a process of its own.
    """
    with _lock:
        before = sys.modules.get("transformers")
        if getattr(before, "_kto_ready", False):
            return
        logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
        import transformers

        for name in ("AutoConfig", "AutoTokenizer"):
            getattr(transformers, name)  # its packages replace themselves, too
        vars(transformers)["_kto_ready"] = True


def _is_news(record: logging.LogRecord) -> bool:
    """Not that an optional kernel for CPUs is missing, which bitsandbytes says on every import."""
    return "gemm_4bit_forward" not in record.getMessage()
