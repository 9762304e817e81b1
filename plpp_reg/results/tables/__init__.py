"""Tables of recorded runs, beside published figures."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path

from plpp_reg.results.job import shots_text
from plpp_reg.results.tables.literature import published_rows
from plpp_reg.results.tables.notes import (
    below_zero_shot,
    doubled,
    lacking,
    other_pictures,
    transductive,
    uncompared,
    unnamed,
    varying,
)
from plpp_reg.results.tables.outside import outside_tables
from plpp_reg.results.tables.records import Record, Runs, read_runs
from plpp_reg.results.tables.rendering import WRITERS
from plpp_reg.results.tables.rows import PAPERS, Row, Table, dataset_order, marked, method_order, title_of
from plpp_reg.results.tables.series import (
    AVERAGE,
    MEAN_H,
    H,
    Series,
    at_every,
    average,
    cells_of,
    difference,
    harmonic,
    seeds_of,
    series_of,
    with_average,
)
from plpp_reg.results.tables.settings import Name, Settings, pair

Pairs = Mapping[tuple[Name, Name | str], Collection[Hashable]]


def tables_text(folder: str | Path, form: str, mean_h: bool = False, published: bool = True) -> str:
    """The tables of a folder as ``"markdown"``, ``"csv"`` or ``"latex"``."""
    runs = read_runs(folder)
    tables = [*make_tables(runs, mean_h, published), *outside_tables(Path(folder), runs.outside)]
    text = WRITERS[form](tables, runs.missing)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair in a name is no character


def make_tables(runs: Runs, mean_h: bool = False, published: bool = True) -> list[Table]:
    """One table a protocol and backbone."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in (*runs.records, *runs.zero_shot):
        note = record.note
        found.setdefault((note["name"], note["table"], note["backbone"]), []).append(record)
    return [
        _table(name, form, backbone, records, mean_h, published) for (name, form, backbone), records in sorted(found.items())
    ]


def _table(name: str, form: str, backbone: str, records: list[Record], mean_h: bool, published: bool) -> Table:
    groups: dict[tuple[str, int], dict[Name, list[Record]]] = {}
    for record in records:
        dataset, shots = record.cell
        groups.setdefault((dataset, 0 if form == "shots" else shots), {}).setdefault(record.row, []).append(record)
    all_shots = sorted({record.note["shots"] for record in records})
    several_shots = form != "shots" and len(all_shots) > 1
    columns = _columns(form, records, mean_h)
    kinds = _kinds(records)
    pairs, apart = pair(kinds)
    rows: list[Row] = []
    without: list[str] = []
    by_shots: dict[int, dict[Name, dict[str, Series]]] = {}
    for (dataset, shots), methods in sorted(groups.items(), key=lambda item: dataset_order(*item[0])):
        title = title_of(dataset) + (f", {shots_text(shots)}" if several_shots else "")
        series = {m: series_of(methods[m], form, columns[0]) for m in method_order(methods)}
        if form == "targets":
            series = {m: with_average(s, columns[1:-1]) for m, s in series.items()}
        if form == "shots":
            series = {m: s if methods[m][0].note["learns"] else at_every(methods[m], columns) for m, s in series.items()}
        rows += _measured(title, series, form, mean_h) + _differences(title, series, form, pairs, [dataset], shots)
        if published:
            rows += published_rows(title, form, backbone, title_of(dataset), shots, {m.method for m in series}, columns)
        for method, values in series.items():
            by_shots.setdefault(shots, {}).setdefault(method, {})[dataset] = values
    if form != "targets":
        for shots, methods in by_shots.items():
            datasets = sorted({d for parts in methods.values() for d in parts}, key=lambda d: dataset_order(d, 0))
            if len(datasets) > 1:
                title = f"Average of {len(datasets)}" + (f", {shots_text(shots)}" if several_shots else "")
                averaged, mean_of_h = _averages(methods, datasets, form, columns, mean_h)
                lack = {m: [d for d in datasets if d not in methods[m]] for m in method_order(methods) if m not in averaged}
                without += [lacking(m, title, absent) for m, absent in lack.items()]
                rows += [
                    Row(title, str(m), "measured", m, cells_of(s, form, mean_of_h.get(m)), seeds_of(s), average=True)
                    for m, s in averaged.items()
                ]
                rows += (compared := _differences(title, averaged, form, pairs, datasets, shots))
                without += _without_difference(title, averaged, pairs, apart, compared)
                if published and sorted(map(title_of, datasets)) == sorted(PAPERS):
                    there = published_rows(title, form, backbone, "Average", shots, {m.method for m in methods}, columns)
                    rows += [row._replace(average=True) for row in there]
    of_targets = {record.row for record in records if record.target}
    rows = [marked(row, form, of_targets) for row in rows]
    notes = [*transductive(rows, form), *varying(kinds), *unnamed(kinds, records), *uncompared(apart, kinds), *without]
    notes += [*doubled(records), *other_pictures(records, pairs)]
    notes = [*below_zero_shot(rows, form, columns), *notes]
    return Table(name, backbone, columns, rows, notes)


