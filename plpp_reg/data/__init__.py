"""Data sets: one table, one reader a format, few-shot sampling and base/new halves as CoOp has them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from plpp_reg.data.own import check_classes, check_shots, own_kind, read_own
from plpp_reg.data.sampling import DataSplit, Datum, sample_few_shot, subsample_classes
from plpp_reg.data.table import DATASETS, FALLBACK_TEMPLATE, DatasetEntry
from plpp_reg.errors import InputError, unknown

__all__ = [
    "DATASETS",
    "DataSplit",
    "DatasetEntry",
    "Datum",
    "full_name",
    "load_dataset",
    "paper_name",
    "short_name",
    "template",
]


def template(name: str, own: str = "") -> str:
    """The hand-crafted template of a data set, with one ``{}``; a general one where the data set is not in the table.

    ``own`` (DATASET.TEMPLATE) is taken in its place.

    >>> template("DescribableTextures"), template("folder:pets"), template("folder:pets", "a photo of my {}.")
    ('{} texture.', 'a photo of a {}.', 'a photo of my {}.')

    Raises:
        InputError: ``own`` has no place for the name, or several.
    """
    if own and own.count("{}") != 1:
        raise InputError(f"DATASET.TEMPLATE: expected a text with one {{}} in it, for the class's name, got {own!r}")
    return own or (DATASETS[name].template if name in DATASETS else FALLBACK_TEMPLATE)


def full_name(name: str) -> str:
    """The table's key: ``"dtd"``, ``"DTD"`` and ``"DescribableTextures"`` are ``"DescribableTextures"``; folder: and csv: stay.

    >>> full_name("DTD"), full_name("flowers102")
    ('DescribableTextures', 'OxfordFlowers')

    Raises:
        InputError: no such data set.
    """
    if own_kind(name) or name in DATASETS:
        return name
    for key, entry in DATASETS.items():
        if name.lower() in (key.lower(), entry.short.lower(), entry.paper.lower()):
            return key
    raise _unknown(name, [entry.short or key for key, entry in DATASETS.items()])


def _unknown(name: str, known: Sequence[str]) -> InputError:
    """One's own data may be meant: a folder or a table that is there."""
    path = os.path.expanduser(name)
    if kind := "folder" if os.path.isdir(path) else "csv" if os.path.isfile(path) else "":
        return InputError(f"unknown data set {name!r}: did you mean '{kind}:{name}', which is here?")
    return unknown("data set", name, [*known, "folder:PATH", "csv:PATH"])


def short_name(name: str) -> str:
    """The name that a folder of results gets: ``dtd``; of one's own data the last part of its path, ``own_dtd`` if need be.

    >>> short_name("DescribableTextures"), short_name("folder:photos/pets"), short_name("folder:photos/dtd")
    ('dtd', 'pets', 'own_dtd')
    """
    if kind := own_kind(name):
        path = Path(os.path.expanduser(name.partition(":")[2])).resolve()
        own = path.stem if kind == "csv" else path.name
        taken = {n.lower() for key, entry in DATASETS.items() for n in (key, entry.short, entry.paper)}
        return f"own_{own}" if own.lower() in taken else own
    return (DATASETS[name].short if name in DATASETS else "") or name


def paper_name(name: str) -> str:
    """The name that a table prints: ``DTD``; of one's own data the last part of its path.

    >>> paper_name("DescribableTextures"), paper_name("csv:photos/pets.csv")
    ('DTD', 'pets')
    """
    return (DATASETS[name].paper if name in DATASETS else "") or short_name(name)


def read_dataset(name: str, root: str | Path = "") -> DataSplit:
    """Everything that a data set has.

    Raises:
        InputError: no such data set, or its files are not there or not what they should be.
    """
    if own_kind(name):
        return read_own(name)
    if name not in DATASETS:
        raise _unknown(name, list(DATASETS))
    entry = DATASETS[name]
    module, _, function = entry.reader.partition(":")
    read: Callable[..., DataSplit] = getattr(importlib.import_module(module), function)
    return read(root, **entry.options)


def load_dataset(
    name: str, root: str | Path = "", shots: int = -1, seed: int = 1, subsample: str = "all", trains: bool = True
) -> DataSplit:
    """A data set as one run sees it.

    Args:
        name: a name of the table, ``folder:PATH`` or ``csv:PATH``.
        root: folder of the data sets; the embedded default and one's own need none.
        shots: training images a class, and min(shots, 4) validation images; -1: all.
        seed: of the few-shot sample.
        subsample: "all", "base" (the first half of the labels) or "new" (the second, relabelled from 0).
        trains: whether its training images are read: testing needs no shots.

    Raises:
        InputError: no such data set; its files are not there or not what they should be; of one's own data a class has fewer
            training images than shots, or there is one class alone.
    """
    data = read_dataset(name, root)
    if own_kind(name) and trains:
        check_shots(data, shots, name)
    found = subsample_classes(sample_few_shot(data, shots, seed), subsample)
    if own_kind(name):
        check_classes(found.classnames, name, "" if subsample == "all" else f" in its {subsample} half")
    return found
