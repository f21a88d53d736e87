"""A short comparison of the packed passes with the model's own forward, before anything is trained."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from kto_core.engine.layers import excerpt, lean, recurrent
from kto_core.engine.layers.loss import Head
from kto_core.engine.packing.tree import branch, build
from kto_core.errors import NotServed
from kto_core.hardware.out_of_memory import is_out_of_memory

from . import limits

TOKENS = 24
REMEDY = "Choose engine `trl`."


@contextlib.contextmanager
def not_served_on_error():
    """What an architecture makes fail that is unlike those we know.

    Raises:
        NotServed: instead of the error that says what was not found.
    """
    try:
        yield
    except (TypeError, KeyError, AttributeError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        raise NotServed(f"The packed engine cannot run this model ({e}). {REMEDY}") from e


def check_head_and_attention(engine, prompt: np.ndarray) -> None:
    """Run two branches of one prompt both ways and compare the log-probabilities of every token; then each one's
    completion after the other's prompt, which is the same one, on the keys and values that were kept. All in train
    mode, as in training: what is random then differs too.

    In half precision, whose noise hides much, also with a small copy of the model in float32 (`layers.excerpt`).

    Raises:
        NotServed: they differ by more than rounding: this architecture does something the packed passes do not know.
    """
    start = np.resize(prompt[:TOKENS], TOKENS).astype(np.int32)
    ends = [np.resize(start[::-1], TOKENS), np.resize(start[5:], TOKENS)]
    with not_served_on_error():
        exact = _compare(engine, start, ends)
        if exact:
            return
        ids = torch.as_tensor(np.concatenate([start, *ends])).long()
        small = excerpt.copied(engine, ids, _place(engine))
        if small is not None:
            model, own = small
            start, *ends = own.cpu().numpy().astype(np.int32).reshape(3, TOKENS)
            with torch.autocast(own.device.type, enabled=False):
                _compare(type(engine)(model), start, ends)


def _place(engine) -> torch.device:
    """Where the copy has room."""
    room = limits.available(engine.device)
    return engine.device if 2 * excerpt.sizes(engine.layers) < room else torch.device("cpu")


@torch.no_grad()
def _compare(engine, start: np.ndarray, ends: list[np.ndarray]) -> bool:
    """Whether both ways were computed in single precision or better.

    Raises:
        NotServed: see `check_head_and_attention`.
    """
    sequences = [np.concatenate([start, end]).astype(np.int32) for end in ends]
    tree = build([s[:TOKENS] for s in sequences], [s[TOKENS:] for s in sequences])
    training = engine.model.training
    engine.model.train()
    try:
        with engine.using_tree():
            borrowed = branch(tree, [ends[1], ends[0]])
            hidden, store = engine.hidden(tree, borrowed)
            sums = engine.branch_logps(borrowed, hidden, store)
        head = Head.of(engine.causal)
        with torch.autocast(engine.device.type, enabled=False):
            ours = head.logits(hidden[torch.as_tensor(tree.scores.index)].to(head.weight.dtype)).log_softmax(-1)
        exact = hidden.dtype in (torch.float32, torch.float64)
        theirs = []
        with lean.use(recurrent.reference_forwards(engine.recurrent) if exact else []):
            for s in sequences:
                ids = torch.as_tensor(s, device=engine.device)[None].long()
                logits = engine.causal(input_ids=ids, use_cache=False).logits
                theirs.append(logits[0, TOKENS - 1 : -1].to(ours.dtype).log_softmax(-1))
    finally:
        engine.model.train(training)
    theirs = torch.cat(theirs)
    difference, spread = float((ours - theirs).abs().mean()), float(theirs.std())
    targets = torch.as_tensor(np.concatenate(ends), device=theirs.device).long()
    own = theirs.gather(-1, targets[:, None]).view(2, TOKENS).double().sum(-1)
    borrowed_difference = float((sums.double() - own.flip(0)).abs().max()) / TOKENS
    # half precision: random weights differ by a tenth of the spread, a wrong mask or position by all of it
    difference = max(difference, borrowed_difference)
    if not difference <= spread * (1e-3 if exact else 0.35):
        raise NotServed(
            f"The packed engine does not reproduce this model's log-probs (they differ by {difference:.3g}). {REMEDY}"
        )
    return exact
