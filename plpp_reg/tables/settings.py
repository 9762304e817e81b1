"""What runs were made with: of one method on one data set, those of different settings are rows of their own.

A row is named for what differs, ``CoOp_PLPP (WEIGHT=1.0)``, and PLPP is compared with the plain run of the same other settings.
Between data sets and numbers of shots a recipe may differ: there a table says what does.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from plpp_reg.engine.config import NOT_IN_THE_RESULT
from plpp_reg.engine.registry import SUFFIX

Settings = Mapping[str, Any]
Kinds = Mapping[str, Mapping[Hashable, Settings]]  # of each row, by its name: what its runs of a cell were made with

OF_THE_RUN = {*NOT_IN_THE_RESULT, "SEED", "DATASET.NAME", "DATASET.NUM_SHOTS", "TRAINER.NAME"}  # not of how it was made
OF_PLPP = "TRAINER.PLPP."
OF_TRAINING = ("OPTIM.", "TRAIN.", "LOSS.", "DATALOADER.", "TRAINER.")  # what learns nothing does not depend on them
ABSENT = object()


class Made(NamedTuple):
    """A run, as far as its row depends on it. Runs of one ``cell`` (a data set, a number of shots) share every setting."""

    table: Hashable
    method: str
    cell: Hashable
    settings: Settings


def relevant(config: object, method: str, learns: bool = True) -> Settings:
    """Of a run's whole configuration, what its figures depend on and other runs of its row must have too."""
    if not isinstance(config, dict):
        return {}
    return {key: config[key] for key in _relevant_keys(tuple(config), method.endswith(SUFFIX), learns)}


@functools.lru_cache(maxsize=64)  # of thousands of runs, most have the same keys
def _relevant_keys(keys: tuple[str, ...], with_plpp: bool, learns: bool) -> tuple[str, ...]:
    idle = (*(() if with_plpp else (OF_PLPP,)), *(() if learns else OF_TRAINING))
    return tuple(key for key in keys if key not in OF_THE_RUN and not key.startswith(idle))


def tell_apart(runs: Sequence[Made]) -> list[tuple[str, Settings]]:
    """Of each run the name of its row, and its settings (equal ones are one object)."""
    cells: dict[tuple[Hashable, str], dict[Hashable, list[Settings]]] = {}
    kinds: list[Settings] = []
    for run in runs:
        there = cells.setdefault((run.table, run.method), {}).setdefault(run.cell, [])
        kind = next((settings for settings in there if settings == run.settings), None)
        if kind is None:
            there.append(kind := run.settings)
        kinds.append(kind)
    # The same keys name a method's rows in every cell, so that an average over data sets finds them.
    mixed = {row: sorted({key for there in each.values() for key in differing(there)}) for row, each in cells.items()}
    return [(_label(run.method, kind, mixed[run.table, run.method]), kind) for run, kind in zip(runs, kinds, strict=True)]


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


def _label(method: str, settings: Settings, keys: Sequence[str]) -> str:
    if not keys:
        return method
    short = [key.rpartition(".")[2] for key in keys]
    names = short if len(set(short)) == len(short) else keys
    return f"{method} ({', '.join(f'{n}={written(settings, key)}' for n, key in zip(names, keys, strict=True))})"


def method_of(label: str) -> str:
    """``"CoOp_PLPP TOP_K=3 (LR=0.01)"`` -> CoOp_PLPP."""
    return label.partition(" ")[0]


def plain_of(label: str) -> str:
    """The method that a row's is compared with; nothing for one without PLPP."""
    method = method_of(label)
    return method.removesuffix(SUFFIX) if method.endswith(SUFFIX) else ""


def pair(kinds: Kinds) -> tuple[dict[str, str], dict[str, str]]:
    """Rows with PLPP -> the plain row of the same other settings wherever both are; and those that have none -> why."""
    pairs, apart = {}, {}
    for treated in kinds:
        plain = plain_of(treated)
        for label in (label for label in kinds if plain and method_of(label) == plain):
            both = [cell for cell in kinds[treated] if cell in kinds[label]]
            unlike = [(t, p) for t, p in ((without_plpp(kinds[treated][c]), kinds[label][c]) for c in both) if t != p]
            if both and not unlike:
                pairs[treated] = label
                break
            if unlike:
                (ours, theirs), *_ = unlike
                said = [f"{key}={written(ours, key)}, there {written(theirs, key)}" for key in differing([ours, theirs])]
                apart.setdefault(treated, f"{label}: {'; '.join(said)}")
    return pairs, {treated: why for treated, why in apart.items() if treated not in pairs}
