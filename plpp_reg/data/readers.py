"""The papers' data sets as they lie on disk: one reader a format, the lists that CoOp's code makes of the same folder.

Where upstream takes a folder's files in the order in which the file system lists them, so does this (``_listed``): any other
order would pick other few-shot images.
"""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from plpp_reg.data import matlab
from plpp_reg.data.names import as_read, both
from plpp_reg.data.remarks import as_here, doubles, slashes
from plpp_reg.data.sampling import PARTS, DataSplit, Datum
from plpp_reg.data.table import Layout
from plpp_reg.errors import InputError
from plpp_reg.io.files import read_json, write_text
from plpp_reg.io.paths import is_utf8

SPLIT_SEED = 1  # upstream splits by the seed of whichever run came first; the papers' scripts begin with seed 1


class Row(NamedTuple):
    """One image of a list: its path below the layout's image folder, label, class name."""

    name: str
    label: int
    classname: str


Parts = tuple[Sequence[Row], Sequence[Row], Sequence[Row]]


def read(root: str | Path, layout: Layout) -> DataSplit:
    """A data set below ``root``: by its split file where it has one, else by its own files.

    A split that had to be made is kept under the split file's name, in upstream's format: upstream's code goes on with the
    same, and so does this code on a machine that lists folders in another order.

    Raises:
        InputError: a folder or file is missing or not what it should be; the message says where to get it.
    """
    folder = Path(os.path.expanduser(root)) / layout.folder
    images = folder / layout.images
    if not images.is_dir():
        where = f"plpp data get, or {layout.source}"
        raise InputError(f"{str(images)!r}: expected the images of this data set there (--root); get them: {where}")
    split = folder / layout.split
    if layout.split and split.is_file():
        return split_data(images, split)
    parts = read_own_files(folder, layout)
    if layout.split:
        _keep_split(split, parts, layout)
    return as_data(images, *parts)


def split_data(images: Path, split: Path) -> DataSplit:
    """What a split file says of the images below a folder; a file that somebody wrote by hand may have them in two places.

    Raises:
        InputError: what :func:`read_split` and :func:`as_data` refuse.
    """
    given = read_split(split)
    parts = [[row._replace(name=as_here(row.name, images)) for row in rows] for rows in given]
    data = as_data(images, *parts)
    turned = slashes([row.name for rows in given for row in rows], [row.name for rows in parts for row in rows])
    return replace(data, remarks=(*turned, *doubles(data)))


