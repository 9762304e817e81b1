"""The parts of one's own data: what their folders are called, how classes are split that have none."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from plpp_reg.data.names import numbered
from plpp_reg.data.readers import SPLIT_SEED, Parts, Row, split_three
from plpp_reg.data.remarks import some
from plpp_reg.data.sampling import DataSplit, Datum
from plpp_reg.errors import InputError

PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
LEAST_TO_SPLIT = 4  # pictures of a class, which give 2 to train on, 1 to choose on and 1 to test on


def part_named(text: str) -> str:
    """ "train", "val" or "test" of whichever of their names; "" of another.

    >>> part_named("Validation"), part_named("extra")
    ('val', '')
    """
    return next((part for part, names in PART_NAMES.items() if text.lower() in names), "")


class SplitHere(NamedTuple):
    """What :func:`split_classes` made."""

    parts: Parts
    remarks: list[str]


def split_classes(classes: Mapping[str, Sequence[str]], where: str) -> SplitHere:
    """Class name -> pictures, in the order of the labels: each class 50 : 20 : 30, the same on every machine.

    A class with fewer than :data:`LEAST_TO_SPLIT` pictures is for training alone, and a remark says so.

    Raises:
        InputError: there are no more pictures of any class.
    """
    rng = random.Random(SPLIT_SEED)
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    few = {}
    for label, (classname, names) in enumerate(classes.items()):
        if len(names) < LEAST_TO_SPLIT:
            few[classname] = len(names)
            parts[0].extend(Row(name, label, classname) for name in names)
        else:
            for part, rows in zip(parts, split_three([(label, classname, list(names))], rng), strict=True):
                part.extend(rows)
    if len(few) == len(classes):
        most, count = max(few.items(), key=lambda item: item[1])
        raise InputError(
            f"{where}: expected {LEAST_TO_SPLIT} pictures of a class or more, to train, choose and test on, got at most "
            f"{count} (of class {most!r}); or a split of your own: folders train and test, a column split"
        )
    remarks = [f"for training alone, as {LEAST_TO_SPLIT} pictures or more are split: {some(list(few), 'class', 'classes')}"]
    return SplitHere(parts, remarks if few else [])


def as_own_data(
    folder: Path, parts: Sequence[Sequence[Row]], classnames: Sequence[str], remarks: Iterable[str] = ()
) -> DataSplit:
    """Lists of pictures below ``folder`` (or absolute) as a data set. Any part may be empty."""
    prefix = str(folder)
    train, val, test = ([Datum(os.path.join(prefix, r.name), r.label, r.classname, r.name) for r in rows] for rows in parts)
    return DataSplit(train, val, test, list(classnames), (*remarks, *numbered(classnames)))
