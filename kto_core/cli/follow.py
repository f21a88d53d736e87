"""Follow a run from the terminal: its events as lines, Ctrl-C as stop. Reads the run's folder only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

from kto_core.errors import RunError
from kto_core.jobs import duration
from kto_core.plain_text import printable
from kto_core.runs import log

from . import output

POLL = 0.2  # seconds between two looks at the events
PATIENCE = 10  # seconds a run has to stop now


class Interrupts:
    """Counts Ctrl-C (and SIGTERM) instead of raising, so that the caller can end in good order."""

    def __init__(self):
        self.count = 0
        self.cancel = threading.Event()  # set by the first one

    def _hit(self, *_) -> None:
        self.count += 1
        self.cancel.set()
        if self.count > 2:
            end_process()

    def __enter__(self) -> Interrupts:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self._before = {s: signal.signal(s, self._hit) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def end_process() -> None:
    """End this process now, a training thread inside it included."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(output.INTERRUPTED)


def follow(run, interrupts: Interrupts) -> int:
    """Show a run's progress until it ends.

    The first Ctrl-C asks the run to stop after its step and save, the second to stop now; a run in this process that
    does not within `PATIENCE` seconds ends with the process, and goes on from its last checkpoint when resumed.

    Returns:
        0 finished (or stopped by somebody else, and saved), 1 failed or interrupted, 130 stopped with Ctrl-C.
    """
    screen, asked, deadline = _Screen(), 0, 0.0
    while not screen.update(run.state()).terminal:
        if interrupts.count > asked:
            asked += 1
            deadline = time.monotonic() + PATIENCE
            with contextlib.suppress(RunError):  # it ended by itself meanwhile
                run.stop()
            screen.line(
                "Stopping now." if asked > 1 else "Finishing this step, then saving. Press Ctrl-C again to stop now."
            )
        if asked > 1 and time.monotonic() > deadline:
            screen.close()
            output.say(f"No longer waiting. To resume later: python -m kto_core runs resume {run.id}")
            end_process()
        time.sleep(POLL)
    screen.close()
    return _verdict(run, run.state(), asked > 0)


def _verdict(run, state, asked: bool) -> int:
    again = f"To resume: python -m kto_core runs resume {run.id}"
    if state.state == "finished":
        output.say(
            f"Finished after {state.step:,} step{'s' * (state.step != 1)}. To chat with it: python -m kto_core chat "
            f"{run.id}"
        )
        return output.OK
    if state.state == "stopped":
        output.say(f"{state.message or f'Stopped after step {state.step:,}.'} {again}")
        return output.INTERRUPTED if asked else output.OK
    if state.state == "failed":
        output.say(f"Failed: {state.error or state.message}")
        return output.FAILED
    output.say(f"{state.message or 'Interrupted.'} {again}")
    return output.INTERRUPTED if asked else output.FAILED


class _Screen:
    """A bar with step, loss and time left on a terminal; elsewhere one line a metric."""

    def __init__(self):
        self.bar, self.metrics, self.logs, self.status = None, 0, 0, ""

    def line(self, text: str) -> None:
        if self.bar is None:
            output.say(text)
        else:
            self.bar.write(printable(text), file=sys.stderr)

    def update(self, state):
        """Show what is new; returns ``state``."""
        for entry in _newest(state.logs, self.logs):
            if entry["level"] != "error":  # the verdict says it
                self.line(entry["text"])
        if state.message and state.message != self.status and not state.terminal:
            self.status = state.message
            self.line(state.message)
        new = _newest(state.metrics, self.metrics)
        self.logs, self.metrics = state.logs.total, state.metrics.total
        if sys.stderr.isatty() and state.total_steps:
            self._draw(state)
        else:
            for metric in new:
                self.line(progress_line(metric, state.total_steps))
        return state

    def _draw(self, state) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(
                total=state.total_steps,
                file=sys.stderr,
                disable=False,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
            )
        self.bar.total, self.bar.n = state.total_steps, state.step
        self.bar.set_description_str(
            _with_eta(log.values({n: state.latest(n) for n, _ in log.SHOWN}), state.eta), refresh=False
        )
        self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _newest(items, seen: int) -> list:
    """Those that came after the first ``seen``, as far as they are kept."""
    return items[-(items.total - seen) :] if items.total > seen else []


def progress_line(metric: dict, total: int) -> str:
    """One metric event as a line: step, loss, margin, KL, time left."""
    return _with_eta(log.step_line(metric, total), metric.get("eta"))


def _with_eta(text: str, eta: float | None) -> str:
    return f"{text}  eta {duration(eta)}" if eta else text


def wait_stopped(run, timeout: float) -> None:
    """Wait until a run that was asked to stop has ended.

    Raises:
        RunError: it has not within ``timeout`` seconds.
    """
    end = time.monotonic() + timeout
    while run.alive():
        if time.monotonic() > end:
            raise RunError(f"{run.id} is still finishing its step. Check again with: runs show {run.id}")
        time.sleep(POLL)
