"""What a run takes of a data set: few-shot samples and base/new halves, the same files as CoOp's code takes."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from plpp_reg.errors import InputError, unknown

SUBSAMPLES = ("all", "base", "new")
PARTS = ("train", "val", "test")


class Datum(NamedTuple):
    """One image. ``name`` is its path below the data set's folder: what identifies it on every machine."""

    impath: str
    label: int
    classname: str
    name: str


@dataclass(frozen=True)
class DataSplit:
    """Images for training, choosing and reporting, the class names by label, and what a user should hear of them."""

    train: Sequence[Datum]
    val: Sequence[Datum]
    test: Sequence[Datum]
    classnames: list[str]
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def sha256(self) -> str:
        """Hash of which files stand where, machine-independent: two runs with the same hash saw the same images."""
        digest = hashlib.sha256()
        for part in PARTS:
            for datum in getattr(self, part):
                digest.update(f"{part}\t{datum.name}\t{datum.label}\t{datum.classname}\n".encode())
        return digest.hexdigest()

    def sampled_json(self) -> str:
        """The images to train and to choose on as JSON: [path below the data set's folder, label, class name] of each."""
        parts = {part: [[d.name, d.label, d.classname] for d in getattr(self, part)] for part in ("train", "val")}
        lists = {part: ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) for part, rows in parts.items()}
        return "{" + ",\n".join(f'"{part}": [\n{rows}\n]' for part, rows in lists.items()) + "}\n"

    def sampled_sha256(self) -> str:
        """Hash of :meth:`sampled_json`, as of the file that a run keeps of it."""
        return hashlib.sha256(self.sampled_json().encode()).hexdigest()


def sample_few_shot(data: DataSplit, shots: int, seed: int) -> DataSplit:
    """``shots`` training and min(shots, 4) validation images a class, by one ``random.Random(seed)``, train first.

    Label groups in order of first appearance; a class with fewer images keeps them all, in order: as in CoOp's code, so
    that the same seed picks the same files. ``shots`` < 1 keeps everything.
    """
    if shots < 1:
        return data
    rng = random.Random(seed)
    train = _sample(data.train, shots, rng)
    return replace(data, train=train, val=_sample(data.val, min(shots, 4), rng))


def _sample(items: Sequence[Datum], shots: int, rng: random.Random) -> list[Datum]:
    groups: dict[int, list[Datum]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    picked: list[Datum] = []
    for group in groups.values():
        picked += rng.sample(group, shots) if len(group) >= shots else group
    return picked


def subsample_classes(data: DataSplit, subsample: str) -> DataSplit:
    """The first ceil(n / 2) sorted labels ("base"), the rest ("new", relabelled from 0), or "all"."""
    if subsample not in SUBSAMPLES:
        raise unknown("DATASET.SUBSAMPLE_CLASSES", subsample, SUBSAMPLES)
    if subsample == "all":
        return data
    labels = sorted({item.label for item in data.train or data.test})
    half = math.ceil(len(labels) / 2)
    chosen = labels[:half] if subsample == "base" else labels[half:]
    if not chosen:
        raise InputError(f"DATASET.SUBSAMPLE_CLASSES: {subsample!r} of {len(labels)} class(es) is empty")
    return keep_labels(data, chosen)


def keep_labels(data: DataSplit, chosen: Sequence[int]) -> DataSplit:
    """Only these classes, relabelled from 0 in the order given."""
    new_label = {label: i for i, label in enumerate(chosen)}

    def keep(items: Sequence[Datum]) -> list[Datum]:
        return [item._replace(label=new_label[item.label]) for item in items if item.label in new_label]

    names = [data.classnames[label] for label in chosen]
    return DataSplit(keep(data.train), keep(data.val), keep(data.test), names, data.remarks)
