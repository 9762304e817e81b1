"""One malformed input: the command runs in this process, and everything that it says, writes, starts and fetches is seen."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from plpp_reg.commands import cli
from plpp_reg.data import download

import world
from inputs import Case

SECONDS = 120  # without an end
MEMORY = 8 * 2**30  # bytes more than there are at the start
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"}


class TooLong(BaseException):
    """No end in :data:`SECONDS`."""


class Watch:
    """What a case starts and fetches, by Python's own audit events."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in STARTS and "fc-list" not in str(args[0]):  # by which matplotlib finds its letters, once
            self.seen.append(f"starts a program: {event} {str(args)[:80]}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            raise ConnectionRefusedError(111, "no network in a campaign")


def snapshot(root: Path, without: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below ``root``: kind, size and time of a file.

    Caches are the program's own, and when a folder was last locked is the lock's: some versions of filelock empty it again.
    """
    found = {}
    for folder, folders, files in os.walk(root):
        if Path(folder) in (without, root / "cache"):
            folders.clear()
            continue
        for name in [*folders, *files]:
            status = os.lstat(os.path.join(folder, name))
            is_file = name in files
            time = status.st_mtime_ns if is_file and name != ".lock" else 0
            found[os.path.join(folder, name)] = (status.st_mode, status.st_size * is_file, time)
    return found


class Outcome(NamedTuple):
    status: int | None
    error: str
    wrong: list[str]


class Trial:
    """A world in a temporary folder, which is the current one meanwhile."""

    def __init__(self, root: Path, watch: Watch) -> None:
        self.root, self.watch, self.place = root, watch, root / "world"
        (root / "victim").mkdir()
        (root / "victim" / "mine").write_text("mine")
        world.make(self.place)
        (self.place / "loop").symlink_to("loop")
        trap = root / "victim" / "owned"
        (self.place / "victim_module.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).write_text('imported')\n")
        sys.path.append(str(self.place))

    def run(self, case: Case) -> Outcome:
        self._prepare(case)
        output = self.place / case.output
        before, inside = snapshot(self.root, output), snapshot(output, Path())
        self.watch.seen.clear()
        status, error, wrong = self._command(case)
        wrong += [] if case.starts else self.watch.seen
        after = snapshot(self.root, output)
        if changed := sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p)):
            wrong.append(f"changed {', '.join(os.path.relpath(p, self.root) for p in changed[:3])}")
        if status == 2 and not case.begun and inside != (now := snapshot(output, Path())):
            changed = sorted(p for p in inside.keys() | now.keys() if inside.get(p) != now.get(p))
            wrong.append(f"refused, but changed {', '.join(os.path.relpath(p, self.root) for p in changed[:3])}")
        if "Traceback" in error:
            wrong.append("a traceback")
        elif status == 2 and not (error.startswith("plpp: ") and error.endswith("\n") and error.count("\n") == 1):
            wrong.append("not one line")
        elif status == 0 and error and not case.argv[0] == "inspect":
            wrong.append("a success that complains")
        if status not in ((0, 1, 2) if case.failing else (0, 2)):
            wrong.append(f"status {status}")
        self._clear()
        return Outcome(status, error, wrong)

    def _prepare(self, case: Case) -> None:
        os.chdir(self.place)
        for name in ("in", "out"):
            (self.place / name).mkdir(exist_ok=True)
        for source, target in case.copies:
            shutil.copytree(source, target)
        for name, content in case.files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content)

    def _clear(self) -> None:
        os.chdir(self.place)
        for name in ("in", "out"):
            shutil.rmtree(self.place / name, ignore_errors=True)
        for path in (self.root / "victim").iterdir():
            if path.name != "mine":
                path.unlink()

    def _command(self, case: Case) -> tuple[int | None, str, list[str]]:
        """Exit status, what it said on standard error, and what else is wrong."""
        wrong: list[str] = []
        status: int | None = None
        with _captured() as said, _downloads(case.fetched), _limits(), warnings.catch_warnings():
            for category in (UserWarning, FutureWarning, RuntimeWarning):
                warnings.simplefilter("always", category)  # not once a process
            warnings.showwarning = _written
            self.watch.on = True
            try:
                status = cli.main(list(case.argv))
            except SystemExit as e:
                status = e.code
            except TooLong:
                wrong.append("no end")
            except BaseException as e:
                wrong.append(f"raises {type(e).__name__}: {' '.join(str(e).split())[:200]} at {_place_of(e)}")
            finally:
                self.watch.on = False
        return status, said(), wrong


def _written(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """As Python does by itself, which a test runner may have changed."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _place_of(error: BaseException) -> str:
    trace, last = error.__traceback__, ""
    while trace:
        name = trace.tb_frame.f_code.co_filename
        if "plpp_reg" in name or "trainers" in name:
            last = f"{os.path.basename(name)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return last


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Standard output and error as files, of libraries in C too; the function reads the latter."""
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        text = [""]
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        streams = [open(1, "w", closefd=False, encoding="utf-8"), open(2, "w", closefd=False, encoding="utf-8")]
        with mock.patch.object(sys, "stdout", streams[0]), mock.patch.object(sys, "stderr", streams[1]):
            try:
                yield lambda: text[0]
            finally:
                for stream in streams:
                    with contextlib.suppress(OSError):
                        stream.flush()
                for number, was in zip((1, 2), kept, strict=True):
                    os.dup2(was, number)
                    os.close(was)
                err.seek(0)
                text[0] = err.read().decode(errors="replace")


@contextlib.contextmanager
def _downloads(file: str) -> Iterator[None]:
    """``plpp data get`` is brought this file."""
    if not file:
        yield
        return
    remote = download.Remote(f"https://host/{Path(file).name}", Path(file).name, os.path.getsize(file), "md5", "0" * 32)
    whole = os.path.abspath(file)

    def fetch(remote: download.Remote, place: Path) -> Path:
        return Path(shutil.copy(whole, place / remote.name))

    with mock.patch.object(download, "_on_hub", lambda name: remote), mock.patch.object(download, "fetch", fetch):
        yield


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if os.path.exists("/proc/self/statm")
        else 0
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def elsewhere(root: Path) -> Iterator[None]:
    """The user's own caches and home out of reach, and everything as it was afterwards."""
    folder, path = os.getcwd(), list(sys.path)
    changed = {"HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "cache"), "MPLCONFIGDIR": str(root / "cache")}
    (root / "home").mkdir()
    (root / "cache").mkdir()
    with mock.patch.dict(os.environ, changed):
        try:
            yield
        finally:
            os.chdir(folder)
            sys.path[:] = path
