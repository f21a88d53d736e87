"""Talk to a run or a model: load once, stream answers of the tuned and of the base model from one set of weights.

One model is loaded at a time in an app (`load`, `current`); a `Chat` of one's own comes from `Chat.load`. Rated answers
become KTO rows elsewhere (`feedback`). This module knows nothing of pages or terminals.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from kto_core.errors import BusyError, Cancelled, KTOError, ModelError, first_line
from kto_core.jobs import Progress, check_cancel, no_progress
from kto_core.models.adapter_gate import opened, require_adapter

from .answering import OTHER, Answering
from .target import require_same_base, resolve, style

_current: Chat | None = None
_loading = threading.Lock()


def current() -> Chat | None:
    """The model this app has loaded, or None."""
    return _current


def load(target, *, checkpoint=None, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Chat:
    """`Chat.load`, kept as the app's one loaded model; the one before is unloaded first.

    Raises:
        BusyError: another load is going on, or the GPU is somebody else's.
    """
    global _current
    if not _loading.acquire(blocking=False):
        raise BusyError("A model is already loading. Wait until it is loaded, or cancel.")
    try:
        if _current is not None:
            _current.unload()
        _current = Chat.load(target, checkpoint=checkpoint, progress=progress, cancel=cancel)
        _current.asked = (str(target), str(checkpoint or ""))
        return _current
    finally:
        _loading.release()


class Chat(Answering):
    """A loaded model. ``name`` as the user chose it; ``has_adapter``: base and tuned differ."""

    def __init__(self, model, tokenizer, name: str, has_adapter: bool, owned: contextlib.ExitStack | None = None):
        super().__init__(model, tokenizer, has_adapter)
        self.name = name
        self.asked: tuple[str, str] | None = None  # what `load` was asked for
        self.beside: tuple[str, str] | None = None  # what `join` was asked for
        self.config = None  # the run's, or how a model by itself is loaded
        self._owned = owned or contextlib.ExitStack()

    @classmethod
    def load(
        cls, target, *, checkpoint=None, progress: Progress = no_progress, cancel: threading.Event | None = None
    ) -> Chat:
        """Load a run (a `run.Run`, its id or folder) or a model ("demo", a Hub id, a folder).

        Args:
            checkpoint: a step (or a checkpoint's name) of the run, instead of its finished adapter.

        Raises:
            ModelError: nothing of that name, or it does not load.
            BusyError: training or an export owns the GPU; the message names it.
            Cancelled: ``cancel`` was set.
        """
        from kto_core.hardware.gpu_owner import claim
        from kto_core.models import load as models

        config, adapter, name = resolve(target, checkpoint)
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim("chat", name))
            progress(None, f"Loading {config.model}…")
            if adapter is not None:
                require_adapter(Path(adapter), config.model)
            tokenizer = models.load_tokenizer(config.model, progress, cancel)
            check_cancel(cancel)
            base = models.load_base(config, for_training=False, progress=progress, cancel=cancel)
            stack.callback(models.free_memory)
            check_cancel(cancel)
            if adapter is not None:
                progress(None, "Loading the adapter…")
                base = models.load_adapter(base, adapter)
            base.eval()
            check_cancel(cancel)
            chat = cls(base, tokenizer, name, adapter is not None, stack.pop_all())
            chat.style, chat.config = style(target), config
        if base.device.type == "cuda":
            progress(None, "Warming up…")
            try:
                chat.warm_up()
                check_cancel(cancel)
            except BaseException:
                chat.unload()
                raise
        return chat

    def join(
        self, target, *, checkpoint=None, progress: Progress = no_progress, cancel: threading.Event | None = None
    ) -> None:
        """Load the adapter of another run beside this one's, on the same weights, for ``stream(other=True)``.

        Again with the same does nothing; with another one, the one before is dropped.

        Raises:
            ModelError: nothing of that name, no adapter, or one of another base model.
            Unloaded: this model was unloaded.
            Cancelled: ``cancel`` was set.
        """
        asked = (str(target), str(checkpoint or ""))
        if self.beside == asked:
            return
        config, adapter, name = resolve(target, checkpoint)
        if adapter is None:
            raise ModelError(f"{name} is not a run, so it has no adapter. `runs list` shows all runs.")
        require_same_base(self.config, config, self.name, name)
        require_adapter(Path(adapter), config.model)
        self._begin(cancel, gives_way=False)
        try:
            self._wanted(cancel)
            progress(None, f"Loading the adapter of {name}…")
            self._drop_other()
            self._load_other(Path(adapter))
            self.beside, self.other_style = asked, style(target)
            if self.decoder is not None:
                self.decoder.close()
                self.decoder = None
                self.warm_up()
        except BaseException:
            self._drop_other()
            raise
        finally:
            self._answering.release()

    def _load_other(self, folder: Path) -> None:
        own = self.model.active_adapter
        try:
            self.model.load_adapter(str(opened(folder)), adapter_name=OTHER, is_trainable=False)
        except KTOError:
            raise
        except Exception as e:  # shapes (RuntimeError), targets (ValueError), a cut file (SafetensorError)
            raise ModelError(f"The adapter in {folder} cannot be loaded on this base model: {first_line(e)}") from e
        self.model.set_adapter(own, inference_mode=True)
        self.model.eval()

    def _drop_other(self) -> None:
        self.beside = None
        if OTHER in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(OTHER)

    def warm_up(self) -> None:
        """Make the first answer as fast as the others: adapters in the model's format, the decoding step captured."""
        from kto_core.data.rendering.template import render_chat

        from .decode import ready

        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self.model.dtype)
        greeting = render_chat([{"role": "user", "content": "Hello"}], self.tokenizer, None, self.style)
        self.decoder = ready(self.model, greeting, self.has_adapter)

    @property
    def device(self) -> str:
        """ "cpu" or the GPU's name."""
        if self.model is None or self.model.device.type != "cuda":
            return "cpu"
        import torch

        return torch.cuda.get_device_name(self.model.device)

    def unload(self) -> None:
        """End a running answer after its next token, drop the weights, give memory and GPU back. Again does nothing."""
        global _current
        self._closed.set()
        with self._answering:
            if self.decoder is not None:
                self.decoder.close()
            self.model = self.decoder = None
            self._owned.close()
        if _current is self:
            _current = None


__all__ = ["Cancelled", "Chat", "current", "load", "resolve"]
