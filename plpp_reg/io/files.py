"""Files that are whole or not there, and a folder that one process works in."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from plpp_reg.errors import InputError, InUse

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

A_DAY = 24 * 3600.0  # seconds: no file is being written that long
MOST_VALUES, MOST_LEVELS = 100_000, 32  # of a YAML file
TEMPORARY = ".tmp"  # what the name of a file that is not whole ends in; it begins with a dot


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """``write`` to a temporary file beside ``path``, then rename it: at any moment the old file or the new one is there.

    What a killed process left of the same file is written over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), _temporary(path) as temporary:
        try:
            write(temporary)
            with temporary.open("r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError that is raised in it names ``path``: a full disk's names none, and of a temporary file nobody has heard."""
    try:
        yield
    except OSError as e:
        if e.errno is None or e.filename == str(path):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that this process alone writes to: always the same one, another one where that is being written.

    Its file is locked until it is whole, so that what a killed process left is told from what another one is writing.
    """
    place = path.with_name(f".{path.name}{TEMPORARY}")
    lock = _lock(place, os.O_CREAT)
    if lock is None:
        place = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
        lock = _lock(place, os.O_CREAT | os.O_EXCL)
    try:
        yield place
    finally:
        if lock is not None:
            os.close(lock)


def _lock(path: Path, flags: int) -> int | None:
    """The file, open and locked; None where another process has it, where it is no plain file, or where there are no locks."""
    if fcntl is None:
        return None
    lock = None
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here, there = os.fstat(lock), os.stat(path, follow_symlinks=False)  # it may have been renamed in between
        if stat.S_ISREG(here.st_mode) and (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            return lock
    except OSError:
        pass
    if lock is not None:
        os.close(lock)
    return None


def left_behind(folder: str | Path) -> list[Path]:
    """The temporary files in a folder that no process is writing."""
    with contextlib.suppress(OSError):
        return [path for path in Path(folder).glob(f".*{TEMPORARY}") if _abandoned(path)]
    return []


def clear_left_behind(folder: str | Path) -> int:
    """Remove what killed processes left half-written in a folder, not below it; how many files there were."""
    paths = left_behind(folder)
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
    return len(paths)


def _abandoned(path: Path) -> bool:
    if (lock := _lock(path, 0)) is not None:
        os.close(lock)
        return True
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime >= A_DAY  # what cannot be locked tells nothing but its age
    return False


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file.

    Not safetensors' own writer: its temporary file has a name of its own and stays when it is killed, and a full disk is
    no OSError there. The price is two copies of the tensors in memory meanwhile.
    """
    from safetensors.torch import save

    on_cpu = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda p: p.write_bytes(save(on_cpu, dict(metadata))))


def read_json(path: str | Path) -> object:
    """What a JSON file says.

    Raises:
        InputError: there is no plain file, it is no JSON, or it is nested deeper than Python reads.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe in its place would be waited for
            raise InputError(f"{str(path)!r}: expected a file, got none")
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' tools put a mark in front
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{str(path)!r}: expected JSON, got {type(e).__name__}: {' '.join(str(e).split())}") from e


def read_yaml(path: str | Path, what: str) -> object:
    """What a YAML file says; ``what`` it is, for the message.

    Raises:
        InputError: it cannot be read, is no YAML, contains itself, or unfolds to more than any configuration holds.
    """
    import yaml

    where = f"{what} {str(path)!r}"
    try:
        content = copy.deepcopy(_parsed(Path(path).read_text(encoding="utf-8")))  # who asked may change it
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{where}: expected a readable YAML file, got {type(e).__name__}: {e}") from e
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as e:
        # a number of 5,000 digits, a date that is none, lists in lists without end: PyYAML lets Python's own errors through
        raise InputError(f"{where}: expected YAML, got {' '.join(str(e).split())[:300]}") from e
    left, level = MOST_VALUES, [content]
    for _ in range(MOST_LEVELS):  # an alias is one object however often it stands there
        if not level or left < 0:
            break
        below = (_values(value) for value in level if isinstance(value, (dict, list)))
        level = list(itertools.islice(itertools.chain.from_iterable(below), left + 1))
        left -= len(level)
    if level or left < 0:
        raise InputError(f"{where}: expected a configuration, got one that contains itself or more than any holds")
    return content


@functools.lru_cache(maxsize=128)  # every run of a plan reads the same few recipes
def _parsed(text: str) -> object:
    import yaml

    return yaml.safe_load(text)


def _values(value: dict | list) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda p: p.write_bytes(text.encode()))  # the same bytes on every system


@contextlib.contextmanager
def locked(folder: str | Path, wait: float = 0.0) -> Iterator[None]:
    """The folder, made if need be, for this thread alone, which may ask again; the system frees it when the process dies.

    ``wait``: seconds until another process must have left it.
    """
    lock = FileLock(os.path.abspath(Path(folder) / ".lock"), is_singleton=True)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait)
    except Timeout as e:  # an OSError too
        raise InUse(f"output folder {str(folder)!r}: another process is working in it; wait, or name another") from e
    except OSError as e:
        raise InputError(f"output folder {str(folder)!r}: expected a folder to write in, got {e}") from e
    try:
        yield
    finally:
        lock.release()
