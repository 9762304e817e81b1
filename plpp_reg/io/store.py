"""Tensors that are computed once: image features, and later what a teacher says of them.

A file is named by the hash of what it was computed from, so there is nothing to invalidate: other weights, pictures or
settings have another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plpp_reg.errors import InputError
from plpp_reg.io.files import TEMPORARY, clear_left_behind, write_tensors

SUFFIX = ".safetensors"
MOST_GIB = 2**32


class Entry(NamedTuple):
    """A file of the store."""

    path: Path
    size: int  # bytes
    used: float  # when it was last read or written, seconds since the epoch


class TensorStore:
    """A folder of safetensors files, read through memory maps, the longest unused removed when it grows over its bound.

    Any number of processes may use one folder: files are whole or not there, and two that compute the same write the same.
    A file that is cut short or damaged is computed again.

    Args:
        folder: where the files are; made when the first one is written.
        max_gib: bound on their size together; 0: nothing is kept.
    """

    def __init__(self, folder: str | Path, max_gib: float) -> None:
        if not 0 <= max_gib <= MOST_GIB:
            raise InputError(f"FEATURES.MAX_GIB: expected a number of GiB, 0 to {MOST_GIB}, got {max_gib}")
        self.folder, self.max_bytes = Path(folder), int(max_gib * 2**30)

    def get(self, what: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors computed from ``what`` (plain values, JSON): read, or else computed and kept."""
        tensors = self.find(what)
        if tensors is None:
            tensors = {name: t.contiguous() for name, t in compute().items()}
            self.keep(what, tensors)
        return tensors

    def find(self, what: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """What is kept of ``what``; None if nothing is."""
        path, key = self._place(what)
        tensors = _read(path, key) if self.max_bytes else None
        if tensors is not None:
            with contextlib.suppress(OSError):
                os.utime(path)
        return tensors

    def keep(self, what: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep what was computed from ``what``, if there is room for it."""
        path, key = self._place(what)
        if sum(t.nbytes for t in tensors.values()) <= self.max_bytes:
            with contextlib.suppress(OSError):  # a full disk or a folder that cannot be written: the run goes on without
                write_tensors(path, tensors, {"what": key, "sha256": _digest(tensors)})
                self.trim(keep=path)

    def _place(self, what: Mapping[str, Any]) -> tuple[Path, str]:
        key = json.dumps(what, sort_keys=True)
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + SUFFIX), key

    def entries(self) -> list[Entry]:
        """What is there, longest unused first."""
        return sorted(self._files("*" + SUFFIX), key=lambda entry: entry.used)

    def halves(self) -> list[Entry]:
        """What is being written, and what killed processes left half-written."""
        return list(self._files(f".*{SUFFIX}*{TEMPORARY}"))

    def _files(self, pattern: str) -> Iterator[Entry]:
        for path in self.folder.glob(pattern):
            with contextlib.suppress(OSError):  # another process has removed it
                stat = path.stat()
                yield Entry(path, stat.st_size, stat.st_mtime)

    def trim(self, keep: Path | None = None) -> None:
        """Remove the longest unused files until the bound holds; ``keep`` stays, and so does what is being written."""
        clear_left_behind(self.folder)
        entries = self.entries()
        excess = sum(entry.size for entry in (*entries, *self.halves())) - self.max_bytes
        for entry in entries:
            if excess <= 0:
                return
            if entry.path != keep and _remove(entry.path):
                excess -= entry.size

    def clear(self) -> int:
        """Remove every file, also what a killed process left half-written; how many whole ones there were."""
        clear_left_behind(self.folder)
        return sum(_remove(entry.path) for entry in self.entries())


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return True
    except OSError:  # in use, where the system does not allow that
        return False
    return True


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """safetensors has no checksum of its own."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None where there is no whole file of ``key``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("what") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return tensors if _digest(tensors) == metadata.get("sha256") else None
    except (OSError, SafetensorError):
        return None
