"""What stands in the files of a run's images: one hash of a list of images, remembered by their paths, sizes and times."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plpp_reg.data.emoji import cache_folder
from plpp_reg.data.sampling import Datum
from plpp_reg.errors import InputError
from plpp_reg.io.files import write_text
from plpp_reg.io.pictures import picture_stat

THREADS = 8  # that read: hashing and waiting for the disk go without Python's lock
JUST_NOW = 2 * 10**9  # nanoseconds: a file that is younger may change once more without another time
BLOCK = 2**20  # bytes
FOLDER = "contents"  # of the cache


def file_state(path: str) -> tuple[int, ...]:
    """What changes with a file's content: size, times and inode. Of the times one, that of the inode, cannot be set back.

    Raises:
        InputError: it cannot be looked at, or is no plain file.
    """
    stat = picture_stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def files_sha256(items: Sequence[Datum]) -> str:
    """Hash of which files these are, in order, with sizes and times: a file that was changed is another one."""
    digest = hashlib.sha256()
    folders: dict[str, str] = {}  # where each is; a path is resolved part by part, and most images share all but the last
    for item in items:
        folder, name = os.path.split(item.impath)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)
        real = os.path.realpath(path) if name in ("", ".", "..") or os.path.islink(path) else path
        digest.update(f"{(real, *file_state(item.impath))}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def contents_sha256(items: Sequence[Datum]) -> str:
    """Hash of a list of images: of each, in order, its name, label and class name, its size and the SHA-256 of its content.

    It is the same on every machine. Files are read once: as long as none of them has another size or time, the hash is the one
    that is remembered in the cache.

    Raises:
        InputError: a file cannot be read.
    """
    named = hashlib.sha256("".join(f"{d.name}\t{d.label}\t{d.classname}\n" for d in items).encode("utf-8", "surrogateescape"))
    youngest = max((max(file_state(datum.impath)[1:3]) for datum in items), default=0)
    memory = cache_folder() / FOLDER / f"{files_sha256(items)}-{named.hexdigest()}"
    if (kept := _remembered(memory)) is not None:
        return kept
    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        for datum, line in zip(items, pool.map(content, items), strict=True):
            text = f"{datum.name}\t{datum.label}\t{datum.classname}\t{line}\n"
            digest.update(text.encode("utf-8", "surrogateescape"))
    if time.time_ns() - youngest > JUST_NOW:
        with contextlib.suppress(OSError):  # a full disk or a folder that cannot be written: it is computed again
            write_text(memory, digest.hexdigest())
    return digest.hexdigest()


def _remembered(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def content(datum: Datum) -> str:
    """``size sha256`` of an image's file."""
    return " ".join(map(str, _size_and_sha256(datum.impath)))


def content_sha256(path: str) -> str:
    """Of what is in an image's file.

    Raises:
        InputError: it cannot be read.
    """
    return _size_and_sha256(path)[1]


def _size_and_sha256(path: str) -> tuple[int, str]:
    try:
        with open(path, "rb") as file:
            digest, size = hashlib.sha256(), 0
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
            return size, digest.hexdigest()
    except (OSError, ValueError) as e:
        raise InputError(f"image {path}: expected a readable picture, got {e}") from e


def forget_contents() -> None:
    """Remove what is remembered; it is computed again."""
    for path in (cache_folder() / FOLDER).glob("*"):
        with contextlib.suppress(OSError):
            path.unlink()
