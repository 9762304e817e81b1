"""``plpp data check ROOT``: for each data set what is there, what is missing or wrong, and where to get it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plpp_reg.data import DATASETS, full_name, load_dataset, short_name
from plpp_reg.data.own import own_kind, read_own
from plpp_reg.data.readers import PARTS, as_data, read_own_files, read_split
from plpp_reg.data.sampling import DataSplit, Datum
from plpp_reg.errors import InputError
from plpp_reg.io.pictures import open_picture

READY, DIFFERENT, MISSING, WRONG = "ready", "different", "missing", "wrong"


class Finding(NamedTuple):
    """One data set's state, and lines that say more."""

    name: str
    state: str
    lines: Sequence[str]


def check(root: str | Path, datasets: Sequence[str] = (), every_image: bool = False) -> int:
    """Print what is below ``root``. Nothing is written there.

    Returns:
        Exit status: 1 where something is wrong, or a data set that was named is missing.
    """
    if not Path(os.path.expanduser(root)).is_dir():
        raise InputError(f"{str(root)!r}: expected the folder of the data sets (ROOT), which holds caltech-101/, dtd/, …")
    names = [full_name(name) for name in datasets] or [name for name, entry in DATASETS.items() if entry.layout]
    findings = []
    for name in names:
        findings.append(finding := look(name, root, every_image))
        print(f"{short_name(finding.name):16s} {finding.state}")
        for line in finding.lines:
            print(f"{'':16s} {line}")
    counted = {state: sum(f.state == state for f in findings) for state in (READY, DIFFERENT, MISSING, WRONG)}
    print(", ".join(f"{n} {state}" for state, n in counted.items() if n))
    if counted[MISSING]:
        print(f"plpp data get NAME --root {root} downloads what is missing, but not imagenet")
    return int(bool(counted[WRONG] or (datasets and counted[MISSING])))


def look(name: str, root: str | Path, every_image: bool = False) -> Finding:
    """What is there of one data set: read as a run reads it, counted, images opened."""
    entry = DATASETS.get(name)
    if own_kind(name) or entry.layout is None:
        try:
            data = read_own(name) if own_kind(name) else load_dataset(name, root)
        except InputError as e:
            return Finding(name, WRONG, [str(e)])
        return _counted(name, data, [], every_image=every_image or bool(own_kind(name)))
    layout = entry.layout
    folder = Path(os.path.expanduser(root)) / layout.folder
    source = f"get it: {layout.source}"
    if not folder.is_dir():
        return Finding(name, MISSING, [f"no folder {str(folder)!r}", source])
    if not (folder / layout.images).is_dir():
        return Finding(name, WRONG, [f"no folder {str(folder / layout.images)!r} of images", source])
    notes = []
    split = folder / layout.split
    try:
        if layout.split and split.is_file():
            parts = read_split(split)
        else:
            if layout.split:
                notes = [
                    f"no {layout.split}: a split would be made, which is not the papers'; get theirs: {layout.split_source}"
                ]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parts = read_own_files(folder, layout)
        data = as_data(folder / layout.images, *parts)
    except InputError as e:
        return Finding(name, WRONG, [*notes, str(e)])
    return _counted(name, data, notes, every_image)


def _counted(name: str, data: DataSplit, notes: list[str], every_image: bool) -> Finding:
    counts = (len(data.classnames), len(data.train), len(data.val), len(data.test))
    lines = [f"{counts[0]:,} classes, {counts[1]:,} / {counts[2]:,} / {counts[3]:,} images (train / val / test)", *notes]
    state = DIFFERENT if notes else READY
    expected = DATASETS[name].sizes if name in DATASETS else None
    if expected and counts != expected:
        state = DIFFERENT
        lines.append(
            f"the papers' has {expected[0]:,} classes, {expected[1]:,} / {expected[2]:,} / {expected[3]:,} images: "
            "figures are not comparable with theirs"
        )
    items = [datum for part in PARTS for datum in getattr(data, part)]
    gone = [datum for datum in items if not os.path.isfile(datum.impath)]
    if gone:
        return Finding(name, WRONG, [*lines, f"{len(gone):,} of {len(items):,} images are not there, first {gone[0].impath}"])
    unreadable = [why for datum in (items if every_image else items[-1:]) if (why := _unreadable(datum))]
    if unreadable:
        more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        return Finding(name, WRONG, [*lines, f"{unreadable[0]}{more}"])
    if items:
        lines.append(f"{f'all {len(items):,} images decode' if every_image else f'{items[-1].name} decodes'}")
    return Finding(name, state, lines)


def _unreadable(datum: Datum) -> str:
    """Why an image cannot be read; "" where it can."""
    try:
        open_picture(datum.impath)
    except InputError as e:
        return str(e)
    return ""
