"""The verdict at a run's end: what `evaluate RUN` says, in the log. Whatever happens to it, the run has finished."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core.errors import Cancelled, KTOError
from kto_core.jobs import duration
from kto_core.runs import ranks

from .context import StatusProgress

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.planning.training_data import Planned
    from kto_core.runs.events import EventLog
    from kto_core.runs.stopping import StopWatch


def judge(config: RunConfig, run_dir: Path, events: EventLog, watch: StopWatch, planned: Planned) -> None:
    """Measure the saved adapter on the rows that the run held out, log the verdict, keep it in the run's folder.

    To be called when the trainer is gone, in the main process only: the model is loaded once more.
    """
    from kto_core.chat import evaluate
    from kto_core.runs.run import Run
    from kto_core.verdict import wording

    later = f"`evaluate {run_dir.name}` judges it."
    if not config.verdict or not planned.test:
        return
    if ranks.several():
        events.log(f"A run on several GPUs is not judged at its end. {later}")
        return
    if config.engine == "unsloth":
        events.log(f"A run with Unsloth is not judged at its end. {later}")
        return
    watch.on_now = None  # nothing is left to lose, and the run is finished
    started, progress = time.monotonic(), StatusProgress(events, "training", "Verdict: ")
    progress(None, "is this run better than before?")
    try:
        result = evaluate.evaluate(Run(run_dir), planned=planned, progress=progress, cancel=watch.asked)
    except Cancelled:
        events.log(f"The verdict was stopped; the run is finished. {later}")
        return
    except Exception as e:  # the adapter is saved, and a number that is missing takes nothing from it
        if not isinstance(e, KTOError):
            traceback.print_exc()  # into worker.log, or the app's terminal
        why = str(e) if isinstance(e, KTOError) else f"{type(e).__name__}: {str(e)[:300]}."
        events.log(f"There is no verdict. {why}", "warning")
        return
    for name, text in wording.lines(result):
        events.log(f"{name}: {text}")
    for remark in result["remarks"]:
        events.log(remark)
    took = duration(time.monotonic() - started)
    events.log(f"Verdict after {took}. {result['verdict']['sentence']}")
