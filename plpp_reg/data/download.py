"""``plpp data get NAME``: a data set's files, checked, unpacked into the folder that CoOp's code expects.

Two sources: one archive a data set on the Hugging Face Hub, laid out as CoOp's page has it and with the papers' split file; and
the publishers' own addresses and checksums as torchvision has them, mostly without the papers' split. The libraries themselves
begin again when the line is cut: here what came stays in ``ROOT/.plpp-get`` and is gone on from. Nothing stands under its final
name before it is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from plpp_reg.data import DATASETS, full_name, short_name
from plpp_reg.data.check import DIFFERENT, READY, check, look
from plpp_reg.data.own import own_kind
from plpp_reg.data.table import Layout
from plpp_reg.errors import InputError, install, unknown
from plpp_reg.io.archives import check_room, is_archive, unpack
from plpp_reg.io.files import locked

SOURCES = ("hub", "torchvision")
REPOSITORY = "zhengli97/prompt_learning_dataset"
HUB = {
    "Caltech101": "caltech-101.zip",
    "OxfordPets": "oxford_pets.zip",
    "StanfordCars": "stanford_cars.zip",
    "OxfordFlowers": "oxford_flowers.zip",
    "Food101": "food101.zip",
    "FGVCAircraft": "fgvc_aircraft.zip",
    "SUN397": "sun397.zip",
    "DescribableTextures": "dtd.zip",
    "EuroSAT": "eurosat.zip",
    "UCF101": "ucf101.zip",
    "ImageNetV2": "imagenetv2.zip",
    "ImageNetSketch": "imagenet-sketch.zip",
    "ImageNetA": "imagenet-adversarial.zip",
    "ImageNetR": "imagenet-rendition.zip",
}
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
_EUROSAT = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
# Addresses and MD5 sums as torchvision 0.29 has them; of FGVCAircraft's archive, whose sum it has not, its publisher's.
TORCHVISION: dict[str, tuple[tuple[str, str], ...]] = {
    "Caltech101": (("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip", "3138e1922a9193bfa496528edbbc45d0"),),
    "OxfordPets": (
        (_OXFORD + "pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
        (_OXFORD + "pets/data/annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f"),
    ),
    "OxfordFlowers": (
        (_OXFORD + "flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
        (_OXFORD + "flowers/102/imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
    ),
    "Food101": (("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87"),),
    "FGVCAircraft": ((_OXFORD + "fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", "d4acdd33327262359767eeaa97a4f732"),),
    "SUN397": (("http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz", "8ca2778205c41d23104230ba66911c7a"),),
    "DescribableTextures": ((_OXFORD + "dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1"),),
    "EuroSAT": ((_EUROSAT, "c8fa014336c82ac7804f0398fcb19387"),),
}

PLACE = ".plpp-get"
UNPACKED = 1.1  # of an archive's size, is what it holds: pictures are compressed already
TRIES, PAUSE, TIMEOUT = 5, 3.0, 60.0  # attempts in a row that bring nothing; seconds between them; seconds of silence
BLOCK = 2**20  # bytes
GIB = 2**30


class Remote(NamedTuple):
    """A file to get. ``size`` in bytes, None where the server does not say; ``digest`` by ``algorithm``."""

    url: str
    name: str
    size: int | None
    algorithm: str
    digest: str


def get(names: Sequence[str], root: str | Path, source: str = "hub") -> int:
    """Download data sets below ``root``, and print what ``plpp data check`` says of them.

    Returns:
        Exit status, that of the check.

    Raises:
        InputError: no such data set or source; one that nobody may hand on; no room; another folder in its place; a line that
            stays cut; a file that is not the published one.
    """
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    root, names = Path(os.path.expanduser(root)), [full_name(name) for name in names]
    for name in names:
        _check_offered(name, source)
    for name in names:
        state = look(name, root).state
        if state != READY and not (state == DIFFERENT and source == "torchvision"):  # that one has no papers' splits
            _get(name, root, source)
        _clear(name, root)
    return check(root, names)


def _clear(name: str, root: Path) -> None:
    """What is left of getting a data set that is there now: of a killed process, or from the other source."""
    for source in SOURCES:
        place = root / PLACE / f"{short_name(name)}-{source}"
        if place.is_dir():
            with locked(place):
                pass  # nobody is at work in it
            _remove(place)


def _check_offered(name: str, source: str) -> None:
    if own_kind(name) or DATASETS[name].layout is None:
        raise InputError(f"data set {name!r}: expected one to download, it is {'your own' if own_kind(name) else 'embedded'}")
    if name not in (HUB if source == "hub" else TORCHVISION):
        other = "; --source hub has it" if name in HUB else ""
        raise InputError(f"{short_name(name)} is to be got by hand{other or ': ' + DATASETS[name].layout.source}")


def _get(name: str, root: Path, source: str) -> None:
    layout = DATASETS[name].layout
    target, place = root / layout.folder, root / PLACE / f"{short_name(name)}-{source}"
    if os.path.lexists(target):
        raise InputError(f"{str(target)!r}: something is there (see plpp data check); move it away, it is not overwritten")
    # asked before a folder is made
    files = [_on_hub(HUB[name])] if source == "hub" else [_published(*file) for file in TORCHVISION[name]]
    with locked(place):
        if os.path.lexists(target):
            return  # another process has got it meanwhile
        _check_room(place, files)
        archives = [fetch(file, place) for file in files]
        unpacked = place / "unpacked"
        try:
            _remove(unpacked)  # of a process that was killed in the middle of it
            for archive, file in zip(archives, files, strict=True):
                _unpack(archive, unpacked, file)
            os.replace(_laid_out(unpacked, layout), target)
        finally:
            _remove(unpacked)
        for archive in archives:
            archive.unlink()


# ---- what is there -----------------------------------------------------------------------------------------------------


def _on_hub(archive: str) -> Remote:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
    except ImportError as e:
        raise InputError(f"--source hub: expected huggingface_hub: {install('data')}; or --source torchvision") from e
    url = hf_hub_url(REPOSITORY, archive, endpoint=os.environ.get("HF_ENDPOINT") or None)
    for last in (False, True):  # twice: the client may go on with a connection that the server has closed in between
        try:
            known = get_hf_file_metadata(url)
            break
        except Exception as e:  # of the library's HTTP client, which is another one in each of its major versions
            if last or getattr(e, "response", None) is not None:
                raise InputError(f"{url}: expected an answer of the Hugging Face Hub, got {e}; or --source torchvision") from e
    if not re.fullmatch("[0-9a-f]{64}", known.etag or ""):
        raise InputError(f"{url}: expected the file's SHA-256, got {known.etag!r}")
    return Remote(url, archive, known.size, "sha256", known.etag)


def _published(url: str, md5: str) -> Remote:
    try:
        with _open(url) as answer:
            size = answer.headers.get("Content-Length")
    except (OSError, HTTPException) as e:
        raise InputError(f"{url}: expected this file, got {e}; or --source hub") from e
    return Remote(url, url.rpartition("/")[2], int(size) if size else None, "md5", md5)


def _open(url: str, start: int = 0):
    headers = {"User-Agent": "plpp-reg", "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    return urlopen(Request(url, headers=headers), timeout=TIMEOUT)


def _part(file: Remote, place: Path) -> Path:
    """Where a file is before it is whole; by its checksum, so that another version of it is not added to."""
    return place / f"{file.name}.{file.digest[:12]}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_room(place: Path, files: Sequence[Remote]) -> None:
    total = sum(file.size or 0 for file in files)
    there = sum(_size(place / file.name) or _size(_part(file, place)) for file in files)
    check_room(place, total - there + UNPACKED * total, f"{total / GIB:.2f} GiB of archives, and what they hold")


# ---- one file ----------------------------------------------------------------------------------------------------------


def fetch(file: Remote, place: Path) -> Path:
    """``place / file.name``, whole and with the right checksum; a part that is there is gone on from.

    Raises:
        InputError: the server has no such file, :data:`TRIES` attempts in a row brought nothing, or it is another file.
    """
    path, part = place / file.name, _part(file, place)
    if path.is_file():  # under this name it has been checked
        return path
    idle, before = 0, _size(part)
    while error := _transfer(file, part):
        idle = idle + 1 if _size(part) <= before else 0
        before = _size(part)
        if idle >= TRIES:
            where = f"at {before / GIB:.2f} GiB" + (f" of {file.size / GIB:.2f}" if file.size else "")
            raise InputError(f"{file.url}: the line broke {where} ({error}); the same command goes on from there")
        time.sleep(PAUSE)
    _verify(file, part)
    os.replace(part, path)
    return path


def _transfer(file: Remote, part: Path) -> str:
    """Add to ``part`` what is missing; "" when it is all there, else why the line ended."""
    start = _size(part) if file.size else 0  # without a size nobody knows whether the part is the whole
    if file.size and start >= file.size:
        return ""
    try:
        with _open(file.url, start) as answer:
            resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            _write(answer, part, "ab" if resumed else "wb", file, start if resumed else 0)
    except HTTPError as e:
        if e.code < 500 and e.code not in (408, 429):  # those two and the server's own faults pass
            raise InputError(f"{file.url}: expected this file, got {e}") from e
        return str(e)
    except (OSError, HTTPException) as e:
        return str(e) or type(e).__name__
    return "" if file.size in (None, _size(part)) else "closed by the server"


def _write(answer, part: Path, mode: str, file: Remote, start: int) -> None:
    bar = tqdm(total=file.size, initial=start, desc=file.name, unit="B", unit_scale=True, disable=None)
    with bar, part.open(mode) as out:
        while block := answer.read(BLOCK):
            try:
                out.write(block)
            except OSError as e:  # the disk's, not the line's
                raise InputError(f"{str(part)!r}: expected to write there, got {e}") from e
            bar.update(len(block))


def _verify(file: Remote, part: Path) -> None:
    digest = hashlib.new(file.algorithm, usedforsecurity=False)
    with part.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    if (found := digest.hexdigest()) != file.digest:
        part.unlink()
        raise InputError(
            f"{file.url}: expected {file.algorithm} {file.digest}, got {found}: removed; try again, or another --source"
        )


# ---- unpacking ---------------------------------------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path, file: Remote) -> None:
    """Into ``folder``, nothing outside it; an archive within it too (Caltech101's). What is no archive is copied."""
    try:
        if not is_archive(archive):
            folder.mkdir(exist_ok=True)
            shutil.copy2(archive, folder / archive.name)
            return
        unpack(archive, folder)
        for inner in sorted(folder.rglob("*.tar.gz")):
            unpack(inner, inner.parent)
            inner.unlink()
    except (InputError, OSError) as e:
        raise InputError(f"{file.url}: {e}") from e


def _laid_out(unpacked: Path, layout: Layout) -> Path:
    """The folder among what was unpacked that is the data set's."""

    def holds(folder: Path) -> bool:
        if layout.images:
            return (folder / layout.images).is_dir()
        return any((folder / name).exists() for name in (layout.split, *layout.needs))

    below = [path for depth in ("*", "*/*") for path in sorted(unpacked.glob(depth)) if path.is_dir()]
    for folder in (unpacked / layout.folder, unpacked, *below):
        if holds(folder):
            return folder
    there = ", ".join(sorted(path.name for path in unpacked.iterdir())[:5])
    raise InputError(f"expected an archive that holds {layout.images or layout.split}, got one of {there}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
