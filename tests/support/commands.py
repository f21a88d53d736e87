"""Commands of the command line, in a process of their own or in this one."""

import resource
import subprocess
import sys

from kto_core import cli, paths

ROWS = [
    {"prompt": f"Question {i}?", "completion": "Yes." if i % 2 else "It depends on many things.", "label": i % 2 == 1}
    for i in range(16)
]


def command(*args, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kto_core", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=paths.ROOT,
        timeout=300,
        **more,
    )


def processor_seconds(*command) -> tuple[subprocess.CompletedProcess, float]:
    """A command that ends well, run from the project's folder, and the time of the processor that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def called(capsys, *args) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err
