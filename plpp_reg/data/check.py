"""``plpp data check ROOT``: for each data set what is there, what is missing or wrong, and where to get it."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from plpp_reg.data import DATASETS, full_name, load_dataset, short_name
from plpp_reg.data.contents import content
from plpp_reg.data.own import check_classes, own_kind, read_own
from plpp_reg.data.readers import as_data, read_own_files, split_data
from plpp_reg.data.remarks import doubles, some
from plpp_reg.data.sampling import PARTS, DataSplit, Datum
from plpp_reg.errors import InputError
from plpp_reg.io.pictures import open_as_upstream, open_picture

READY, DIFFERENT, MISSING, WRONG = "ready", "different", "missing", "wrong"
CONTEXT_LENGTH = 77  # tokens of a prompt, of every CLIP of OpenAI's
USUAL_N_CTX = 16  # context vectors: CoOp's
MOST_ERRORS = 20  # images that cannot be read, each named
FLAT = 20  # of 255: a picture whose values lie closer together shows nothing


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
        own = f"; data of your own: plpp data check . --datasets {root}" if own_kind(str(root)) else ""
        raise InputError(f"{str(root)!r}: expected the folder of the data sets (ROOT), which holds caltech-101/, dtd/, …{own}")
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
            check_classes(data.classnames, name)
        except InputError as e:
            return Finding(name, WRONG, [str(e)])
        return _own(name, data) if own_kind(name) else _counted(name, data, [], every_image)
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
            data = split_data(folder / layout.images, split)
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
    return _counted(name, data, [*notes, *data.remarks], every_image)


def _counts(data: DataSplit) -> tuple[int, int, int, int]:
    return len(data.classnames), len(data.train), len(data.val), len(data.test)


def _counted(name: str, data: DataSplit, notes: list[str], every_image: bool) -> Finding:
    """Of a paper's data set, beside its numbers."""
    counts = _counts(data)
    lines = [_count_line(data), *notes]
    state = DIFFERENT if notes else READY
    expected = DATASETS[name].sizes if name in DATASETS else None
    if expected and counts != expected:
        state = DIFFERENT
        lines.append(
            f"the papers' has {expected[0]:,} classes, {expected[1]:,} / {expected[2]:,} / {expected[3]:,} images: "
            "figures are not comparable with theirs"
        )
    items = _items(data)
    gone = [datum for datum in items if not os.path.isfile(datum.impath)]
    if gone:
        return Finding(name, WRONG, [*lines, f"{len(gone):,} of {len(items):,} images are not there, first {gone[0].impath}"])
    unreadable = []
    for datum in _watched(items) if every_image else items[-1:]:
        try:
            open_as_upstream(datum.impath)
        except InputError as e:
            unreadable.append(str(e))
    if unreadable:
        return Finding(name, WRONG, [*lines, *_first_of(unreadable)])
    if items:
        lines.append(f"{f'all {len(items):,} images decode' if every_image else f'{items[-1].name} decodes'}")
    return Finding(name, state, lines)


def _own(name: str, data: DataSplit) -> Finding:
    """Of one's own data: every picture decoded, those that are in two places by their content, the prompts' length."""
    unreadable, flat, contents = [], [], {}
    for datum in _watched(items := _items(data)):
        try:
            image = open_picture(datum.impath)
            contents[datum.impath] = content(datum)
        except InputError as e:
            unreadable.append(str(e))
        else:
            if max(high - low for low, high in image.getextrema()) < FLAT:
                flat.append(datum.name)
    if unreadable:
        return Finding(name, WRONG, [_count_line(data), *data.remarks, *_first_of(unreadable)])
    told_by_path = set(doubles(data))
    lines = [_count_line(data), *data.remarks]
    lines += [line for line in doubles(data, lambda datum: contents[datum.impath]) if line not in told_by_path]
    lines += [f"nearly of one colour: {some(flat, 'picture')}"] if flat else []
    too_long, notes = _prompts(data.classnames)
    lines += [f"all {len(items):,} images decode", *_shots(data), *notes]
    return Finding(name, WRONG if too_long else READY, lines)


def _prompts(classnames: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a name has no prompt at all, and what is to be said of long ones."""
    from plpp_reg.clip.prompts import encode  # late: it needs torch

    room = {name: CONTEXT_LENGTH - 2 - len(encode(name + ".")) for name in classnames}  # SOS and EOT
    least = min(room, key=lambda name: room[name])
    if room[least] >= USUAL_N_CTX:
        return False, []
    if room[least] < 1:
        return True, [f"class name {least!r}: expected a prompt of at most {CONTEXT_LENGTH} tokens, this name alone has more"]
    return False, [
        f"class name {least!r} leaves room for {room[least]} context vectors of a prompt's {CONTEXT_LENGTH} tokens: N_CTX "
        f"{room[least]} at most, or a shorter name"
    ]


def _shots(data: DataSplit) -> list[str]:
    """How many shots there are."""
    if not data.train:
        return ["no images to train on: for testing alone (plpp train --eval-only)"]
    count = Counter(datum.label for datum in data.train)
    least = min(range(len(data.classnames)), key=lambda label: count[label])
    have = count[least]
    ways = f"DATASET.NUM_SHOTS {have} at most, or -1 for all images"
    lines = [f"the smallest class for training, {data.classnames[least]!r}, has {have:,}: {ways}"]
    return lines if data.test else [*lines, "no images to test on: TEST.SPLIT val, or TEST.NO_TEST True"]


def _count_line(data: DataSplit) -> str:
    counts = _counts(data)
    return f"{counts[0]:,} classes, {counts[1]:,} / {counts[2]:,} / {counts[3]:,} images (train / val / test)"


def _items(data: DataSplit) -> list[Datum]:
    return [datum for part in PARTS for datum in getattr(data, part)]


def _first_of(errors: Sequence[str]) -> list[str]:
    """A line each, of :data:`MOST_ERRORS` at most."""
    more = len(errors) - MOST_ERRORS
    return [*errors[:MOST_ERRORS], *([f"and {more:,} more such images"] if more > 0 else [])]


def _watched(items: Sequence[Datum]) -> Iterable[Datum]:
    """With a bar in a terminal."""
    from tqdm import tqdm

    watched = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(items, unit=" images", leave=False, disable=not watched)
