"""What runs were made with: of one method on one data set, those of different settings are rows of their own.

The usual ones have the method's plain name, others are named for what differs: ``CoOp_PLPP (WEIGHT=1.0)``. PLPP is compared
with the plain run of the same other settings.
Between data sets and numbers of shots a recipe may differ: there a table says what does.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from plpp_reg.loss import SUFFIX
from plpp_reg.results.record import NOT_IN_THE_RESULT
from plpp_reg.trainers import KDPL, NODES

Settings = Mapping[str, Any]
Kinds = Mapping["Name", Mapping[Hashable, Settings]]  # of each row: what its runs of a cell were made with

# Bounds on memory: another one goes in other chunks, which changes a result no more than rounding does.
ROUNDING = {"MODEL.TEXT_MEMORY_MIB", "TRAINER.PLPP.MEMORY_MIB", "TRAINER.PLPP.CHUNK_SIZE"}  # the last: before 0.2
OF_THE_RUN = {*NOT_IN_THE_RESULT, *ROUNDING, "SEED", "DATASET.NAME", "DATASET.NUM_SHOTS", "TRAINER.NAME"}  # not how it was made
OF_METHODS = "TRAINER."
OF_TEACHERS = "TEACHER."  # who it was stands in the record
OF_PLPP = "TRAINER.PLPP."
OF_TRAINING = ("OPTIM.", "TRAIN.", "LOSS.", "DATALOADER.", "TRAINER.")  # what learns nothing does not depend on them
ABSENT = object()


class Name(NamedTuple):
    """What a row is called: ``CoOp_PLPP TOP_K=3 (LR=0.01)``.

    ``variant`` is its protocol's, ``settings`` what differs from the usual ones.
    """

    method: str
    variant: str = ""
    settings: str = ""

    def __str__(self) -> str:
        settings = f"({self.settings})" if self.settings else ""
        return " ".join(filter(None, (self.method, self.variant, settings)))

    @property
    def plain(self) -> str:
        """The method without PLPP."""
        return self.method.removesuffix(SUFFIX)

    @property
    def has_plpp(self) -> bool:
        return self.method.endswith(SUFFIX)


class Made(NamedTuple):
    """A run, as far as its row depends on it. Runs of one ``cell`` (a data set, a number of shots) share every setting."""

    table: Hashable
    row: Name  # without settings
    cell: Hashable
    settings: Settings


def relevant(config: object, method: str, learns: bool = True, teacher: Mapping[str, Any] | None = None) -> Settings:
    """Of a run's whole configuration, what its figures depend on and other runs of its row must have too.

    ``teacher``: who taught it, of whom every seed may have its own weights: method and backbone count.
    """
    if not isinstance(config, dict):
        return {}
    settings = {key: config[key] for key in _relevant_keys(tuple(config), method, learns)}
    return settings if teacher is None else {**settings, "TEACHER": f"{teacher['trainer']} on {teacher['backbone']}"}


@functools.lru_cache(maxsize=64)  # of thousands of runs, most have the same keys
def _relevant_keys(keys: tuple[str, ...], method: str, learns: bool) -> tuple[str, ...]:
    idle = (OF_TEACHERS, *(() if method.endswith(SUFFIX) else (OF_PLPP,)), *(() if learns else OF_TRAINING))
    # A configuration has the keys of every method. Which of them a trainer of one's own reads is not known: all count.
    plain = method.removesuffix(SUFFIX)
    node = NODES.get(plain)
    nodes = (node, KDPL) if plain.endswith(f"_{KDPL}") else (node,)
    read = (OF_PLPP, *(f"{OF_METHODS}{name}." for name in nodes)) if node else (OF_METHODS,)
    return tuple(
        key
        for key in keys
        if key not in OF_THE_RUN and not key.startswith(idle) and (key.startswith(read) or not key.startswith(OF_METHODS))
    )


def tell_apart(runs: Sequence[Made]) -> list[tuple[Name, Settings]]:
    """Of each run the name of its row, and its settings (equal ones are one object).

    In a cell the usual settings are the row of the method's plain name: whatever a recipe changes between cells, an average
    finds them. Others are named for what differs from them.
    """
    rows: dict[tuple[Hashable, Name], dict[Hashable, list[list[Settings]]]] = {}  # of each cell, equal settings by equal ones
    kinds: list[Settings] = []
    for run in runs:
        there = rows.setdefault((run.table, run.row), {}).setdefault(run.cell, [])
        alike = next((alike for alike in there if alike[0] == run.settings), None)
        if alike is None:
            there.append(alike := [])
        alike.append(run.settings)
        kinds.append(alike[0])
    labels = {row: _labels(row[1], cells) for row, cells in rows.items()}
    return [(labels[run.table, run.row][run.cell][id(kind)], kind) for run, kind in zip(runs, kinds, strict=True)]


def _labels(method: Name, cells: Mapping[Hashable, list[list[Settings]]]) -> dict[Hashable, dict[int, Name]]:
    """Of one method, cell by cell: the ``id`` of settings -> the row."""
    mixed = sorted({key for there in cells.values() for key in differing([alike[0] for alike in there])})
    if not mixed:
        return {cell: {id(alike[0]): method for alike in there} for cell, there in cells.items()}

    def values(alike: Sequence[Settings]) -> tuple[str, ...]:
        return tuple(written(alike[0], key) for key in mixed)

    everywhere: collections.Counter[tuple[str, ...]] = collections.Counter()
    for there in cells.values():
        for alike in there:
            everywhere[values(alike)] += len(alike)
    known = {key for there in cells.values() for alike in there for key in alike[0]}
    names = {key: _short(key, known) for key in mixed}
    labels = {}
    for cell, there in cells.items():
        # The most runs there; of equally many, what most runs of the method have; what is left is a matter of order.
        (usual, *_) = min(there, key=lambda alike: (-len(alike), -everywhere[values(alike)], values(alike)))
        labels[cell] = {id(alike[0]): _label(method, alike[0], usual, names) for alike in there}
    return labels


def _label(method: Name, settings: Settings, usual: Settings, names: Mapping[str, str]) -> Name:
    said = [f"{names[key]}={written(settings, key)}" for key in sorted(differing([usual, settings]))]
    return method._replace(settings=", ".join(said))


def _short(key: str, known: Collection[str]) -> str:
    """As much of a key's end as no other key has: ``LR``, ``TRAIN_X.BATCH_SIZE``."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(k != key and f".{k}".endswith(f".{end}") for k in known)), key)


