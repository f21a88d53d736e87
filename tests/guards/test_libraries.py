"""Several threads that need transformers first, at the same moment: counting tokens, a run, a dry run."""

import subprocess
import sys

from kto_core import paths

SCRIPT = """
import sys, threading, time
from kto_core.guards import libraries
if sys.argv[2] == "bare":
    libraries.transformers_ready = lambda: None
from kto_core.models import load as model
problems = []
def load():
    try:
        model.load_tokenizer(sys.argv[1])
    except ImportError as e:
        problems.append(str(e))
threads = [threading.Thread(target=load) for _ in range(4)]
threads[0].start()
while "transformers" not in sys.modules:
    time.sleep(0.0005)
for t in threads[1:]:
    t.start()
for t in threads:
    t.join()
print(len(problems))
"""


def problems(model, how: str) -> int:
    command = [sys.executable, "-c", SCRIPT, str(model), how]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


def test_no_thread_gets_a_half_imported_library(tiny_model):
    assert problems(tiny_model, "safe") == 0
    assert problems(tiny_model, "bare") > 0, "without the lock this is a failure; the test would not see one otherwise"


LOADS = """
import sys, threading
from pathlib import Path
from transformers import PreTrainedModel
from kto_core.models import load
before, errors = PreTrainedModel.tie_weights, []
sys.setswitchinterval(1e-5)
def loads():
    try:
        for _ in range(12):
            load.load_whole(Path(sys.argv[1]))
    except Exception as e:
        errors.append(str(e)[:200])
threads = [threading.Thread(target=loads) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
assert PreTrainedModel.tie_weights is before and not errors, errors
print(0)
"""


def test_threads_that_load_at_once_leave_the_library_as_it_was(tiny_model):
    """Chat loads a model while a run does: each of them was told that tied weights were missing, until a restart."""
    command = [sys.executable, "-c", LOADS, str(tiny_model)]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
