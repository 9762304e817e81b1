"""Data of one's own: ``folder:PATH``, a folder a class, and ``csv:PATH``, a line an image. Nothing is written beside it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from plpp_reg.data.sampling import DataSplit
from plpp_reg.errors import InputError


def _folder(path: Path) -> DataSplit:
    from plpp_reg.data.folders import read_folder

    return read_folder(path)


def _csv(path: Path) -> DataSplit:
    from plpp_reg.data.tables import read_csv

    return read_csv(path)


READERS: dict[str, Callable[[Path], DataSplit]] = {"folder": _folder, "csv": _csv}


def own_kind(name: str) -> str:
    """``"folder"`` or ``"csv"`` for ``folder:PATH`` and ``csv:PATH``; "" for any other data set's name."""
    kind, colon, _ = name.partition(":")
    return kind if colon and kind in READERS else ""


def read_own(name: str) -> DataSplit:
    """``folder:PATH`` or ``csv:PATH``. Labels follow the sorted class names, or the numbers of a csv's column ``label``."""
    kind, _, path = name.partition(":")
    return READERS[kind](Path(os.path.expanduser(path)))


def check_classes(classnames: Sequence[str], name: str, of: str = "") -> None:
    """Of one class alone every picture is called right, and a prompt learns nothing.

    Raises:
        InputError: there are not two.
    """
    if len(classnames) < 2:
        got = f"{classnames[0]!r} alone" if classnames else "none"
        raise InputError(f"data set {name!r}: expected two classes or more to tell apart{of}, got {got}")


def check_shots(data: DataSplit, shots: int, name: str) -> None:
    """One's own class with fewer training images than shots is an error; upstream's data sets keep what they have.

    Raises:
        InputError: the smallest class, how many images it has and in which parts, and what number would do.
    """
    train, val, test = (Counter(datum.label for datum in part) for part in (data.train, data.val, data.test))
    few = sorted((label for label in range(len(data.classnames)) if train[label] < shots), key=lambda label: train[label])
    if not few or not data.train:
        return
    least = few[0]
    have, choose, report = train[least], val[least], test[least]
    parts = f"{have} to train, {choose} to choose and {report} to test on"
    others = f", and fewer than {shots} of {len(few) - 1} more" if len(few) > 1 else ""
    way = f"DATASET.NUM_SHOTS {have} is the most that every class has, " if have else ""
    raise InputError(
        f"data set {name!r}: expected at least {shots} training images of class {data.classnames[least]!r} for {shots} shots "
        f"(DATASET.NUM_SHOTS), got {have}{others}. {have + choose + report} of that class were found, {parts}; without parts "
        f"of your own {2 * shots} a class give {shots} shots. {way}-1 takes all"
    )
