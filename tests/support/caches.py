"""A cache for each worker of a parallel test run, with the demo model made once, and what else is there already."""

import contextlib
import os
import shutil

from kto_core import paths
from kto_core.errors import KTOError
from kto_core.models.demo_model import demo_model_dir


def worker_cache(worker: str) -> str:
    """This worker's folder beside the usual cache; the demo model and the converter in it are hard links."""
    usual = paths.cache_dir()
    own = usual.with_name(f"{usual.name}-tests") / worker
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    with contextlib.suppress(KTOError):  # no network: the tests that need the model say so
        made = demo_model_dir()
        shutil.copytree(made, own / made.relative_to(usual), copy_function=os.link)
    if (converter := usual / "gguf-converter").is_dir():  # else the worker that needs it fetches it
        shutil.copytree(converter, own / converter.name, copy_function=os.link)
    return str(own)