def _kinds(records: list[Record]) -> dict[Name, dict[tuple[str, int], Settings]]:
    """Each row's settings in each cell; rows and cells in the order of the tables, whatever that of the folders is."""
    found: dict[Name, dict[tuple[str, int], Settings]] = {}
    for record in records:
        found.setdefault(record.row, {})[record.cell] = record.settings
    order = {cell: dataset_order(*cell) for cell in {record.cell for record in records}}
    return {row: dict(sorted(found[row].items(), key=lambda item: order[item[0]])) for row in method_order(found)}


def _columns(form: str, records: list[Record], mean_h: bool) -> list[str]:
    if form == "halves":
        return ["base", "new", H] + ([MEAN_H] if mean_h else [])
    if form == "shots":
        return [str(shots) for shots in sorted({record.note["shots"] for record in records})]
    targets = {test: None for record in records for test in record.accuracies if test != record.own_test}
    return ["source", *sorted(targets, key=lambda t: dataset_order(t, 0)), AVERAGE]


def _measured(title: str, series: Mapping[Name, Series], form: str, mean_h: bool) -> list[Row]:
    rows = []
    for method, values in series.items():
        each = list(harmonic(values).values()) if mean_h else []
        cells = cells_of(values, form, statistics.fmean(each) if each else None)
        rows.append(Row(title, str(method), "measured", method, cells, seeds_of(values)))
    return rows


def _differences(
    title: str, series: Mapping[Name, Series], form: str, pairs: Pairs, datasets: Sequence[str], shots: int
) -> list[Row]:
    """Of the columns in which both have the same settings on each of these data sets."""
    rows = []
    for (treated, plain), there in pairs.items():
        if treated in series and plain in series:
            columns = {
                column: values
                for column, values in series[treated].columns.items()
                if all((dataset, int(column) if form == "shots" else shots) in there for dataset in datasets)
            }
            cells, n = difference(Series(columns), series[plain], form)
            if columns:
                several = len(datasets) > 1
                label = f"{treated} - {plain}"
                rows.append(Row(title, label, "difference", treated, cells, n, against=plain, average=several))
    return rows


def _averages(
    methods: Mapping[Name, Mapping[str, Series]], datasets: Sequence[str], form: str, columns: Sequence[str], mean_h: bool
) -> tuple[dict[Name, Series], dict[Name, float]]:
    """Of each row that has one the average over data sets, and the mean of its H where that is asked for."""
    averaged: dict[Name, Series] = {}
    mean_of_h: dict[Name, float] = {}
    for method in method_order(methods):
        parts = methods[method]
        if any(dataset not in parts for dataset in datasets):
            continue  # a mean over fewer data sets is another figure
        series = average([parts[d] for d in datasets], [c for c in columns if c not in (H, MEAN_H)])
        if not series.columns:
            continue
        averaged[method] = series
        hs = [cells_of(parts[d], form, None).get(H) for d in datasets]
        if mean_h and all(hs):
            mean_of_h[method] = statistics.fmean(h.value for h in hs)
    return averaged, mean_of_h


def _without_difference(
    title: str, averaged: Collection[Name], pairs: Pairs, apart: Pairs, compared: Sequence[Row]
) -> list[str]:
    """Averages that no one plain row can be compared with, though each of their data sets has one."""
    told = {row.name for row in compared} | {treated for treated, _ in apart}
    rows = [m for m in averaged if m not in told and any(treated == m for treated, _ in pairs)]
    return [f"{m} has no difference in {title}: no row of {m.plain} has its settings on all of them." for m in rows]