def differing(each: Collection[Settings]) -> list[str]:
    """The keys that these do not agree on."""
    if len(each) < 2:
        return []
    first, *others = each
    keys = dict.fromkeys(key for settings in each for key in settings)
    return [key for key in keys if any(s.get(key, ABSENT) != first.get(key, ABSENT) for s in others)]


def without_plpp(settings: Settings) -> Settings:
    """What a run with PLPP has in common with the plain run that it is compared with."""
    return {key: value for key, value in settings.items() if not key.startswith(OF_PLPP)}


def written(settings: Settings, key: str) -> str:
    """A value as a line shows it."""
    return repr(settings[key]) if key in settings else "not set"


def pair(kinds: Kinds) -> tuple[dict[tuple[Name, Name], list[Hashable]], dict[tuple[Name, str], list[Hashable]]]:
    """Which rows are compared, cell by cell.

    Returns:
        (A row with PLPP, a plain row) -> the cells in which their other settings are the same; and (a row with PLPP, why not)
        -> the cells in which there are plain runs, but none of its settings.
    """
    pairs: dict[tuple[Name, Name], list[Hashable]] = {}
    apart: dict[tuple[Name, str], list[Hashable]] = {}
    for treated, cells in kinds.items():
        rows = [label for label in kinds if treated.has_plpp and label.method == treated.plain]
        for cell, settings in cells.items():
            ours = without_plpp(settings)
            there = [label for label in rows if cell in kinds[label]]
            alike = [label for label in there if kinds[label][cell] == ours]
            for label in alike:
                pairs.setdefault((treated, label), []).append(cell)
            if there and not alike:
                theirs = kinds[there[0]][cell]
                said = [f"{key}={written(ours, key)}, there {written(theirs, key)}" for key in differing([ours, theirs])]
                apart.setdefault((treated, f"{there[0]}: {'; '.join(said)}"), []).append(cell)
    return pairs, apart
