"""``python -m kto_core.worker RUN_DIR``: train one run in this process. Started by `workers`, or by accelerate.

Everything is told through the run's events; what is printed goes to the run's ``worker.log``. Exit code 0 when the run
finished or was stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kto_core.worker", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--lock-fd", type=int, help="inherited open file that holds the run's lock")
    args = parser.parse_args(argv)

    from kto_core.config.resolving import load_config
    from kto_core.errors import KTOError
    from kto_core.runs import locks, ranks
    from kto_core.runs.events import EventLog, state_of

    # a closed terminal must not end a run that outlives the app; a polite kill is a stop
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: (args.run_dir / "stop").touch())
    ranks.die_with_launcher()
    main_process = ranks.rank() == 0
    if args.lock_fd is not None and main_process:
        locks.adopt(args.run_dir, args.lock_fd)
    events = EventLog(args.run_dir / "events.jsonl")
    try:
        config = load_config(args.run_dir / "config.yaml").config
        if config.engine == "unsloth":
            from kto_core.models.unsloth_load import import_first
            from kto_core.planning.checks import check_libraries

            check_libraries(config)
            import_first()
        from .train import train

        train(config, args.run_dir, end_on_second_stop=True)
        if not main_process:  # how it ended is the main process's to say, and it may not have said it yet
            return 0
    except KTOError as e:
        if not main_process:
            if not isinstance(e, ranks.LostError):
                ranks.note_error(args.run_dir, str(e))
            return 1
        events.append("error", message=str(e), type=type(e).__name__)
        events.status("failed", message=str(e))
    state = state_of(events.path).state
    return 0 if state in ("finished", "stopped") else 1


def run() -> None:
    """`main` as a process of its own: ends it."""
    code = main()
    from kto_core.runs import ranks

    ranks.end_process(code) if ranks.several() else sys.exit(code)
