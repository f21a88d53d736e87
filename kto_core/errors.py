"""The exceptions a user may meet. Every message is one or two sentences: what happened, and what to do.

KTOError
 ├─ DataError        a file, a row or a data set cannot be used
 │   └─ MapError     a column that was named is not in it
 ├─ ConfigError      one or more fields of a RunConfig are wrong (`problems` has them all)
 ├─ ModelError       a model cannot be found, read or trained
 │   ├─ NotServed    by the packed engine, that is; TRL's trainer may
 │   ├─ NotFinite    the loss became NaN
 │   └─ Unloaded     while somebody talked to it, or wanted to
 ├─ HardwareError    no GPU, not enough memory
 ├─ BusyError        the GPU, or a run, is in use by somebody else
 ├─ RunError         a run folder cannot be created, found, stopped or resumed
 ├─ DiskError        not enough free space, or a folder that cannot be written
 ├─ ExportError      merge, GGUF or check failed
 ├─ HubError         the Hub refused, or cannot be reached
 └─ Cancelled        the user stopped a long job (not a failure)
"""

from __future__ import annotations

import errno


class KTOError(Exception):
    """Base of all errors whose text is meant for the user."""


class DataError(KTOError):
    pass


class MapError(DataError):
    """A column that the user named is not in the data."""


class ConfigError(KTOError):
    """All problems of a configuration at once.

    Args:
        problems: one sentence each, naming the field and its valid range.
    """

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ModelError(KTOError):
    pass


class NotServed(ModelError):
    """The packed engine cannot train this architecture; TRL's trainer may."""


class NotFinite(ModelError):
    """The loss of a step is not a number."""


class Unloaded(ModelError):
    """The model was taken out of memory before the answer was complete."""


class HardwareError(KTOError):
    pass


class BusyError(KTOError):
    pass


class RunError(KTOError):
    pass


class DiskError(KTOError):
    @classmethod
    def of(cls, path: object, e: OSError) -> DiskError:
        """A file that could not be written, with the remedy that fits."""
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free up disk space, or choose another folder." if full else "Choose a folder that you can write to."
        return cls(f"{path} is not writable: {e.strerror}. {remedy}")


class ExportError(KTOError):
    pass


class HubError(KTOError):
    pass


class Cancelled(KTOError):
    pass


def first_line(e: BaseException) -> str:
    """The first line of an error's text, at most 300 characters; the error's type where it has no text."""
    lines = [line.strip() for line in str(e).strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__)[:300]
