"""A step that ran out of memory, computed again with tighter limits: alone, while other processes wait."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kto_core.hardware.out_of_memory import is_out_of_memory


class Sums:
    """Sums over all processes. A step that is computed again gets those that it knows from before.

    The other processes have gone on: they would not answer a second time, or answer with the next step's.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], torch.Tensor]):
        self._reduce, self._known, self._next = reduce, [], 0

    def restart(self) -> None:
        self._next = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._next == len(self._known):
            self._known.append(self._reduce(tensor))
        self._next += 1
        return self._known[self._next - 1]


def until_it_fits(attempt: Callable, make_room: Callable[[], None]):
    """The first ``attempt()`` that does not run out of memory. ``make_room`` raises when nothing is left to give."""
    while True:
        try:
            return attempt()
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
        make_room()  # outside of the handler, whose traceback would hold on to the failed pass's tensors
