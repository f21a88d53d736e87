"""What libraries say while a run trains: warnings become log events, everything goes to the run's ``train.log``.

Only what the training thread says is taken: other threads of the app have their own business.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from pathlib import Path

from kto_core.runs.events import EventLog

LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "huggingface_hub", "py.warnings",
             "torch", "unsloth", "unsloth_zoo", "wandb", "kto_core")  # fmt: skip
SILENT = (  # true and of no use to the user
    "use_cache=True",
    "The tokenizer has new PAD/BOS/EOS tokens",
    "torch_dtype",
    "pin_memory",
    "FutureWarning",
    "DeprecationWarning",
    "No label_names provided",
)


class _ToEvents(logging.Handler):
    """WARNING and above of one thread, each text once."""

    def __init__(self, events: EventLog):
        super().__init__(logging.WARNING)
        self.events, self.thread = events, threading.get_ident()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self.thread:
            return
        text = " ".join(record.getMessage().split())[:600]
        if record.name == "py.warnings":  # "file.py:1: UserWarning: text source line"
            text = text.partition("Warning: ")[2] or text
        if text in self.seen or any(s in record.getMessage() for s in SILENT):
            return
        self.seen.add(text)
        with contextlib.suppress(OSError):  # a full disk is reported elsewhere
            self.events.log(text, "warning" if record.levelno < logging.ERROR else "error")


@contextlib.contextmanager
def captured(events: EventLog, file: Path):
    """Attach to the libraries' loggers for a block. Yields a logger that writes to ``file`` (tracebacks go there)."""
    own = logging.getLogger(f"kto_core.training.train.{file.parent.name}")
    own.setLevel(logging.INFO)
    own.propagate = False
    to_file = logging.FileHandler(file, encoding="utf-8", delay=True)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    thread = threading.get_ident()
    to_file.addFilter(lambda record: record.thread == thread)
    to_events = _ToEvents(events)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    own.addHandler(to_file)
    for logger in loggers:
        logger.addHandler(to_events)
        logger.addHandler(to_file)
    show = warnings.showwarning
    logging.captureWarnings(True)
    try:
        yield own
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = show
        own.removeHandler(to_file)
        for logger in loggers:
            logger.removeHandler(to_events)
            logger.removeHandler(to_file)
        with contextlib.suppress(OSError):  # a full disk: what is not written is lost, the run's state is not
            to_file.close()
