"""Data sets: one table, one reader a format, few-shot sampling and base/new halves as CoOp has them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plpp_reg.datasets.sampling import DataSplit, Datum, sample_few_shot, subsample_classes
from plpp_reg.errors import unknown

__all__ = ["DATASETS", "DataSplit", "DatasetEntry", "Datum", "load_dataset", "template"]

FALLBACK_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class DatasetEntry:
    """A row of the table: where the reader is, and the template that zero-shot CLIP uses."""

    reader: str  # "module:function", called with the root folder
    template: str = FALLBACK_TEMPLATE


DATASETS = {
    "emoji": DatasetEntry("plpp_reg.datasets.emoji:read_emoji"),
}


def template(name: str) -> str:
    """The hand-crafted template of a data set, with one ``{}``; a general one where the data set is not in the table."""
    return DATASETS[name].template if name in DATASETS else FALLBACK_TEMPLATE


def load_dataset(name: str, root: str | Path = "", shots: int = -1, seed: int = 1, subsample: str = "all") -> DataSplit:
    """A data set as one run sees it.

    Args:
        name: a name of the table.
        root: folder of the data sets; the embedded default needs none.
        shots: training images a class, and min(shots, 4) validation images; -1: all.
        seed: of the few-shot sample.
        subsample: "all", "base" (the first half of the labels) or "new" (the second, relabelled from 0).

    Raises:
        InputError: no such data set, or its files are not there.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    module, _, function = DATASETS[name].reader.partition(":")
    read: Callable[[str | Path], DataSplit] = getattr(importlib.import_module(module), function)
    return subsample_classes(sample_few_shot(read(root), shots, seed), subsample)
