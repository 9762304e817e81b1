"""Archives are unpacked member by member: regular files and folders, below one folder, nothing else.

Not by ``extractall``: before Python 3.10.18, 3.11.13, 3.12.11 and 3.13.4 tarfile's own filter is led outside by a chain of
links (CVE-2025-4517). Here no link is ever made, so none can be followed.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from plpp_reg.errors import InputError

TAR_ENDINGS = (".tar.gz", ".tgz")
GIB = 2**30
ENCRYPTED = 0x1  # of a zip member's flag bits


def is_archive(path: str | Path) -> bool:
    """Whether :func:`unpack` would unpack a file, by its name."""
    return str(path).lower().endswith((".zip", *TAR_ENDINGS))


def unpack(archive: str | Path, folder: str | Path) -> None:
    """What a ``.zip``, ``.tar.gz`` or ``.tgz`` holds, below ``folder``, which is made.

    A member that is a link or a device, or whose place is outside ``folder``, is refused, and the archive with it: what was
    unpacked before it stays, and is the caller's to remove.

    Raises:
        InputError: no whole archive, a member that is refused, encrypted or compressed in a way that Python does not know, or
            no room for it.
    """
    archive, folder = Path(archive), Path(folder)
    read = _unpack_zip if archive.suffix.lower() == ".zip" else _unpack_tar
    try:
        folder.mkdir(parents=True, exist_ok=True)
        read(archive, folder)
    except InputError:
        raise
    except Exception as e:  # each decompressor has errors of its own, and zipfile raises RuntimeError too
        raise InputError(f"{archive.name}: expected an archive that can be unpacked, got {type(e).__name__}: {e}") from e


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        check_room(folder, sum(member.file_size for member in members), f"what {archive.name} holds")
        for member in members:
            kind = (member.external_attr >> 16) & 0o170000  # as Unix has it; 0 where the archive does not say
            if kind not in (0, 0o040000, 0o100000):
                raise _refused(archive, member.filename, "a link or a device")
            if member.flag_bits & ENCRYPTED:
                raise _refused(archive, member.filename, "an encrypted one")
            _make(archive, folder, member.filename, member.is_dir(), lambda m=member: opened.open(m))


def _unpack_tar(archive: Path, folder: Path) -> None:
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
        for member in opened:
            if not (member.isreg() or member.isdir()):
                raise _refused(archive, member.name, "a link or a device")
            check_room(folder, member.size, f"{member.name!r} of {archive.name}")
            _make(archive, folder, member.name, member.isdir(), lambda m=member: opened.extractfile(m))
        while stream.read(2**20):  # to its end, where the checksum stands
            pass


def _make(archive: Path, folder: Path, name: str, is_folder: bool, read: Callable[[], IO[bytes] | None]) -> None:
    """One member, at its name below ``folder``."""
    place = _place(archive, folder, name)
    if is_folder:
        place.mkdir(parents=True, exist_ok=True)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with read() as content, place.open("wb") as file:
        shutil.copyfileobj(content, file, 2**20)


def _place(archive: Path, folder: Path, name: str) -> Path:
    """Where a member goes: below ``folder``, by its name and by its real path."""
    outside = name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name) or ".." in re.split(r"[\\/]", name)
    place = folder.joinpath(*name.split("/"))
    if outside or not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder)):
        raise _refused(archive, name, "a place outside the archive's folder")
    return place


def _refused(archive: Path, name: str, what: str) -> InputError:
    return InputError(f"{archive.name}: expected an archive that holds regular files and folders only, got {what}: {name!r}")


def check_room(folder: str | Path, size: float, what: str) -> None:
    """Refuse what is larger than the disk's free room.

    Raises:
        InputError: fewer than ``size`` bytes are free where ``folder`` is.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{str(folder)!r}: expected {size / GIB:.2f} GiB free for {what}, got {free / GIB:.2f}")
