"""Hostile archives, each a function of the folder that it aims at; and what is said of it."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

Made = tuple[bytes, str]


def tar(*members: tuple[str, bytes, bytes | str]) -> bytes:
    """Members as (name, type, content or where a link leads)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname, content = content, b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def file(name: str, content: bytes = b"owned") -> tuple[str, bytes, bytes]:
    return name, tarfile.REGTYPE, content


def link(name: str, to: str | Path, kind: bytes = tarfile.SYMTYPE) -> tuple[str, bytes, str]:
    return name, kind, str(to)


def folder(name: str) -> tuple[str, bytes, bytes]:
    return name, tarfile.DIRTYPE, b""


def chain(victim: Path) -> bytes:
    """CVE-2025-4517: the real path of a long chain of links is not resolved to its end, so the filter lets it pass."""
    step, members, path = "d" * 247, [], ""
    for letter in "abcdefghijklmnop":
        members += [folder(os.path.join(path, step)), link(os.path.join(path, letter), step)]
        path = os.path.join(path, letter)
    long = os.path.join("/".join("abcdefghijklmnop"), "l" * 254)
    up = "../" * 16
    members += [link(long, up), link("escape", f"{long}/../../../../../../../..{victim}"), file("escape/mine")]
    return tar(*members)


def zipped(*members: tuple[zipfile.ZipInfo | str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for info, content in members:
            archive.writestr(info, content)
    return buffer.getvalue()


def zip_link(name: str, to: str) -> bytes:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return zipped((info, to.encode()))


def patched(content: bytes, at: Sequence[tuple[bytes, int]], value: int) -> bytes:
    """A two-byte number in the local and in the central header of a zip's only member: ``at`` are (signature, offset)."""
    changed = bytearray(content)
    for signature, offset in at:
        place = content.index(signature) + offset
        changed[place : place + 2] = struct.pack("<H", value)
    return bytes(changed)


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
ONLY = "regular files and folders only"
OUTSIDE = "a place outside the archive's folder"
NONE = "expected an archive that can be unpacked"
ONE = ("dtd/images/a.jpg", b"picture")

EVIL: dict[str, Callable[[Path], Made]] = {
    "dots": lambda victim: (tar(file("../../../../../victim/mine")), OUTSIDE),
    "dots within": lambda victim: (tar(folder("dtd"), file("dtd/../../../../../../victim/mine")), OUTSIDE),
    "absolute": lambda victim: (tar(file(f"{victim}/mine")), OUTSIDE),
    "backslashes": lambda victim: (tar(file("..\\..\\..\\victim\\mine")), OUTSIDE),
    "drive": lambda victim: (tar(file("C:\\victim\\mine")), OUTSIDE),
    "link": lambda victim: (tar(link("out", victim), file("out/mine")), ONLY),
    "link after its use": lambda victim: (tar(file("out"), link("out", victim), file("out/mine")), ONLY),
    "link within": lambda victim: (tar(file("a"), link("b", "a")), ONLY),
    "hard link": lambda victim: (tar(link("mine", victim / "mine", tarfile.LNKTYPE), file("mine")), ONLY),
    "chain of links": lambda victim: (chain(victim), ONLY),
    "fifo": lambda victim: (tar(("pipe", tarfile.FIFOTYPE, b"")), ONLY),
    "device": lambda victim: (tar(("null", tarfile.CHRTYPE, b"")), ONLY),
    "file in place of a folder": lambda victim: (tar(file("dtd"), file("dtd/images/a.jpg")), NONE),
    "name too long": lambda victim: (tar(file("d/" + "a" * 300)), NONE),
    "NUL in a name": lambda victim: (
        zipped(ONE).replace(b"dtd/images", b"dtd\0images"),
        "expected an archive that holds images",
    ),
    "cut": lambda victim: ((whole := tar(file("dtd/a", os.urandom(9999))))[: len(whole) // 2], NONE),
    "damaged": lambda victim: ((whole := tar(file("dtd/a", os.urandom(9999))))[:5000] + b"\0" * 99 + whole[5099:], NONE),
    "empty": lambda victim: (b"", NONE),
    "words": lambda victim: (b"<html>404</html>", NONE),
    "zip: dots": lambda victim: (zipped(("../../../../../victim/mine", b"owned")), OUTSIDE),
    "zip: absolute": lambda victim: (zipped((f"{victim}/mine", b"owned")), OUTSIDE),
    "zip: link": lambda victim: (zip_link("out", str(victim)), ONLY),
    "zip: encrypted": lambda victim: (patched(zipped(ONE), [(LOCAL, 6), (CENTRAL, 8)], 1), "an encrypted one"),
    "zip: unknown method": lambda victim: (patched(zipped(ONE), [(LOCAL, 8), (CENTRAL, 10)], 77), NONE),
    "zip: wrong checksum": lambda victim: (zipped(ONE).replace(b"picture", b"picturf"), NONE),
    "zip: file in place of a folder": lambda victim: (zipped(("dtd", b"file"), ONE), NONE),
    "zip: cut": lambda victim: (zipped(ONE)[:40], NONE),
    "zip: size lies": lambda victim: (zipped(("dtd/a", bytes(9999)), method=8).replace(b"\x0f\x27", b"\x01\x00"), NONE),
}
