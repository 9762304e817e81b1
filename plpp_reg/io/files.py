"""Files that are whole or not there, and a folder that one process works in."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from plpp_reg.errors import InputError, InUse


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """``write`` to a temporary file beside ``path``, then rename it: at any moment the old file or the new one is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp: its files are unreadable to one's group; not the process number alone: two machines may share a disk
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        write(temporary)
        with temporary.open("r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file.

    Not safetensors' own writer: its temporary file has a name of its own and stays when it is killed, and a full disk is
    no OSError there. The price is two copies of the tensors in memory meanwhile.
    """
    from safetensors.torch import save

    on_cpu = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda p: p.write_bytes(save(on_cpu, dict(metadata))))


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda p: p.write_bytes(text.encode()))  # the same bytes on every system


@contextlib.contextmanager
def locked(folder: str | Path, wait: float = 0.0) -> Iterator[None]:
    """The folder, made if need be, for this process alone; the operating system frees it when the process dies.

    ``wait``: seconds until another process must have left it.
    """
    lock = FileLock(Path(folder) / ".lock")
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
