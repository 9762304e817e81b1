"""New processes at the price of a fork: a server has imported torch, and for most tests this package, and nothing is used yet.

A process is as one of ``python -c CODE ARGUMENT…``, but for the modules that are there already; multiprocessing's own servers
are forks of it. Who asks what a new interpreter loads, or how long it takes, starts one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, Any, NamedTuple

TESTS = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch", "torch.utils.tensorboard", "torchvision.transforms", "yacs.config", "numpy", "PIL.Image"]
PACKAGE = ["plpp_reg.commands.run", "plpp_reg.experiments.executors", "plpp_reg.trainers.coop", "clip"]
PLPP = "import sys; from plpp_reg.commands.cli import main; sys.exit(main())"
# python -m plpp_reg.dassl …, with ``package=False``; runpy imports the package before the module runs, with these words
DASSL = """
import sys
words, sys.argv, sys.orig_argv = sys.argv, ["-m"], ["python", "-m", "plpp_reg.dassl"]
import plpp_reg.dassl
assert "dassl" not in sys.modules
sys.argv = words
from plpp_reg.dassl.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
File = IO[Any] | int | None


class Process:
    """As ``subprocess.Popen``, as far as tests use it."""

    def __init__(self, server: socket.socket, wanted: dict[str, Any], stdin: File, stdout: File, stderr: File) -> None:
        self.returncode: int | None = None
        self.stdin = self.stdout = self.stderr = None
        with contextlib.ExitStack() as opened:
            files = []
            for number, file in enumerate((stdin, stdout, stderr)):
                if file == DEVNULL:
                    file = opened.enter_context(open(os.devnull, "r+"))
                if file == PIPE:
                    ends = os.pipe()
                    ours, file = ends if number else reversed(ends)
                    opened.callback(os.close, file)
                    setattr(self, ("stdin", "stdout", "stderr")[number], open(ours, "r" if number else "w"))
                files.append(number if file is None else file if isinstance(file, int) else file.fileno())
            status, written = os.pipe()
            opened.callback(os.close, written)
            socket.send_fds(server, [json.dumps(wanted).encode() + b"\n"], [*files, written])
        self.status = open(status, "rb", buffering=0)
        self.pid = int(self.status.readline())

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.status], [], [], timeout)[0]:
            self.returncode = int(self.status.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server(NamedTuple):
    """Where one asks it, and the server itself, which ends when this process does."""

    channel: socket.socket
    process: Process | subprocess.Popen


@functools.cache
def _server(*modules: str) -> Server:
    """One that has imported the libraries and these modules: a fork of that which has the libraries alone."""
    here, there = socket.socketpair()
    with there:
        if modules:
            return Server(here, _process(_server(), {"modules": modules}, there, None, None))
        words = [sys.executable, str(Path(__file__).with_name("fork_server.py")), *LIBRARIES]
        threads = {"OMP_NUM_THREADS": "1"}  # read once, when torch is imported: in a fork it is too late
        return Server(here, subprocess.Popen(words, stdin=there, env={**os.environ, **threads}))


def _process(server: Server, wanted: dict[str, Any], *files: File) -> Process:
    usual = {"modules": [], "code": "", "argv": [], "path": [], "start_new_session": False}
    return Process(server.channel, {**usual, "env": dict(os.environ), "cwd": os.getcwd(), **wanted}, *files)


@contextlib.contextmanager
def started(
    code: str,
    *argv: str,
    path: Sequence[str | Path] = (TESTS,),
    env: Mapping[str, str | None] = {},  # noqa: B006
    cwd: str | Path = ".",
    stdin: File = DEVNULL,
    stdout: File = None,
    stderr: File = None,
    start_new_session: bool = False,
    package: bool = True,
) -> Iterator[Process | subprocess.Popen]:
    """``code`` at work; in the end it is killed.

    Args:
        path: what comes first of all that can be imported.
        env: variables beside those of this process; None: not that one.
        package: whether ``plpp_reg`` is imported already.
    """
    changed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path)), **env}
    environment = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    code = textwrap.dedent(code)
    if hasattr(os, "fork"):
        wanted = {"code": code, "argv": argv, "path": [str(p) for p in path], "env": environment}
        wanted |= {"cwd": str(Path(cwd).resolve()), "start_new_session": start_new_session}
        process = _process(_server(*PACKAGE) if package else _server(), wanted, stdin, stdout, stderr)
    else:
        files = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        process = subprocess.Popen([sys.executable, "-c", code, *argv], env=environment, cwd=cwd, text=True, **files)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for file in (process.stdin, process.stdout, process.stderr):
            if file is not None:
                file.close()


def run(code: str, *argv: str, timeout: float = 240, **options: Any) -> subprocess.CompletedProcess:
    """``code`` to its end, and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with started(code, *argv, **{"stdout": out, "stderr": err, **options}) as process:
            process.wait(timeout)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(argv, process.returncode, out.read(), err.read())


def until(true: Callable[[], object], seconds: float = 300) -> None:
    """Wait for it; ``seconds`` are for what never happens, since a busy machine takes long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
