"""Data of one's own: ``folder:PATH``, a folder a class, and ``csv:PATH``, a line an image. Nothing is written beside it."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from plpp_reg.data.readers import PARTS, SPLIT_SEED, Parts, Row, as_data, split_three
from plpp_reg.data.sampling import DataSplit
from plpp_reg.errors import InputError
from plpp_reg.io.pictures import is_picture


def own_kind(name: str) -> str:
    """``"folder"`` or ``"csv"`` for ``folder:PATH`` and ``csv:PATH``; "" for any other data set's name."""
    kind, colon, _ = name.partition(":")
    return kind if colon and kind in READERS else ""


def read_own(name: str) -> DataSplit:
    """``folder:PATH`` or ``csv:PATH``. Labels follow the sorted class names, or the numbers of a csv's column ``label``."""
    kind, _, path = name.partition(":")
    return READERS[kind](Path(os.path.expanduser(path)))


def check_shots(data: DataSplit, shots: int, name: str) -> None:
    """One's own class with fewer training images than shots is an error; upstream's data sets keep what they have."""
    counts = dict.fromkeys(range(len(data.classnames)), 0)
    for item in data.train:
        counts[item.label] += 1
    for label, count in counts.items():
        if count < shots:
            raise InputError(
                f"data set {name!r}: expected at least {shots} training images of class {data.classnames[label]!r} for "
                f"{shots} shots (DATASET.NUM_SHOTS), got {count}"
            )


def read_folder(path: Path) -> DataSplit:
    """``PATH/<class>/*.jpg``, or ``PATH/train/<class>/*.jpg`` and test beside it, and val where there is one.

    Class names are the folders' names, ``_`` read as a space. Without train and test, each class is split 50 : 20 : 30.
    """
    if not path.is_dir():
        raise InputError(f"folder:{path}: expected a folder with one folder a class in it, got none")
    given = [part for part in PARTS if (path / part).is_dir()]
    if "train" not in given:
        return as_data(path, *_split(dict(sorted(_class_folders(path, "").items())), f"folder:{path}"))
    if "test" not in given:
        raise InputError(f"folder:{path}: expected a folder 'test' beside 'train', got only {', '.join(map(repr, given))}")
    parts = {part: _class_folders(path, part) if part in given else {} for part in PARTS}
    return _numbered(path, parts, f"folder:{path}")


def _class_folders(path: Path, part: str) -> dict[str, list[str]]:
    """Class name -> sorted pictures of it, relative to ``path``."""
    found: dict[str, list[str]] = {}
    folder_of: dict[str, str] = {}
    for folder in sorted(p.name for p in (path / part).iterdir() if p.is_dir() and not p.name.startswith(".")):
        classname = folder.replace("_", " ").strip()
        _one_name(classname, folder, folder_of, f"folder:{path}")
        inside = sorted(p.name for p in (path / part / folder).iterdir() if is_picture(p))
        if not inside:
            raise InputError(f"folder:{path}: expected pictures in {str(path / part / folder)!r}, got none")
        found[classname] = ["/".join(filter(None, (part, folder, name))) for name in inside]
    if not found:
        raise InputError(f"folder:{path}: expected one folder a class in {str(path / part)!r}, got none")
    return found


def _one_name(classname: str, given: str, given_as: dict[str, str], where: str) -> None:
    """Refuse two classes that read the same: CLIP could not tell them apart."""
    key = " ".join(classname.lower().split())
    if key in given_as and given_as[key] != given:
        raise InputError(f"{where}: expected classes of different names, got {given_as[key]!r} and {given!r}")
    given_as[key] = given


def _split(classes: Mapping[str, list[str]], where: str) -> Parts:
    """``classes``: name -> pictures, in the order of the labels."""
    groups = [(label, classname, list(names)) for label, (classname, names) in enumerate(classes.items())]
    try:
        return split_three(groups, random.Random(SPLIT_SEED))
    except InputError as e:
        raise InputError(f"{where}: {e}") from e


def _numbered(path: Path, parts: Mapping[str, Mapping[str, list[str]]], where: str) -> DataSplit:
    label = {classname: i for i, classname in enumerate(sorted(parts["train"]))}
    for part in ("val", "test"):
        for classname in parts[part]:
            if classname not in label:
                raise InputError(f"{where}: expected the classes of train in {part} too, got another: {classname!r}")
    rows = {p: [Row(name, label[c], c) for c in sorted(parts[p]) for name in parts[p][c]] for p in PARTS}
    return as_data(path, *rows.values())


class Line(NamedTuple):
    """A line of a csv file; ``at`` is where it stands."""

    at: str
    name: str
    classname: str
    number: int | None
    part: str


def read_csv(path: Path) -> DataSplit:
    """A table with the columns ``path`` (absolute, or relative to the table), ``class`` or ``label``, and perhaps ``split``.

    ``class`` (or ``classname``) is the class's name; with a column ``label`` of integers beside it, those order the classes.
    A ``label`` alone is the name. ``split`` is train, val or test; without that column each class is split 50 : 20 : 30.
    """
    where = f"csv:{path}"
    lines, has_split = _csv_lines(path, where)
    given_as: dict[str, str] = {}
    numbers: dict[str, int | None] = {}
    for line in lines:
        _one_name(line.classname, line.classname, given_as, line.at)
        if numbers.setdefault(line.classname, line.number) != line.number:
            raise InputError(f"{line.at}: expected label {numbers[line.classname]} of {line.classname!r}, as above")
    if len(set(numbers.values()) - {None}) not in (0, len(numbers)):
        raise InputError(f"{where}: expected labels of their own for {len(numbers)} classes, got two classes with one")
    order = sorted(numbers, key=lambda c: (numbers[c] or 0, c))
    if not has_split:
        classes = {c: sorted(line.name for line in lines if line.classname == c) for c in order}
        return as_data(path.parent, *_split(classes, where))
    label = {classname: i for i, classname in enumerate(order)}
    parts = ([Row(x.name, label[x.classname], x.classname) for x in lines if x.part == part] for part in PARTS)
    return as_data(path.parent, *parts)


def _csv_lines(path: Path, where: str) -> tuple[list[Line], bool]:
    """The table's lines, and whether it says which part each image belongs to."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            read = [(f"{where}, line {reader.line_num}", line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{where}: expected a readable CSV file, got {e}") from e
    name_column = next((c for c in ("class", "classname", "label") if c in columns), "")
    if "path" not in columns or not name_column:
        raise InputError(f"{where}: expected the columns path and class (or label), got {', '.join(columns) or 'none'}")
    if not read:
        raise InputError(f"{where}: expected a line an image below the header, got none")
    lines = []
    for at, line in read:
        cell = {column: (line[name] or "").strip() for column, name in columns.items()}
        classname = cell[name_column].replace("_", " ")
        if not (path.parent / cell["path"]).is_file():
            raise InputError(f"{at}: expected a picture's path, got {cell['path']!r}, which is not a file")
        if not classname:
            raise InputError(f"{at}: expected a class name, got none")
        if cell.get("split", "train").lower() not in PARTS:
            raise InputError(f"{at}: expected split train, val or test, got {cell['split']!r}")
        number = _integer(cell["label"], at) if "label" in cell and name_column != "label" else None
        lines.append(Line(at, cell["path"], classname, number, cell.get("split", "train").lower()))
    return lines, "split" in columns


def _integer(text: str, at: str) -> int:
    try:
        return int(text)
    except ValueError as e:
        raise InputError(f"{at}: expected an integer label beside the class name, got {text!r}") from e


READERS: dict[str, Callable[[Path], DataSplit]] = {"folder": read_folder, "csv": read_csv}
