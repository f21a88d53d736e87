"""Background work on data sets: read, count tokens, convert. One job for each thing asked, shared by all pages.

The pages only look: `look` says what is known of a data set now and starts what is missing. Nothing here blocks.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from kto_core import jobs, paths
from kto_core.data import dataset, pages
from kto_core.errors import DataError, KTOError, ModelError
from kto_core.paths import is_hub_id
from kto_studio.shared import data_sources, readings

from . import view

BIG = 4 * 2**20  # bytes; the first page of a bigger file is shown before the rest is read
KEEP = 8  # reports in tokens, and tokenizers, kept in memory
DEMO = "demo"

_lock = threading.Lock()
_jobs: dict[tuple, jobs.Job] = {}
_first: OrderedDict[tuple, list[dict]] = OrderedDict()
_reports: OrderedDict[tuple, dataset.Report] = OrderedDict()
_tokenizers: OrderedDict[str, object] = OrderedDict()
_drawn: OrderedDict[tuple, tuple] = OrderedDict()
_columns: OrderedDict[str, list[str]] = OrderedDict()  # of data sets that were read, however they were read


@dataclass
class Look:
    """What is known of a data set now. ``signature`` changes whenever anything else here does, progress left aside."""

    data_id: str = ""
    loaded: dataset.Loaded | None = None
    first: list[dict] | None = None  # the first page, while the rest is read
    report: dataset.Report | None = None  # in tokens if they were counted, else in characters
    tokenizer: object = None
    reading: jobs.Job | None = None
    counting: jobs.Job | None = None
    problem: str = ""
    signature: tuple = ()


def look(data_id: str, model: str = "", max_length: int | None = None, *, start: bool = True) -> Look:
    """What can be shown now; with ``start``, reading and counting begin by themselves if they have not been tried."""
    out = Look(data_id)
    try:
        key = data_sources.key(data_id)
    except (KTOError, OSError) as e:
        out.problem = str(e) if data_id else ""
        out.signature = (data_id, out.problem)
        return out
    out.loaded = data_sources.peek(data_id)
    out.reading = _jobs.get(("read", key))
    if out.loaded is None and (out.reading is None or out.reading.state == "done") and start:
        out.reading = read(data_id)
        out.loaded = data_sources.peek(data_id)
    out.first = _first.get(key)
    if out.loaded is not None:
        count_key = (*key, model, max_length)
        out.report = _reports.get(count_key) or out.loaded.report
        out.tokenizer = _tokenizers.get(model)
        out.counting = _jobs.get(("count", count_key))
        untried = count_key not in _reports and (out.counting is None or out.counting.state == "done")
        if start and untried and out.loaded.report.kept and at_hand(model):
            out.counting = count(data_id, model, max_length)
    states = [j.state if j else "" for j in (out.reading, out.counting)]
    out.signature = (key, model, max_length, out.loaded is not None, bool(out.first), id(out.report), *states)
    return out


def _once(key: tuple, name: str, work) -> jobs.Job:
    """The job of ``key`` that runs now, or a new one."""
    with _lock:
        job = _jobs.get(key)
        if job is None or not job.running:
            for old in [k for k, j in _jobs.items() if not j.running][:-50]:
                del _jobs[old]
            job = _jobs[key] = jobs.start(name, work)
        return job


def _keep(store: OrderedDict, key, value) -> None:
    with _lock:
        store[key] = value
        while len(store) > KEEP:
            store.popitem(last=False)


# ---- reading


def read(data_id: str) -> jobs.Job:
    """Read a data set into memory; the first page of a big file is there at once.

    Raises:
        DataError: see `sources.locate`.
    """
    key = data_sources.key(data_id)

    def work(progress, cancel):

        if not data_id.startswith("hub:") and Path(key[0]).stat().st_size > BIG:
            _keep(_first, key, pages.preview(key[0], key[1], **readings.keywords(data_id)))
        loaded = data_sources.load(data_id, progress, cancel)
        _keep(_columns, data_id, loaded.report.columns)
        _write_report(data_id, loaded.report)
        chart(loaded.report, None)

    return _once(("read", key), f"Data Reading {data_sources.name(data_id)}", work)


def columns(data_id: str) -> list[str]:
    """The columns of a data set as it was read last; [] if it never was."""
    return _columns.get(data_id, [])


# ---- counting tokens


def at_hand(model: str) -> bool:
    """Whether tokens can be counted without asking anybody for a tokenizer (the demo model brings its own)."""
    from kto_core.models.hub_files import cached_folder

    if model == DEMO or model in _tokenizers:
        return True
    try:
        return bool(_allowed(model) and cached_folder(model))
    except ModelError:  # counting says what is wrong with it
        return False


def _allowed(model: str) -> bool:
    """Hub ids only: a page never names a folder of this machine."""
    return is_hub_id(model or "") and not Path(model).exists()


def count(data_id: str, model: str, max_length: int | None) -> jobs.Job:
    """Count the tokens of every row of a loaded data set.

    Raises:
        DataError: nothing is loaded.
        ModelError: not a model's name.
    """
    if model != DEMO and not _allowed(model):
        raise ModelError("Enter the model's Hub id as owner/name, or choose one from the list.")
    key, loaded = data_sources.key(data_id), data_sources.peek(data_id)
    if loaded is None:
        raise DataError("The dataset is still being read. Wait until it is finished, then try again.")

    def work(progress, cancel):
        from kto_core.data import dataset

        tokenizer = _tokenizer(model, progress, cancel)
        report = dataset.check(loaded, tokenizer, max_length, progress=progress, cancel=cancel)
        _write_report(data_id, report, f"{model}-{max_length}")
        chart(report, max_length)
        _keep(_reports, (*key, model, max_length), report)

    return _once(
        ("count", (*key, model, max_length)), f"Data Counting the tokens of {data_sources.name(data_id)}", work
    )


def _tokenizer(model: str, progress, cancel):
    from kto_core.models import facts
    from kto_core.models import load as models

    if model not in _tokenizers:
        progress(None, "Loading the tokenizer…")
        facts.resolve_model(model, progress, cancel)  # the demo model is made here, once, with progress
        _keep(_tokenizers, model, models.load_tokenizer(model, progress, cancel))
    return _tokenizers[model]


def chart(report, max_length: int | None) -> str:
    """`data_view.chart`, drawn once for a report, in the job that made it."""
    key = (id(report), max_length)
    with _lock:
        held = _drawn.get(key)
    if held is None or held[0] is not report:
        held = (report, view.chart(report, max_length))
        _keep(_drawn, key, held)
    return held[1]


# ---- files made here


def made_file(data_id: str, ending: str) -> Path:
    """Where a file made of a data set lies: in the data folder, apart from the data sets."""
    kind, _, rest = data_id.partition(":")
    stem = re.sub(r"\.(jsonl|json|csv|tsv|parquet)(\.gz)?$", "", rest, flags=re.IGNORECASE)
    return paths.data_dir() / "made" / kind / (re.sub(r"[^\w.-]+", "_", stem) + ending)


def report_file(data_id: str, model: str, max_length: int | None) -> Path | None:
    """The report to download: in tokens if they were counted; None if there is nothing to report."""
    for extra in (f"{model}-{max_length}", ""):
        path = _report_path(data_id, extra)
        if path.is_file():
            return path
    return None


def _report_path(data_id: str, extra: str = "") -> Path:
    if reading := readings.of(data_id):
        extra += "-" + hashlib.sha256(repr(sorted(reading.items())).encode()).hexdigest()[:8]
    extra = re.sub(r"[^\w.-]+", "_", extra)
    return made_file(data_id, f"-report{'-' if extra else ''}{extra}.csv")


def _write_report(data_id: str, report, extra: str = "") -> None:
    from kto_core.data import dataset

    path = _report_path(data_id, extra)
    if report.issues:
        dataset.write_issues(report, path)
    else:
        path.unlink(missing_ok=True)


def convert(data_id: str, form: str) -> jobs.Job:
    """Write a loaded data set as JSONL in TRL's form or ChatML; the job's result is the path.

    Raises:
        DataError: nothing is loaded, or an unknown form.
    """
    from kto_core.data import dataset

    loaded = data_sources.peek(data_id)
    if loaded is None:
        raise DataError("The dataset is still being read. Wait until it is finished, then try again.")
    if form not in dataset.FORMS:
        raise DataError("Choose TRL or ChatML.")
    path = made_file(data_id, f"-{form}.jsonl")

    def work(progress, cancel):
        return dataset.save(loaded.rows, path, form, progress=progress, cancel=cancel)

    return _once(("convert", data_sources.key(data_id), form), f"Data Converting {data_sources.name(data_id)}", work)


def converted(data_id: str, form: str) -> jobs.Job | None:
    """The conversion of the data set as it is now, if one was asked for."""
    try:
        return _jobs.get(("convert", data_sources.key(data_id), form))
    except (KTOError, OSError):
        return None
