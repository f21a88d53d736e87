"""Answers of a loaded model: one at a time, in pieces as they come. `chat.Chat` loads and unloads it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from functools import partial

from kto_core.data.rendering.style import PLAIN
from kto_core.errors import ModelError, Unloaded
from kto_core.hardware.out_of_memory import is_out_of_memory
from kto_core.jobs import check_cancel

from .context_window import fit

logger = logging.getLogger(__name__)
OTHER = "other"  # PEFT's name of the adapter that is loaded beside the model's own
POLL = 0.1  # seconds between two looks of who waits for an answer


class Answering:
    """What answers. ``stats`` of the last answer: ``tokens``, ``seconds``, ``tokens_per_second``, ``first_token``
    (seconds), ``ended`` ("eos", "length" or "stopped"), ``forgotten`` (messages left out because the context was full).
    """

    def __init__(self, model, tokenizer, has_adapter: bool):
        self.model, self.tokenizer, self.has_adapter = model, tokenizer, has_adapter
        self.decoder = None  # `decode.Decoder`, where it serves; otherwise transformers' generate answers
        self.style = PLAIN  # how a conversation is rendered
        self.other_style = PLAIN  # the same for the adapter beside
        self.stats: dict = {}
        self._answering = threading.Lock()  # held while the model works, not while somebody reads what it wrote
        self._gives_way = False  # the answer that holds it
        self._first: set[object] = set()  # who waits for it and does not give way
        self._closed = threading.Event()

    @property
    def answering(self) -> bool:
        """Whether somebody waits for an answer now; one that gives way does not count."""
        return bool(self._first) or (self._answering.locked() and not self._gives_way)

    def stream(
        self,
        messages: list[dict],
        *,
        tuned: bool = True,
        other: bool = False,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = 512,
        seed: int | None = None,
        cancel: threading.Event | None = None,
        tools: list[dict] | None = None,
        gives_way: bool = False,
    ) -> Iterator[str]:
        """Answer the last message, in pieces as they come. Closing the generator, or ``cancel``, ends the model's work.

        A thought comes between `<think>` tags, in whatever form the model writes it; `thoughts.split` takes it off.

        Args:
            messages: role/content dicts; if the context is full the oldest turns are left out, never the system prompt.
            tuned: with the adapter; False answers with the base weights.
            other: with the adapter that `chat.Chat.join` loaded beside, whatever ``tuned`` is.
            temperature: 0 takes the likeliest token always. ``top_k`` 0: all tokens. ``seed`` None: another each time.
            gives_way: whoever waits for an answer that does not give way is served before.

        Raises:
            Unloaded: the model was unloaded, perhaps in the middle of the answer.
            ModelError: the last message alone is longer than the model's context.
            Cancelled: ``cancel`` was set before the answer began.
        """
        self._begin(cancel, gives_way)
        stop, failed = threading.Event(), []
        try:
            self._wanted(cancel)
            style = self.other_style if other else self.style
            ids, forgotten = self._fit(messages, tools, max_new_tokens, cancel, style)
            generation = self._generation(
                ids, tuned or other, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, (stop, cancel)
            )
            thread = self._start(*generation[:2], failed, other)
        except BaseException:
            self._answering.release()
            raise
        yield from self._streamed(thread, *generation[1:], stop, forgotten)
        if failed:
            raise understood(failed[0]) from failed[0]
        if self._closed.is_set() and self.stats["ended"] == "stopped" and not (cancel and cancel.is_set()):
            raise Unloaded("The model was unloaded before the answer was complete. Load it again to continue.")

    # ---- one answer

    def _begin(self, cancel, gives_way: bool) -> None:
        """Take the model for one answer at a time. Others wait, and give up when they are stopped or it is unloaded."""
        me = object()
        if not gives_way:
            self._first.add(me)
        try:
            self._wanted(cancel)
            while not self._take(gives_way):
                self._wanted(cancel)
            self._gives_way = gives_way
        finally:
            self._first.discard(me)

    def _take(self, gives_way: bool) -> bool:
        if not gives_way:
            return self._answering.acquire(timeout=POLL)
        if not self._first and self._answering.acquire(blocking=False):
            return True
        time.sleep(POLL)
        return False

    def _wanted(self, cancel) -> None:
        """Raises if nobody wants the answer any more, or nobody can give it."""
        check_cancel(cancel)
        if self._closed.is_set() or self.model is None:
            raise Unloaded("The model was unloaded. Load it again to continue.")

    def _fit(self, messages: list[dict], tools, max_new_tokens: int, cancel=None, style=None) -> tuple[list[int], int]:
        """Token ids that leave room for an answer, and how many old messages were left out for it."""
        from kto_core.data.rendering.template import render_chat

        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
        room = max(1, limit - min(max_new_tokens, limit // 2))
        style = style or self.style
        return fit(
            messages, lambda m: render_chat(m, self.tokenizer, tools, style), room, partial(self._wanted, cancel)
        )

    def _generation(self, ids, tuned, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, events):
        """(call for the generating thread, streamer, counter of generated tokens)."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        from .sampling import Counter, Stop, sampler, streamer
        from .thought_text import ThoughtText, markers

        found = markers(self.tokenizer, ids)
        counter, out = Counter(), streamer(self.tokenizer, found.raw)
        out.reader = ThoughtText(found)
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

        from .sampling import ending

        off = self.model.disable_adapter() if base else contextlib.nullcontext()
        with torch.inference_mode(), off, ending(self.model, arguments["stopping_criteria"][0]):
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
            logger.warning("Falling back to transformers' generate, which is slower: %s", e)
            self.decoder = None
            self._generate(base, arguments)

    def _start(self, call, out, failed: list, other: bool) -> threading.Thread:
        """Let the model work in a thread that frees it afterwards, whatever becomes of who reads its answer."""

        def body() -> None:
            try:
                with self._with(other):
                    call()
            except BaseException as e:
                failed.append(e)
            finally:
                self._answering.release()
                out.end()

        thread = threading.Thread(target=body, name="answer", daemon=True)
        thread.start()
        return thread

    @contextlib.contextmanager
    def _with(self, other: bool) -> Iterator[None]:
        """While one answer is made: the adapter beside in place of the model's own."""
        if not other:
            yield
            return
        own = self.model.active_adapter
        self.model.set_adapter(OTHER, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter(own, inference_mode=True)

    def _streamed(self, thread, out, counter, stop: threading.Event, forgotten: int) -> Iterator[str]:
        started, first = time.perf_counter(), None
        try:
            for raw in out:
                if piece := out.reader.feed(raw):
                    first = first or time.perf_counter() - started
                    yield piece
            if piece := out.reader.finish():
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


def understood(e: BaseException) -> BaseException:
    """What the user is told of an answer that failed: memory that ran out has a sentence of its own."""
    import torch

    if is_out_of_memory(e):
        torch.cuda.empty_cache()
        return ModelError("The GPU ran out of memory for this answer. Clear the conversation, or lower Max tokens.")
    return e
