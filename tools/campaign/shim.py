"""A shim that counts a process's file operations, and kills it before one of them or in the middle of what it writes.

Python tells an audit hook of each file that it opens, renames or removes before it does so. What is written by a library's own
code is caught too: a limit on the size of files is set when one is opened, and the kernel kills at the byte that goes over it.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.link": 1, "os.symlink": 1, "os.truncate": 0}


class Operation(NamedTuple):
    """``size``: of the file when it got its name, or in the end; only of one that was opened to be written. ``before``: of the
    file as it was opened."""

    event: str
    path: str
    before: int = 0
    size: int = 0


def operations(below: str, act: Callable[[int, Operation], None]) -> None:
    """From here on ``act`` on each of this process's file operations below a folder, before it is done; counted from 1.

    There is no way back: for a process that was forked for it.
    """
    count = itertools.count(1)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in EVENTS:
            path = args[EVENTS[event]]
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)) and (name := os.path.abspath(os.fsdecode(path))).startswith(below):
            act(next(count), Operation(event, name, os.stat(name).st_size if os.path.isfile(name) else 0))

    sys.addaudithook(hook)


def recorded(below: str) -> list[Operation]:
    """The list that all operations from here on are added to; :func:`with_sizes` completes it."""
    found: list[Operation] = []

    def act(number: int, operation: Operation) -> None:
        found.append(operation)
        if operation.event == "os.rename":
            _note_size(found, operation.path)

    operations(below, act)
    return found


def with_sizes(found: list[Operation]) -> list[Operation]:
    """When all is done: the sizes of files that were written where they are."""
    for path in {operation.path for operation in found}:
        _note_size(found, path)
    return found


def _note_size(found: list[Operation], path: str) -> None:
    """The last opening of a file that found less in it wrote what it holds."""
    if os.path.isfile(path):
        size = os.path.getsize(path)
        for i in range(len(found) - 1, -1, -1):
            if found[i].event == "open" and found[i].path == path and found[i].before < size:
                if not found[i].size:
                    found[i] = found[i]._replace(size=size)
                return


def kill_before(below: str, number: int) -> None:
    """SIGKILL before the ``number``-th operation."""
    operations(below, lambda n, operation: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)


def kill_within(below: str, number: int, size: int) -> None:
    """The kernel's signal when a file grows over ``size`` bytes, from the ``number``-th operation on, which opens one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def act(n: int, operation: Operation) -> None:
        if n == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    operations(below, act)
