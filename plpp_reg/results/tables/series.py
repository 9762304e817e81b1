"""A method's figures on one data set, seed by seed: means, spreads, averages over data sets, paired differences.

Spread is the sample standard deviation over seeds. H is the harmonic mean of the mean base and the mean new accuracy, as the
papers print it, for the average over data sets too; its spread and its paired difference are those of each seed's H.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from plpp_reg.results.record import harmonic_mean, paired, summary
from plpp_reg.results.tables.records import Record

H, MEAN_H, AVERAGE = "H", "mean H", "average"


class Figure(NamedTuple):
    """A cell. ``spread`` is a sample standard deviation, or the half-width of a difference's 95% interval; nan: none."""

    value: float
    spread: float = math.nan


class Series(NamedTuple):
    """Column -> seed -> accuracy, of one method on one data set (or on their average)."""

    columns: Mapping[str, Mapping[int, float]]

    def seeds(self, columns: Iterable[str]) -> list[int]:
        """Seeds that have a figure in each of the columns."""
        sets = [set(self.columns.get(column, {})) for column in columns]
        return sorted(set.intersection(*sets)) if sets else []


def series_of(records: Iterable[Record], form: str, own: str) -> Series:
    """The figures of one method on one data set; ``own``: the column of the test on a run's own data, of targets."""
    columns: dict[str, dict[int, float]] = {}
    for record in records:
        note = record.note
        for test, accuracy in record.accuracies.items():
            column = str(note["shots"]) if form == "shots" else own if form == "targets" and test == record.own_test else test
            columns.setdefault(column, {})[note["seed"]] = accuracy
    return Series(columns)


def with_average(series: Series, columns: Sequence[str]) -> Series:
    """A further column: each seed's mean over ``columns``, for the seeds that have them all."""
    seeds = series.seeds(columns)
    mean = {seed: statistics.fmean(series.columns[c][seed] for c in columns) for seed in seeds}
    return Series({**series.columns, AVERAGE: mean}) if mean else series


def average(parts: Sequence[Series], columns: Iterable[str]) -> Series:
    """The mean over data sets, for the seeds that every data set has."""
    averaged = {}
    for column in columns:
        seeds = set.intersection(*(set(part.columns.get(column, {})) for part in parts))
        averaged[column] = {s: statistics.fmean(part.columns[column][s] for part in parts) for s in sorted(seeds)}
    return Series({column: values for column, values in averaged.items() if values})


def at_every(records: Iterable[Record], columns: Iterable[str]) -> Series:
    """What learns nothing is the same at any number of shots, whichever it was run with; of several figures the last."""
    values = {record.note["seed"]: record.accuracies[record.note["test"]] for record in records}
    return Series({column: values for column in columns})


def harmonic(series: Series) -> dict[int, float]:
    """Each seed's H."""
    base, new = series.columns.get("base", {}), series.columns.get("new", {})
    return {seed: harmonic_mean(base[seed], new[seed]) for seed in sorted(base.keys() & new.keys())}


def cells_of(series: Series, form: str, mean_h: float | None) -> dict[str, Figure]:
    """Mean and spread of each column, and H of halves."""
    cells = {}
    for column, values in series.columns.items():
        if values:
            cells[column] = Figure(*summary([values[s] for s in sorted(values)])[:2])
    each = harmonic(series) if form == "halves" else {}
    if each:
        means = [statistics.fmean(series.columns[half][s] for s in each) for half in ("base", "new")]
        cells[H] = Figure(harmonic_mean(*means), summary(list(each.values())).std)
        if mean_h is not None:
            cells[MEAN_H] = Figure(mean_h)
    return cells


def seeds_of(series: Series) -> str:
    """How many seeds, ``"2-3"`` where columns differ."""
    return _span([len(values) for values in series.columns.values()])


def _span(counts: Sequence[int]) -> str:
    return "-".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"


def difference(treated: Series, plain: Series, form: str) -> tuple[dict[str, Figure], str]:
    """Paired over the seeds that both have, with the half-width of Student's 95% interval."""
    pairs = {c: (treated.columns[c], plain.columns[c]) for c in treated.columns if c in plain.columns}
    if form == "halves":
        pairs[H] = (harmonic(treated), harmonic(plain))
    cells, counts = {}, []
    for column, (a, b) in pairs.items():
        seeds = sorted(a.keys() & b.keys())
        if seeds:
            found = paired([a[s] for s in seeds], [b[s] for s in seeds])
            cells[column] = Figure(found.mean, found.half_width)
            counts.append(found.n)
    return cells, _span(counts)
