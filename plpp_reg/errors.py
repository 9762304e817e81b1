"""One kind of error for bad input: a single line, with the nearest valid choice. The command line exits with status 2 on it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# What torch, and the loading of its libraries, say where there is no memory.
NO_MEMORY = ("can't allocate memory", "bad_alloc", "failed to map segment")
# What torch says where a worker's batch finds no room in shared memory.
NO_SHARED_MEMORY = ("shared memory", "</torch_", "Bus error")


class InputError(ValueError):
    """What a user gave cannot be used; the message says what was expected, what came, and what would do."""

    def __init__(self, message: str) -> None:
        # A loader's worker hands its error over with the whole traceback as message; the line stands at its end.
        super().__init__(message.rsplit(f"{InputError.__module__}.InputError: ", 1)[-1].strip())


class InUse(InputError):
    """Another process works in this folder: what is in it is that one's to write."""


def line_of(error: BaseException) -> str | None:
    """The line that a user reads of an error that they or the machine caused; None of a fault of the program's.

    >>> print(line_of(PermissionError(13, "Permission denied", "out/result.json")))
    'out/result.json': expected a file or folder that can be used, got PermissionError: Permission denied
    >>> line_of(KeyError("x")) is None
    True
    """
    text = " ".join((str(error).strip().splitlines() or [""])[-1].split())  # a loader's worker hands over its whole traceback
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cause = "expected room on the disk, got none: free some, and the same command goes on from what is there"
        else:
            what = type(error).__name__ + (f": {error.strerror}" if error.errno else f": {text.rpartition('Error: ')[2]}")
            cause = f"expected a file or folder that can be used, got {what}"
        return f"{str(error.filename)!r}: {cause}" if error.filename is not None else cause
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(s in str(error) for s in NO_MEMORY):
        return (
            f"expected more memory, got {text or 'none'}: smaller batches (DATALOADER.TRAIN_X.BATCH_SIZE and TEST's) take less"
        )
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_SHARED_MEMORY):
        return "expected room in /dev/shm for what the loader's workers hand over: enlarge it, or DATALOADER.NUM_WORKERS 0"
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
        return f"expected the loader's workers to live, got {text}: DATALOADER.NUM_WORKERS 0 does without them"
    return None


def unknown(what: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is none of ``choices``, with the nearest of them.

    >>> print(unknown("trainer", "Coop", ["ZeroshotCLIP", "CoOp"]))
    unknown trainer 'Coop': did you mean 'CoOp'? (known: CoOp, ZeroshotCLIP)
    """
    known = sorted(choices)
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    hint = f": did you mean {lower[close[0]]!r}?" if close else ""
    shown = f" (known: {', '.join(known)})" if len(known) <= 16 else ""
    return InputError(f"unknown {what} {name!r}{hint}{shown}")


def install(extra: str) -> str:
    """The command that installs what a part needs: the package is on no index, so it is installed from its clone."""
    return f'pip install -e ".[{extra}]" (in the clone of plpp-reg)'
