"""``folder:PATH``: a folder a class, or folders train, val and test with a folder a class in each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from plpp_reg.data.names import as_read, both, plain_name
from plpp_reg.data.parts import PART_NAMES, as_own_data, part_named, split_classes
from plpp_reg.data.readers import Row
from plpp_reg.data.remarks import counted_endings, some
from plpp_reg.data.sampling import DataSplit
from plpp_reg.errors import InputError
from plpp_reg.io.paths import is_utf8
from plpp_reg.io.pictures import is_hidden, is_picture

Classes = dict[str, list[str]]  # class name -> pictures, relative to the data set's folder


class Inside(NamedTuple):
    """The names in a folder that are not hidden, sorted."""

    folders: list[str]
    pictures: list[str]
    others: list[str]  # no pictures by their endings, pipes, links that lead nowhere


def inside(folder: Path) -> Inside:
    """
    Raises:
        InputError: a name that is not UTF-8.
    """
    found = Inside([], [], [])
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if is_hidden(name):
            continue
        if not is_utf8(name):
            raise InputError(f"{str(folder)!r}: expected names of files in UTF-8, got {name!r}: rename it")
        (found.folders if path.is_dir() else found.pictures if is_picture(path) else found.others).append(name)
    return found


@dataclass
class Unused:
    """What lies in a data set's folder and is no part of it."""

    folders: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # in no class's folder
    others: list[str] = field(default_factory=list)  # no pictures

    def remarks(self) -> list[str]:
        found = [some(self.folders, "folder")] if self.folders else []
        found += [f"{some(self.pictures, 'picture')} in no class's folder"] if self.pictures else []
        found += [counted_endings(self.others)] if self.others else []
        return [f"not used: {what}" for what in found]


def read_folder(path: Path) -> DataSplit:
    """``PATH/<class>/*.jpg``, or the same below ``PATH/train``, ``PATH/test`` and ``PATH/val``, of which any may be missing.

    Parts have the names of :data:`plpp_reg.data.parts.PART_NAMES`, in capitals or not. Class names are the folders' names,
    ``_`` read as a space; what CLIP reads as one name is one class in every part. Without parts, each class is split
    50 : 20 : 30.

    Raises:
        InputError: no such folder, no pictures in one, two classes of one part that CLIP reads as one, a class that training
            has not.
    """
    where = f"folder:{path}"
    if not path.is_dir():
        raise InputError(f"{where}: expected a folder with one folder a class in it, got none")
    top = inside(path)
    unused = Unused(pictures=list(top.pictures), others=list(top.others))
    part_folders = _parts(path, top.folders, where)
    if not part_folders:
        classes = dict(sorted(_classes(path, "", top.folders, unused, where).items()))
        made = split_classes(classes, where)
        return as_own_data(path, made.parts, list(classes), [*made.remarks, *unused.remarks()])
    unused.folders += [name for name in top.folders if name not in part_folders.values()]
    parts: dict[str, Classes] = {}
    for part, folder in part_folders.items():
        found = inside(path / folder)
        unused.pictures += [f"{folder}/{name}" for name in found.pictures]
        unused.others += found.others
        parts[part] = _classes(path, folder, found.folders, unused, where)
    return _numbered(path, parts, unused.remarks(), where)


def _parts(path: Path, folders: Sequence[str], where: str) -> dict[str, str]:
    """Part -> its folder. What has a part's name, pictures and no folders in it is a class of that name."""
    named = {name: part for name in folders if (part := part_named(name))}
    parts: dict[str, str] = {}
    for name, part in named.items():
        held = inside(path / name)
        if held.folders or not held.pictures:
            if part in parts:
                raise InputError(f"{where}: expected one folder for {part}, got two: {parts[part]!r} and {name!r}")
            parts[part] = name
    if named and not parts and len(named) == len(folders):
        first = str(path / next(iter(named)))
        raise InputError(f"{where}: expected one folder a class in {first!r}, got pictures alone")
    return {part: parts[part] for part in PART_NAMES if part in parts}


def _classes(path: Path, part: str, folders: Sequence[str], unused: Unused, where: str) -> Classes:
    """Of one part, or of all where ``part`` is empty."""
    found: Classes = {}
    first: dict[tuple[int, ...], str] = {}
    for folder in folders:
        classname = plain_name(folder)
        if not (key := as_read(classname)):
            raise InputError(f"{where}: expected a class's name, got a folder {folder!r}, of which CLIP reads nothing")
        if key in first:
            raise InputError(f"{where}: expected classes of different names, got {both(first[key], folder)}")
        first[key], place = folder, "/".join(filter(None, (part, folder)))
        held = inside(path / place)
        if not held.pictures:
            got = [some(held.folders, "folder")] if held.folders else []
            got += [counted_endings(held.others)] if held.others else []
            raise InputError(f"{where}: expected pictures in {str(path / place)!r}, got {' and '.join(got) or 'none'}")
        unused.folders += [f"{place}/{name}" for name in held.folders]
        unused.others += held.others
        found[classname] = [f"{place}/{name}" for name in held.pictures]
    if not found:
        raise InputError(f"{where}: expected one folder a class in {str(path / part)!r}, got none")
    return found


def _numbered(path: Path, parts: Mapping[str, Classes], remarks: list[str], where: str) -> DataSplit:
    """Labels by the sorted names of the training classes; where there are none, of those of the other parts."""
    spelled: dict[tuple[int, ...], str] = {}
    for part, classes in parts.items():
        for name in classes:
            if "train" in parts and part != "train" and as_read(name) not in spelled:
                raise InputError(f"{where}: expected the classes of train in {part} too, got another: {name!r}")
            spelled.setdefault(as_read(name), name)
    label = {name: i for i, name in enumerate(sorted(spelled.values()))}
    rows: list[list[Row]] = []
    for part in PART_NAMES:
        given = {spelled[as_read(name)]: pictures for name, pictures in parts.get(part, {}).items()}
        rows.append([Row(picture, label[c], c) for c in sorted(given) for picture in given[c]])
        missing = [name for name in label if name not in given]
        if given and missing:
            remarks.append(f"no pictures for {part}: {some(missing, 'class', 'classes')}")
    return as_own_data(path, rows, list(label), remarks)
