"""A process that has imported what takes long to import, and forks when it is asked for a process: see ``processes.py``.

    python fork_server.py MODULE…

Its standard input is the socket on which it is asked, for another server too, which imports more. It has imported modules, and
used none: no thread runs and nothing was differentiated when it forks. It ends with the process that started it. The servers
that multiprocessing starts in a process of its are forks of that process, with its state.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import itertools
import json
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

LARGEST = 2**20  # bytes that are received at once
INSTALLED = sys.path[1:]  # without this file's folder
spawnv_passfds = multiprocessing.util.spawnv_passfds
UNWRITTEN: list[TextIO] = []  # of the process that this is a fork of: at its end each would write here, too, what is left in it


def asked(channel: socket.socket) -> tuple[bytes, list[int]]:
    """A line, and the files that came with it: standard input, output and error, and where the status is to be written."""
    line, files, *_ = socket.recv_fds(channel, LARGEST, 4)
    while line and not line.endswith(b"\n"):
        line += channel.recv(LARGEST)
    return line, files


def new_process(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Returns in each new process: what was asked for, and its standard files.

    A process in between waits for it: it writes the process's number, and how it ended.
    """
    while True:
        line, files = asked(channel)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not line:
            os._exit(0)
        if not os.fork():
            *standard, status = files
            process = os.fork()
            if not process:
                os.close(status)
                channel.detach()
                return json.loads(line), standard
            for file in standard:
                os.close(file)
            try:
                os.write(status, b"%d\n" % process)
                os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
            finally:
                os._exit(0)
        for file in files:
            os.close(file)


def become(wanted: dict[str, Any], standard: list[int]) -> None:
    """Be as a Python that has just been started so."""
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    if wanted["start_new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    sys.path[:] = ["", *wanted["path"], *INSTALLED]
    sys.argv[:] = ["-c", *wanted["argv"]]
    open_standard()
    sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")  # the latter: of multiprocessing
    multiprocessing.util.spawnv_passfds = fork


def open_standard() -> None:
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def fork(path: str, words: Sequence[str], files: Sequence[int]) -> int:
    """In place of ``multiprocessing.util.spawnv_passfds`` where that starts a server, ``python … -c CODE``, with files open.

    So a sweep's own server of forks need import nothing.
    """
    if words[-2] != "-c":  # a process of start method "spawn"
        return spawnv_passfds(path, words, files)
    asking = os.getpid()
    try:
        if process := os.fork():
            return process
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        gc.freeze()  # the collector closes by its number nothing that the asking process has opened
        kept = sorted({0, 1, 2, *files})  # multiprocessing's close_all_fds_except would close all of them, for the 0
        for file, following in itertools.pairwise([*kept, os.sysconf("SC_OPEN_MAX")]):
            os.closerange(file + 1, following)
        UNWRITTEN.extend((sys.stdout, sys.stderr))
        open_standard()
        multiprocessing.forkserver._forkserver.__init__()
        multiprocessing.resource_tracker._resource_tracker.__init__()
        sys.argv[:] = ["-c"]
        sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")
        os._exit(run(words[-1]))
    finally:
        if os.getpid() != asking:
            os._exit(1)


def run(code: str) -> int:
    """The exit status, as Python has it."""
    try:
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as e:
        if e.code is not None and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status: int) -> NoReturn:
    """As Python does, but for taking all modules apart: that takes ten times as long as a fork."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as e:
            print(f"Exception ignored in: {stream}: {e}", file=sys.stderr)
            status = 120
    os._exit(status)


def main(modules: list[str]) -> None:
    sys.path[:] = INSTALLED
    sys.dont_write_bytecode = True  # a test looks at what stands in the folders
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in modules:
                importlib.import_module(name)
        for finalizer in list(weakref.finalize._registry):
            finalizer.atexit = False  # torch would take its tables of operators apart: what is imported is left as it is
        gc.collect()
        gc.freeze()
        wanted, standard = new_process(socket.socket(fileno=0))
        signal.signal(signal.SIGINT, signal.SIG_IGN if wanted["modules"] else signal.default_int_handler)
        become(wanted, standard)
        if not (modules := wanted["modules"]):
            break
    end(run(wanted["code"]))


if __name__ == "__main__":
    main(sys.argv[1:])