def read_own_files(folder: Path, layout: Layout) -> Parts:
    """Without a split file: what the data set's own lists and folders say, split as upstream splits."""
    for needed in layout.needs:
        if not (folder / needed).exists():
            split = f", or {layout.split}: {layout.split_source}" if layout.split else ""
            raise InputError(f"{str(folder / needed)!r}: expected this file of the data set; get it: {layout.source}{split}")
    try:
        return KINDS[layout.kind](folder, layout)
    except RuntimeError as e:
        raise InputError(f"{str(folder)!r}: {e}") from e
    except (OSError, UnicodeDecodeError, ValueError, KeyError, IndexError, TypeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{str(folder)!r}: expected this data set as it is published ({layout.source}), got {e!r}") from e


def read_split(path: Path) -> Parts:
    """``split_zhou_*.json``: ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``.

    Raises:
        InputError: it is something else, or its labels and class names do not belong together one to one.
    """
    content = read_json(path)
    lists = [content.get(part) if isinstance(content, dict) else None for part in PARTS]
    if not all(isinstance(rows, list) and all(map(_is_row, rows)) for rows in lists):
        raise InputError(f"{str(path)!r}: expected lists train, val and test of [path, label, class name], got something else")
    name_of: dict[int, str] = {}
    label_of: dict[str, int] = {}
    parts = tuple([Row(name, int(label), classname) for name, label, classname in rows] for rows in lists)
    for _, label, classname in (row for rows in parts for row in rows):
        if name_of.setdefault(label, classname) != classname:
            raise InputError(f"{str(path)!r}: expected one name of label {label}, got {name_of[label]!r} and {classname!r}")
        if label_of.setdefault(classname, label) != label:
            raise InputError(f"{str(path)!r}: expected one label of {classname!r}, got {label_of[classname]} and {label}")
    first: dict[tuple[int, ...], str] = {}
    for classname in label_of:
        if not (key := as_read(classname)):
            raise InputError(f"{str(path)!r}: expected class names, got {classname!r}, of which CLIP reads nothing")
        if first.setdefault(key, classname) != classname:
            raise InputError(f"{str(path)!r}: expected classes of different names, got {both(first[key], classname)}")
    return parts


def _is_row(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 3 or not all(type(text) is str and is_utf8(text) for text in row[::2]):
        return False
    return type(row[1]) is int or (type(row[1]) is str and re.fullmatch("[0-9]{1,9}", row[1]) is not None)


def split_text(parts: Parts) -> str:
    """A split file's content, byte for byte as upstream writes it."""
    content = {name: [list(row) for row in rows] for name, rows in zip(PARTS, parts, strict=True)}
    return json.dumps(content, indent=4, separators=(",", ": "))


def _keep_split(path: Path, parts: Parts, layout: Layout) -> None:
    try:
        write_text(path, split_text(parts))
        where = f"kept as {str(path)!r}"
    except OSError as e:
        where = f"which cannot be kept ({e})"
    warnings.warn(
        f"{layout.split} is not there: made a split as CoOp's code does with seed {SPLIT_SEED}, {where}. "
        f"It is not the papers' split; that is here: {layout.split_source}",
        stacklevel=2,
    )


def as_data(images: Path, *parts: Sequence[Row]) -> DataSplit:
    """Lists below an image folder as a data set; class names come from the training list, or where there is none the test's."""
    prefix = str(images)
    train, val, test = ([Datum(os.path.join(prefix, r.name), r.label, r.classname, r.name) for r in rows] for rows in parts)
    names = {row.label: row.classname for row in (parts[0] or parts[2])}
    for part, rows in zip(PARTS, parts, strict=True):
        stray = next((row for row in rows if row.label not in names), None)
        if stray is not None:
            raise InputError(
                f"{prefix!r}: expected training images of class {stray.classname!r}, got none, but some for {part}"
            )
        odd = next((row for row in rows if row.classname != names[row.label]), None)
        if odd is not None:
            two = f"{names[odd.label]!r} and {odd.classname!r}"
            raise InputError(f"{prefix!r}: expected one name of label {odd.label}, got {two} ({odd.name})")
    if sorted(names) != list(range(len(names))):
        gap = min(set(range(len(names))) - names.keys())
        raise InputError(f"{prefix!r}: expected training images of the labels 0 to {max(names)}, got none of label {gap}")
    return DataSplit(train, val, test, [names[label] for label in sorted(names)])


# ---- lists of files ----------------------------------------------------------------------------------------------------


def _listed(folder: Path) -> list[str]:
    """What is not hidden, in the file system's order."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_classnames(path: Path) -> dict[str, str]:
    """ImageNet's classnames.txt: ``n01440764 tench`` a line, in the file's order."""
    return dict(line.partition(" ")[::2] for line in _lines(path))


# ---- splitting ---------------------------------------------------------------------------------------------------------


def split_three(groups: Iterable[tuple[int, str, list[str]]], rng: random.Random) -> Parts:
    """(label, class name, names) of each class, shuffled and cut into half, a fifth and the rest."""
    train, val, test = [], [], []
    for label, classname, names in groups:
        rng.shuffle(names)
        n_train, n_val = round(len(names) * 0.5), round(len(names) * 0.2)
        if not 0 < n_val <= n_train < len(names) - n_val:
            raise InputError(f"class {classname!r}: expected enough images to train, choose and test on, got {len(names)}")
        rows = [Row(name, label, classname) for name in names]
        train += rows[:n_train]
        val += rows[n_train : n_train + n_val]
        test += rows[n_train + n_val :]
    return train, val, test


def split_two(rows: Sequence[Row], rng: random.Random) -> tuple[list[Row], list[Row]]:
    """A list for training into training and a fifth of each class for choosing, classes in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.label, []).append(index)
    train, val = [], []
    for indices in groups.values():
        rng.shuffle(indices)
        n_val = round(len(indices) * 0.2)
        if not n_val:
            classname = rows[indices[0]].classname
            raise InputError(f"class {classname!r}: expected enough images to take a fifth for choosing, got {len(indices)}")
        val += [rows[i] for i in indices[:n_val]]
        train += [rows[i] for i in indices[n_val:]]
    return train, val


def _train_val_test(trainval: Sequence[Row], test: Sequence[Row]) -> Parts:
    return (*split_two(trainval, random.Random(SPLIT_SEED)), test)


# ---- one function a format ---------------------------------------------------------------------------------------------


def _class_folders(folder: Path, layout: Layout) -> Parts:
    images = folder / layout.images

    def groups() -> Iterable[tuple[int, str, list[str]]]:
        for label, category in enumerate(sorted(c for c in _listed(images) if c not in layout.ignored)):
            names = [f"{category}/{name}" for name in _listed(images / category)]
            yield label, layout.renamed.get(category, category), names

    return split_three(groups(), random.Random(SPLIT_SEED))


def _pets(folder: Path, layout: Layout) -> Parts:
    def rows(file: str) -> list[Row]:
        found = []
        for line in _lines(folder / "annotations" / file):
            name, label, _, _ = line.split(" ")
            found.append(Row(f"{name}.jpg", int(label) - 1, name.rpartition("_")[0].lower()))
        return found

    return _train_val_test(rows("trainval.txt"), rows("test.txt"))


def _cars(folder: Path, layout: Layout) -> Parts:
    devkit = folder / "devkit"
    test = folder / "cars_test_annos_withlabels.mat"
    files = [(devkit / "cars_meta.mat", "class_names"), (devkit / "cars_train_annos.mat", "annotations"), (test, "annotations")]
    (named,), *annotated = matlab.read(files)
    names = [str(name[0]) for name in named]

    def rows(images: str, cars: Sequence[Mapping]) -> list[Row]:
        found = []
        for car in cars:
            label = int(car["class"][0][0]) - 1
            make_and_model, _, year = names[label].rpartition(" ")
            found.append(Row(f"{images}/{car['fname'][0]}", label, f"{year} {make_and_model}"))
        return found

    (train,), (test_cars,) = annotated
    return _train_val_test(rows("cars_train", train), rows("cars_test", test_cars))


def _flowers(folder: Path, layout: Layout) -> Parts:
    classnames = read_json(folder / "cat_to_name.json")
    groups: dict[int, list[str]] = {}
    ((labels,),) = matlab.read([(folder / "imagelabels.mat", "labels")])
    for index, label in enumerate(labels, start=1):
        groups.setdefault(int(label), []).append(f"image_{index:05d}.jpg")
    rows = ((label - 1, classnames[str(label)], names) for label, names in groups.items())
    return split_three(rows, random.Random(SPLIT_SEED))


def _aircraft(folder: Path, layout: Layout) -> Parts:
    label = {classname: i for i, classname in enumerate(_lines(folder / "variants.txt"))}

    def rows(part: str) -> list[Row]:
        pairs = (line.partition(" ")[::2] for line in _lines(folder / f"images_variant_{part}.txt"))
        return [Row(f"{name}.jpg", label[classname], classname) for name, classname in pairs]

    return rows("train"), rows("val"), rows("test")


def _sun(folder: Path, layout: Layout) -> Parts:
    label = {line[1:]: i for i, line in enumerate(_lines(folder / "ClassName.txt"))}  # without the leading slash

    def rows(file: str) -> list[Row]:
        found = []
        for line in _lines(folder / file):
            category = os.path.dirname(line[1:])  # a/abbey, or c/church/indoor: "indoor church"
            found.append(Row(line[1:], label[category], " ".join(reversed(category.split("/")[1:]))))
        return found

    return _train_val_test(rows("Training_01.txt"), rows("Testing_01.txt"))


def _ucf(folder: Path, layout: Layout) -> Parts:
    lists = folder / "ucfTrainTestlist"
    pairs = (line.split(" ") for line in _lines(lists / "classInd.txt"))
    label = {action: int(number) - 1 for number, action in pairs}

    def rows(file: str) -> list[Row]:
        found = []
        for line in _lines(lists / file):
            action, video = line.split(" ")[0].split("/")
            classname = "_".join(re.findall("[A-Z][^A-Z]*", action))
            found.append(Row(f"{classname}/{video.replace('.avi', '.jpg')}", label[action], classname))
        return found

    return _train_val_test(rows("trainlist01.txt"), rows("testlist01.txt"))


def _imagenet(folder: Path, layout: Layout) -> Parts:
    classnames = read_classnames(folder / "classnames.txt")
    # No validation part: upstream's is the test images, and choosing a model by them is not a choice offered here.
    return _wnids(folder / "images", "train", classnames), (), _wnids(folder / "images", "val", classnames)


def _imagenet_folders(folder: Path, layout: Layout) -> Parts:
    classnames = read_classnames(folder / "classnames.txt")
    return (), (), _wnids(folder / layout.images, "", classnames)


def _wnids(images: Path, part: str, classnames: Mapping[str, str]) -> list[Row]:
    """Folders n01440764, ... sorted; their classes are numbered as they come, whichever of ImageNet's thousand they are."""
    rows = []
    wnids = sorted(name for name in _listed(images / part) if (images / part / name).is_dir())
    for label, wnid in enumerate(wnids):
        if wnid not in classnames:
            raise InputError(f"{str(images / part / wnid)!r}: expected a folder of ImageNet's classnames.txt")
        place = f"{part}/{wnid}" if part else wnid
        rows += [Row(f"{place}/{name}", label, classnames[wnid]) for name in _listed(images / place)]
    return rows


def _imagenet_numbered(folder: Path, layout: Layout) -> Parts:
    """ImageNetV2: folders 0 to 999, by the line of classnames.txt."""
    rows = []
    for label, classname in enumerate(read_classnames(folder / "classnames.txt").values()):
        names = _listed(folder / layout.images / str(label))
        rows += [Row(f"{label}/{name}", label, classname) for name in names]
    return (), (), rows


KINDS: dict[str, Callable[[Path, Layout], Parts]] = {
    "class_folders": _class_folders,
    "pets": _pets,
    "cars": _cars,
    "flowers": _flowers,
    "aircraft": _aircraft,
    "sun": _sun,
    "ucf": _ucf,
    "imagenet": _imagenet,
    "imagenet_folders": _imagenet_folders,
    "imagenet_numbered": _imagenet_numbered,
}
