"""What `chat` hands to transformers' generate: a sampler with its own random numbers, stopping, counting, streaming.

Drawing with a generator of one's own leaves torch's global one alone: a training in the same process is not disturbed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


class Gumbel(LogitsProcessor):
    """Adds Gumbel noise: the likeliest token of the sum is a draw from the softmax (the Gumbel-max trick)."""

    def __init__(self, seed: int | None, device):
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(int(seed))

    def __call__(self, input_ids, scores):
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return scores.float() - noise.clamp_min(1e-30).log()


def sampler(temperature: float, top_p: float, top_k: int, seed: int | None, device) -> list:
    """Processors that make greedy search draw from the tempered, cut distribution. ``temperature`` > 0."""
    steps: list = [TemperatureLogitsWarper(float(temperature))]
    if top_k and top_k > 0:
        steps.append(TopKLogitsWarper(int(top_k)))
    if 0 < top_p < 1:
        steps.append(TopPLogitsWarper(float(top_p)))
    return [*steps, Gumbel(seed, device)]


class Stop(StoppingCriteria):
    """Ends when any of the events is set (None entries are ignored)."""

    def __init__(self, events: list[threading.Event | None]):
        self.events = [e for e in events if e is not None]

    def wanted(self) -> bool:
        return any(e.is_set() for e in self.events)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.wanted(), device=input_ids.device)


class _Ended(Exception):
    """Leaves a forward in its middle."""


@contextlib.contextmanager
def ending(model, stop: Stop) -> Iterator[None]:
    """End generate inside a forward too, before each decoder layer: a CPU reads a long prompt for a minute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def look(*_) -> None:
        if stop.wanted():
            raise _Ended

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with contextlib.suppress(_Ended):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class Counter(StoppingCriteria):
    """Counts generated tokens; ``ended``: the last one was an end of turn. Never stops anything."""

    def __init__(self):
        self.tokens, self.limit, self.ended, self.ends = 0, 0, False, set()

    def count(self, token: int) -> None:
        self.tokens += 1
        self.ended = token in self.ends

    def __call__(self, input_ids, scores, **kwargs):
        self.count(int(input_ids[0, -1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Streamer(TextIteratorStreamer):
    """`end` may be called again, after a failure that left generate before its own call."""

    ended = False

    def end(self):
        if not self.ended:
            self.ended = True
            super().end()


def streamer(tokenizer, special: bool = False) -> TextIteratorStreamer:
    """Text as it is generated; ``special``: with its special tokens."""
    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=not special)
