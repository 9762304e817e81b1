"""``csv:PATH``: a line an image."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plpp_reg.data.names import as_read, both, plain_name
from plpp_reg.data.parts import as_own_data, part_named, split_classes
from plpp_reg.data.readers import Row
from plpp_reg.data.remarks import as_here, doubles, slashes
from plpp_reg.data.sampling import PARTS, DataSplit
from plpp_reg.errors import InputError

DELIMITERS = ",;\t"  # a spreadsheet's, by its country


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
    A ``label`` alone is the name. ``split`` is train, val or test, by any of :data:`plpp_reg.data.parts.PART_NAMES`; without
    that column each class is split 50 : 20 : 30. What CLIP reads as one name is one class in every part.
    """
    where = f"csv:{path}"
    lines, has_split, remarks = _lines(path, where)
    spelled = _spellings(lines)
    numbers: dict[str, int | None] = {}
    for line in lines:
        name = spelled[as_read(line.classname)]
        if numbers.setdefault(name, line.number) != line.number:
            raise InputError(f"{line.at}: expected label {numbers[name]} of {name!r}, as above, got {line.number}")
    order = sorted(numbers, key=lambda c: (numbers[c] or 0, c))
    for first, second in zip(order, order[1:], strict=False):
        if numbers[first] is not None and numbers[first] == numbers[second]:
            two = f"{first!r} and {second!r} have {numbers[first]}"
            raise InputError(f"{where}: expected a label for each class, got two classes with one: {two}")
    if not has_split:
        classes: dict[str, list[str]] = {classname: [] for classname in order}
        for line in lines:
            classes[spelled[as_read(line.classname)]].append(line.name)
        made = split_classes({classname: sorted(names) for classname, names in classes.items()}, where)
        data = as_own_data(path.parent, made.parts, order, [*remarks, *made.remarks])
    else:
        label = {classname: i for i, classname in enumerate(order)}
        rows = [(x.part, Row(x.name, label[spelled[as_read(x.classname)]], spelled[as_read(x.classname)])) for x in lines]
        parts = [[row for part, row in rows if part == wanted] for wanted in PARTS]
        _check_trained(parts, where)
        data = as_own_data(path.parent, parts, order, remarks)
    return DataSplit(data.train, data.val, data.test, data.classnames, (*data.remarks, *doubles(data)))


def _spellings(lines: Sequence[Line]) -> dict[tuple[int, ...], str]:
    """A class's name by its tokens, as the first part spells it that has it.

    Raises:
        InputError: two spellings in one part: two classes that CLIP could not tell apart.
    """
    spelled: dict[str, dict[tuple[int, ...], str]] = {part: {} for part in PARTS}
    for line in lines:
        key = as_read(line.classname)
        if not key:
            raise InputError(f"{line.at}: expected a class name, got {line.classname or 'none'!r}, of which CLIP reads nothing")
        if (first := spelled[line.part].setdefault(key, line.classname)) != line.classname:
            raise InputError(f"{line.at}: expected classes of different names, got {both(first, line.classname)}")
    return {**spelled["test"], **spelled["val"], **spelled["train"]}


def _check_trained(parts: Sequence[Sequence[Row]], where: str) -> None:
    trained = {row.label for row in parts[0]}
    for part, rows in zip(PARTS[1:], parts[1:], strict=True):
        stray = next((row for row in rows if row.label not in trained), None)
        if trained and stray is not None:
            raise InputError(f"{where}: expected training images of class {stray.classname!r}, got none, but some for {part}")


def _lines(path: Path, where: str) -> tuple[list[Line], bool, list[str]]:
    """The table's lines, whether it says which part each image belongs to, and what is to be said of it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(DELIMITERS, key=header.count)
            reader = csv.DictReader(file, delimiter=delimiter)
            head = [(name or "").strip().lower() for name in reader.fieldnames or ()]
            columns = dict(zip(head, reader.fieldnames or (), strict=True))
            read = [(f"{where}, line {reader.line_num}", line) for line in reader]
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: expected a CSV file in UTF-8 (a spreadsheet's 'CSV UTF-8'), got {e}") from e
    except (OSError, csv.Error) as e:
        raise InputError(f"{where}: expected a readable CSV file, got {e}") from e
    name_column = next((c for c in ("class", "classname", "label") if c in columns), "")
    if "path" not in columns or not name_column:
        got = ", ".join(map(repr, columns)) or "none"
        raise InputError(f"{where}: expected a first line that names the columns path and class (or label), got {got}")
    if twice := next((name for name in columns if name and head.count(name) > 1), None):
        raise InputError(f"{where}: expected each column once, got {twice!r} {head.count(twice)} times")
    lines, given = [], []
    for at, line in read:
        more = line.get(None) or []  # without a column
        if any(cell.strip() for cell in more):
            got = f"{len(head) + len(more)}; a name with {delimiter!r} in it stands in double quotes"
            raise InputError(f"{at}: expected {len(head)} cells, as the first line has, got {got}")
        cell = {column: (line[name] or "").strip() for column, name in columns.items()}
        if not any(cell.values()):  # a spreadsheet's empty line
            continue
        name = as_here(cell["path"], path.parent)
        given.append(cell["path"])
        if not (path.parent / name).is_file():
            what = "a folder" if (path.parent / name).is_dir() else "not a file"
            raise InputError(f"{at}: expected a picture's path, got {cell['path']!r}, which is {what}")
        part = part_named(cell.get("split", "train"))
        if not part:
            raise InputError(f"{at}: expected split train, val or test, got {cell['split']!r}")
        number = _integer(cell["label"], at) if "label" in cell and name_column != "label" else None
        lines.append(Line(at, name, plain_name(cell[name_column]), number, part))
    if not lines:
        raise InputError(f"{where}: expected a line an image below the header, got none")
    return lines, "split" in columns, slashes(given, [line.name for line in lines])


def _integer(text: str, at: str) -> int:
    try:
        return int(text)
    except ValueError as e:
        raise InputError(f"{at}: expected an integer label beside the class name, got {text!r}") from e
