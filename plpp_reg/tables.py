"""Tables of recorded runs, beside published figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from plpp_reg.engine.files import write_text
from plpp_reg.literature import published_rows
from plpp_reg.records import Record, Runs, read_runs
from plpp_reg.rendering import WRITERS
from plpp_reg.rows import AVERAGE_OF, PAPERS, Row, Table, dataset_order, difference_label, method_order, plain_of, title_of
from plpp_reg.series import (
    AVERAGE,
    MEAN_H,
    H,
    Series,
    average,
    cells_of,
    difference,
    harmonic,
    seeds_of,
    series_of,
    with_average,
)


def write_tables(folder: str | Path, form: str, output: str = "", mean_h: bool = False, published: bool = True) -> str:
    """The tables of a folder as ``"markdown"``, ``"csv"`` or ``"latex"``, printed or written to ``output``."""
    runs = read_runs(folder)
    text = WRITERS[form](make_tables(runs, mean_h, published), runs.missing)
    if output:
        write_text(output, text)
    else:
        print(text, end="")
    return text


def make_tables(runs: Runs, mean_h: bool = False, published: bool = True) -> list[Table]:
    """One table a protocol and backbone."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in runs.records:
        note = record.note
        found.setdefault((note["name"], note["table"], note["backbone"]), []).append(record)
    return [
        _table(name, form, backbone, records, mean_h, published) for (name, form, backbone), records in sorted(found.items())
    ]


def _table(name: str, form: str, backbone: str, records: list[Record], mean_h: bool, published: bool) -> Table:
    groups: dict[tuple[str, int], dict[str, list[Record]]] = {}
    for record in records:
        key = (record.note["dataset"], 0 if form == "shots" else record.note["shots"])
        groups.setdefault(key, {}).setdefault(record.method, []).append(record)
    all_shots = sorted({record.note["shots"] for record in records})
    several_shots = form != "shots" and len(all_shots) > 1
    columns = _columns(form, records, mean_h)
    rows: list[Row] = []
    by_shots: dict[int, dict[str, dict[str, Series]]] = {}
    for (dataset, shots), methods in sorted(groups.items(), key=lambda item: dataset_order(*item[0])):
        title = title_of(dataset) + (f", {shots} shots" if several_shots else "")
        series = {m: series_of(methods[m], form, columns[0]) for m in method_order(methods)}
        if form == "targets":
            series = {m: with_average(s, columns[1:-1]) for m, s in series.items()}
        if form == "shots":
            series = {m: _every_shot(s, methods[m], all_shots) for m, s in series.items()}
        rows += _measured(title, series, form, mean_h)
        if published:
            rows += published_rows(title, form, backbone, title_of(dataset), shots, list(series), columns)
        for method, values in series.items():
            by_shots.setdefault(shots, {}).setdefault(method, {})[dataset] = values
    if form != "targets":
        for shots, methods in by_shots.items():
            datasets = sorted({d for parts in methods.values() for d in parts}, key=lambda d: dataset_order(d, 0))
            if len(datasets) > 1:
                title = f"{AVERAGE_OF}{len(datasets)}" + (f", {shots} shots" if several_shots else "")
                rows += _averages(title, methods, datasets, form, columns, mean_h)
                if published and sorted(map(title_of, datasets)) == sorted(PAPERS):
                    rows += published_rows(title, form, backbone, "Average", shots, list(methods), columns)
    return Table(name, backbone, columns, rows)


def _columns(form: str, records: list[Record], mean_h: bool) -> list[str]:
    if form == "halves":
        return ["base", "new", H] + ([MEAN_H] if mean_h else [])
    if form == "shots":
        return [str(shots) for shots in sorted({record.note["shots"] for record in records})]
    targets = {test: None for record in records for test in record.accuracies if test != record.note["test"]}
    return ["source", *sorted(targets, key=lambda t: dataset_order(t, 0)), AVERAGE]


def _measured(title: str, series: Mapping[str, Series], form: str, mean_h: bool) -> list[Row]:
    rows = []
    for method, values in series.items():
        each = list(harmonic(values).values()) if mean_h else []
        cells = cells_of(values, form, statistics.fmean(each) if each else None)
        rows.append(Row(title, method, "measured", cells, seeds_of(values)))
    return rows + _differences(title, series, form)


def _differences(title: str, series: Mapping[str, Series], form: str) -> list[Row]:
    rows = []
    for method, values in series.items():
        if (plain := plain_of(method)) in series:
            rows.append(Row(title, difference_label(method), "difference", *difference(values, series[plain], form)))
    return rows


def _averages(
    title: str,
    methods: Mapping[str, Mapping[str, Series]],
    datasets: Sequence[str],
    form: str,
    columns: Sequence[str],
    mean_h: bool,
) -> list[Row]:
    averaged: dict[str, Series] = {}
    mean_of_h: dict[str, float] = {}
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
    rows = [Row(title, m, "measured", cells_of(s, form, mean_of_h.get(m)), seeds_of(s)) for m, s in averaged.items()]
    return rows + _differences(title, averaged, form)


def _every_shot(series: Series, records: Sequence[Record], all_shots: Sequence[int]) -> Series:
    """What learns nothing is the same at any number of shots."""
    if records[0].note["learns"]:
        return series
    (values,) = series.columns.values()
    return Series({str(shots): values for shots in all_shots})
