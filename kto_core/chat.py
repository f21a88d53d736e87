"""Talk to a run or a model: load once, stream answers of the tuned and of the base model from one set of weights.

One model is loaded at a time in an app (`load`, `current`); a `Chat` of one's own comes from `Chat.load`. Rated answers
become KTO rows elsewhere (`feedback`). This module knows nothing of pages or terminals.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .errors import BusyError, Cancelled, ModelError
from .jobs import Progress, check_cancel, no_progress
from .out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)
_current: Chat | None = None
_loading = threading.Lock()
_feedback = threading.Lock()


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
        raise BusyError("A model is being loaded already. Wait for it, or cancel it.")
    try:
        if _current is not None:
            _current.unload()
        _current = Chat.load(target, checkpoint=checkpoint, progress=progress, cancel=cancel)
        _current.asked = (str(target), str(checkpoint or ""))
        return _current
    finally:
        _loading.release()


class Chat:
    """A loaded model. ``name`` as the user chose it; ``has_adapter``: base and tuned differ; ``stats`` of the last
    answer: ``tokens``, ``seconds``, ``tokens_per_second``, ``first_token`` (seconds), ``ended`` ("eos", "length" or
    "stopped"), ``forgotten`` (messages left out because the context was full)."""

    def __init__(self, model, tokenizer, name: str, has_adapter: bool, owned: contextlib.ExitStack | None = None):
        self.model, self.tokenizer, self.name, self.has_adapter = model, tokenizer, name, has_adapter
        self.asked: tuple[str, str] | None = None  # what `load` was asked for
        self.stats: dict = {}
        self._owned = owned or contextlib.ExitStack()
        self._answering = threading.Lock()
        self._closed = threading.Event()
        self.decoder = None  # `decode.Decoder`, where it serves; otherwise transformers' generate answers

    @property
    def answering(self) -> bool:
        """Whether somebody waits for an answer now."""
        return self._answering.locked()

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
        from . import model as models
        from .hardware import claim

        config, adapter, name = resolve(target, checkpoint)
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim("chat", name))
            progress(None, f"Loading {config.model}…")
            tokenizer = models.load_tokenizer(config.model)
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
        if base.device.type == "cuda":
            progress(None, "Warming up…")
            try:
                chat.warm_up()
                check_cancel(cancel)
            except BaseException:
                chat.unload()
                raise
        return chat

    def warm_up(self) -> None:
        """Make the first answer as fast as the others: adapters in the model's format, the decoding step captured."""
        from .decode import ready
        from .template import render_chat

        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self.model.dtype)
        greeting = render_chat([{"role": "user", "content": "Hello"}], self.tokenizer, None)
        self.decoder = ready(self.model, greeting, self.has_adapter)

    @property
    def device(self) -> str:
        """ "cpu" or the GPU's name."""
        if self.model is None or self.model.device.type != "cuda":
            return "cpu"
        import torch

        return torch.cuda.get_device_name(self.model.device)

    def stream(
        self,
        messages: list[dict],
        *,
        tuned: bool = True,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = 512,
        seed: int | None = None,
        cancel: threading.Event | None = None,
        tools: list[dict] | None = None,
    ) -> Iterator[str]:
        """Answer the last message, in pieces as they come. Closing the generator, or ``cancel``, ends the model's work.

        Args:
            messages: role/content dicts; if the context is full the oldest turns are left out, never the system prompt.
            tuned: with the adapter; False answers with the base weights.
            temperature: 0 takes the likeliest token always. ``top_k`` 0: all tokens. ``seed`` None: another each time.

        Raises:
            ModelError: the model was unloaded, or the last message alone is longer than its context.
        """
        with self._turn(cancel):
            ids, forgotten = self._fit(messages, tools, max_new_tokens)
            stop = threading.Event()
            generate = self._generation(
                ids, tuned, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, (stop, cancel)
            )
            yield from self._streamed(generate, stop, cancel, forgotten)

    def unload(self) -> None:
        """End a running answer, drop the weights, give memory and GPU back. Again does nothing."""
        global _current
        self._closed.set()
        with self._answering:
            if self.decoder is not None:
                self.decoder.close()
            self.model = self.decoder = None
            self._owned.close()
        if _current is self:
            _current = None

    # ---- one answer

    @contextlib.contextmanager
    def _turn(self, cancel):
        """One answer at a time; others wait, and give up when they are stopped."""
        while not self._answering.acquire(timeout=0.1):
            check_cancel(cancel)
        try:
            if self._closed.is_set() or self.model is None:
                raise ModelError("The model was unloaded. Load it again to go on.")
            yield
        finally:
            self._answering.release()

    def _fit(self, messages: list[dict], tools, max_new_tokens: int) -> tuple[list[int], int]:
        """Token ids that leave room for an answer, and how many old messages were left out for it."""
        from .template import render_chat

        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
        room = max(1, limit - min(max_new_tokens, limit // 2))
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        for start in [i for i, m in enumerate(turns) if m["role"] == "user"] or [0]:
            ids = render_chat(system + turns[start:], self.tokenizer, tools)
            if len(ids) <= room:
                return ids, start
        raise ModelError(f"This message has {len(ids):,} tokens; the model takes {room:,} at most. Shorten it.")

    def _generation(self, ids, tuned, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, events):
        """(call for the generating thread, streamer, counter of generated tokens)."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        from .sampling import Counter, Stop, sampler, streamer

        counter, out = Counter(), streamer(self.tokenizer)
        own = self.model.generation_config
        ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else list(own.eos_token_id or [])
        config = GenerationConfig(
            max_new_tokens=int(max_new_tokens),
            do_sample=False,  # `sampler` draws, with a generator of its own
            repetition_penalty=float(repetition_penalty),
            eos_token_id=list(dict.fromkeys([*ends, self.tokenizer.eos_token_id])),
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        inputs = torch.tensor([ids], device=self.model.device)
        arguments = {
            "input_ids": inputs,
            "attention_mask": torch.ones_like(inputs),
            "generation_config": config,
            "logits_processor": LogitsProcessorList(
                sampler(temperature, top_p, top_k, seed, self.model.device) if temperature > 0 else []
            ),
            "stopping_criteria": StoppingCriteriaList([Stop([*events, self._closed]), counter]),
            "streamer": out,
        }
        counter.ends, counter.limit = set(config.eos_token_id), config.max_new_tokens
        base = self.has_adapter and not tuned
        if self.decoder is not None:
            return partial(self._decode, ids, base, arguments, seed is not None), out, counter
        return partial(self._generate, base, arguments), out, counter

    def _generate(self, base: bool, arguments: dict) -> None:
        import torch

        with torch.inference_mode(), self.model.disable_adapter() if base else contextlib.nullcontext():
            self.model.generate(**arguments)

    def _decode(self, ids: list[int], base: bool, arguments: dict, fresh: bool) -> None:
        """What generate would do with these arguments, with the decoder; with generate if that fails at once."""
        import torch
        from transformers import LogitsProcessorList
        from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

        config, out = arguments["generation_config"], arguments["streamer"]
        penalty = [RepetitionPenaltyLogitsProcessor(config.repetition_penalty)] * (config.repetition_penalty != 1)
        processors = LogitsProcessorList([*penalty, *arguments["logits_processor"]])
        stop, counter = arguments["stopping_criteria"]

        def choose(text, logits):
            return processors(text, logits).argmax(-1)

        try:
            for token in self.decoder.tokens(ids, base, choose, config.max_new_tokens, fresh):
                if not counter.tokens:
                    out.put(torch.tensor([ids]))  # which it skips
                out.put(torch.tensor([token]))
                counter.count(token)
                if counter.ended or stop.wanted():
                    return
        except Exception as e:  # its cache is in an unknown state, and may be what the memory was needed for
            self.decoder.close()
            if counter.tokens:
                raise
            logger.warning("Answers come from transformers' generate from now on, which is slower: %s", e)
            self.decoder = None
            self._generate(base, arguments)

    def _streamed(self, generation, stop: threading.Event, cancel, forgotten: int) -> Iterator[str]:
        call, out, counter = generation
        started, first, failed = time.perf_counter(), None, []

        def body() -> None:
            try:
                call()
            except BaseException as e:
                failed.append(e)
            finally:
                out.end()

        thread = threading.Thread(target=body, name="answer", daemon=True)
        thread.start()
        try:
            for piece in out:
                if piece:
                    first = first or time.perf_counter() - started
                    yield piece
        finally:
            stop.set()
            thread.join()
            seconds = time.perf_counter() - started
            self.stats = {
                "tokens": counter.tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(counter.tokens / seconds, 1) if seconds else None,
                "first_token": None if first is None else round(first, 3),
                "ended": "eos" if counter.ended else "length" if counter.tokens >= counter.limit else "stopped",
                "forgotten": forgotten,
            }
        if failed:
            raise _understood(failed[0]) from failed[0]


def _understood(e: BaseException) -> BaseException:
    import torch

    if is_out_of_memory(e):
        torch.cuda.empty_cache()
        return ModelError("The GPU has no memory left for this answer. Clear the conversation or ask for fewer tokens.")
    return e


# ---- what is loaded ------------------------------------------------------------------------------------------------


def resolve(target, checkpoint=None):
    """(RunConfig, adapter folder or None, name shown) of a run or model. See `Chat.load`."""
    from . import run as runs
    from .errors import RunError

    found = target if isinstance(target, runs.Run) else None
    if found is None:
        with contextlib.suppress(RunError):
            found = runs.find(str(target))
    if found is None:
        if checkpoint:
            raise ModelError(f"{target} is no run, so it has no checkpoints. `runs list` shows the runs.")
        return _model_config(str(target)), None, str(target)
    return found.config().config, _adapter(found, checkpoint), found.id


def _adapter(run, checkpoint) -> Path:
    saved = run.checkpoints()
    if checkpoint:
        step = re.sub(r"\D", "", Path(str(checkpoint)).name)
        for folder in saved:
            if folder.name == f"checkpoint-{step}":
                return folder
        steps = ", ".join(f.name.removeprefix("checkpoint-") for f in saved) or "none"
        raise ModelError(f"Run {run.id} has no checkpoint {checkpoint}. Its checkpoints: {steps}.")
    if run.adapter:
        return run.adapter
    if saved:  # stopped or interrupted: the newest saved state
        return saved[-1]
    raise ModelError(f"Run {run.id} has saved nothing yet. Let it reach a checkpoint, or talk to its base model.")


def _model_config(name: str):
    """How a model that is no run's is loaded: 4 bits on a GPU, plain on a CPU."""
    from .config import RunConfig
    from .hardware import devices

    four = bool(devices()) and name != "demo"
    return RunConfig.model_validate({"preset": "demo", "model": name, "load_in_4bit": four}, context={"model": False})


__all__ = ["Cancelled", "Chat", "current", "load", "resolve"]
