"""Tables of recorded runs, beside published figures: Markdown and LaTeX to read, CSV to compute with.

Only whole results count, and only those of what was planned last; what is missing or failed is named. Spread is the sample
standard deviation over seeds. H of a row is the harmonic mean of its mean base and mean new accuracy, as the papers print it,
for the average over data sets too; its spread and its paired difference are those of each seed's H.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from plpp_reg import results
from plpp_reg.datasets import full_name, paper_name
from plpp_reg.engine.files import write_text
from plpp_reg.errors import InputError
from plpp_reg.protocols import run_label
from plpp_reg.sweep import FAILED, JOB, SUPERSEDED

SUFFIX = "_PLPP"
H, MEAN_H, AVERAGE = "H", "mean H", "average"
AVERAGE_OF = "Average of "  # what the title of an average over data sets begins with
PAPERS = ("ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101", "FGVCAircraft", "SUN397", "DTD")
PAPERS += ("EuroSAT", "UCF101")
FORMS = {"halves": "base to new", "targets": "source to targets", "shots": "few shots"}


class Record(NamedTuple):
    """One finished run: its note, and each test's accuracy in percent."""

    note: Mapping[str, Any]
    accuracies: Mapping[str, float]

    @property
    def method(self) -> str:
        return f"{self.note['method']} {self.note['variant']}".rstrip()


class Figure(NamedTuple):
    """A cell. ``spread`` is a sample standard deviation, or the half-width of a difference's 95% interval; nan: none."""

    value: float
    spread: float = math.nan


class Row(NamedTuple):
    """``kind``: measured, difference or published; ``n``: the number of seeds, "2-3" where columns differ."""

    group: str
    label: str
    kind: str
    cells: Mapping[str, Figure]
    n: str = ""
    source: str = ""


class Table(NamedTuple):
    protocol: str
    backbone: str
    columns: Sequence[str]
    rows: Sequence[Row]


class Found(NamedTuple):
    """A run's folder and what was planned in it; ``result`` where it is whole and of that plan, else ``why`` it does not count.

    ``note`` is empty where no plan can be read: a run of ``plpp train``, or a broken job.json.
    """

    place: Path
    note: Mapping[str, Any]
    result: Mapping[str, Any] | None
    why: str = ""


class Runs(NamedTuple):
    """What lies below a folder: whole results, and what is missing or failed, in words."""

    records: list[Record]
    missing: list[str]


# ---- reading -----------------------------------------------------------------------------------------------------------

NOTE = {"name": str, "table": str, "dataset": str, "shots": int, "method": str, "variant": str, "backbone": str, "test": str}
NOTE |= {"learns": bool, "seed": int}


def find_runs(folder: str | Path) -> list[Found]:
    """Every run below a folder, those of ``plpp run`` and others.

    Raises:
        InputError: no such folder.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{str(folder)!r}: expected a folder that plpp run wrote")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != SUPERSEDED)
        if JOB in files:
            folders.clear()  # a run's own folders: checkpoints, event files
            found.append(_planned(Path(place)))
        elif results.RESULT in files or "config.yaml" in files:
            result = results.read_if_whole(place)
            found.append(Found(Path(place), {}, result, "" if result else "not finished"))
    return found


def _planned(place: Path) -> Found:
    try:
        note = json.loads((place / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        note = None
    fits = isinstance(note, dict) and all(isinstance(note.get(key), kind) for key, kind in NOTE.items())
    if not fits or note["table"] not in FORMS:
        return Found(place, {}, None, f"its {JOB} cannot be read")
    result = results.read_if_whole(place)
    if result is None or result.get("protocol") != note:
        return Found(place, note, None, _why(place, result is not None))
    try:
        whole = all(math.isfinite(value) for value in accuracies(note, result).values())
    except (AttributeError, KeyError, TypeError):
        whole = False
    return Found(place, note, result) if whole else Found(place, note, None, f"no accuracy in its {results.RESULT}")


def accuracies(note: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, float]:
    """Each test's accuracy by its name."""
    tests = {name: test["metrics"]["accuracy"] for name, test in result.get("tests", {}).items()}
    return {note["test"]: result["metrics"]["accuracy"], **tests}


def read_runs(folder: str | Path) -> Runs:
    """Every run of ``plpp run`` below a folder.

    Raises:
        InputError: no such folder, or no run in it.
    """
    planned = [run for run in find_runs(folder) if run.note or (run.place / JOB).is_file()]
    if not planned:
        raise InputError(f"{str(folder)!r}: expected runs of plpp run in it, got none")
    return as_runs(planned)


def as_runs(found: Iterable[Found]) -> Runs:
    """What counts of these, and the others in words."""
    records, missing = [], []
    for run in found:
        if run.note and run.result:
            records.append(Record(run.note, accuracies(run.note, run.result)))
        elif not run.result:
            missing.append(f"{run_label(run.note) if run.note else run.place}: {run.why}")
    return Runs(records, missing)


def _why(place: Path, other: bool) -> str:
    try:
        return f"failed: {json.loads((place / FAILED).read_text(encoding='utf-8'))['error']}"
    except (OSError, ValueError, KeyError):
        return "not run yet with these settings" if other else "not finished"


# ---- a method's figures on one data set ---------------------------------------------------------------------------------


class Series(NamedTuple):
    """Column -> seed -> accuracy, of one method on one data set (or on their average)."""

    columns: Mapping[str, Mapping[int, float]]

    def seeds(self, columns: Iterable[str]) -> list[int]:
        """Seeds that have a figure in each of the columns."""
        sets = [set(self.columns.get(column, {})) for column in columns]
        return sorted(set.intersection(*sets)) if sets else []


def _series(records: Iterable[Record], form: str, own: str) -> Series:
    columns: dict[str, dict[int, float]] = {}
    for record in records:
        note = record.note
        for test, accuracy in record.accuracies.items():
            column = str(note["shots"]) if form == "shots" else own if form == "targets" and test == note["test"] else test
            columns.setdefault(column, {})[note["seed"]] = accuracy
    return Series(columns)


def _with_average(series: Series, columns: Sequence[str]) -> Series:
    seeds = series.seeds(columns)
    mean = {seed: statistics.fmean(series.columns[c][seed] for c in columns) for seed in seeds}
    return Series({**series.columns, AVERAGE: mean}) if mean else series


def _average_series(parts: Sequence[Series], columns: Iterable[str]) -> Series:
    """The mean over data sets, for the seeds that every data set has."""
    averaged = {}
    for column in columns:
        seeds = set.intersection(*(set(part.columns.get(column, {})) for part in parts))
        averaged[column] = {s: statistics.fmean(part.columns[column][s] for part in parts) for s in sorted(seeds)}
    return Series({column: values for column, values in averaged.items() if values})


def _harmonic(series: Series) -> dict[int, float]:
    """Each seed's H."""
    base, new = series.columns.get("base", {}), series.columns.get("new", {})
    return {seed: results.harmonic_mean(base[seed], new[seed]) for seed in sorted(base.keys() & new.keys())}


def _cells(series: Series, form: str, mean_h: float | None) -> dict[str, Figure]:
    cells = {}
    for column, values in series.columns.items():
        if values:
            cells[column] = Figure(*results.summary([values[s] for s in sorted(values)])[:2])
    each = _harmonic(series) if form == "halves" else {}
    if each:
        means = [statistics.fmean(series.columns[half][s] for s in each) for half in ("base", "new")]
        cells[H] = Figure(results.harmonic_mean(*means), results.summary(list(each.values())).std)
        if mean_h is not None:
            cells[MEAN_H] = Figure(mean_h)
    return cells


def _seeds(series: Series) -> str:
    return _span([len(values) for values in series.columns.values()])


def _span(counts: Sequence[int]) -> str:
    return "-".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"


def _difference(treated: Series, plain: Series, form: str) -> tuple[dict[str, Figure], str]:
    """Paired over the seeds that both have, with the half-width of Student's 95% interval."""
    pairs = {c: (treated.columns[c], plain.columns[c]) for c in treated.columns if c in plain.columns}
    if form == "halves":
        pairs[H] = (_harmonic(treated), _harmonic(plain))
    cells, counts = {}, []
    for column, (a, b) in pairs.items():
        seeds = sorted(a.keys() & b.keys())
        if seeds:
            paired = results.paired([a[s] for s in seeds], [b[s] for s in seeds])
            cells[column] = Figure(paired.mean, paired.half_width)
            counts.append(paired.n)
    return cells, _span(counts)


# ---- tables ------------------------------------------------------------------------------------------------------------


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
        series = {m: _series(methods[m], form, columns[0]) for m in method_order(methods)}
        if form == "targets":
            series = {m: _with_average(s, columns[1:-1]) for m, s in series.items()}
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
        each = list(_harmonic(values).values()) if mean_h else []
        cells = _cells(values, form, statistics.fmean(each) if each else None)
        rows.append(Row(title, method, "measured", cells, _seeds(values)))
    return rows + _differences(title, series, form)


def _differences(title: str, series: Mapping[str, Series], form: str) -> list[Row]:
    rows = []
    for method, values in series.items():
        if (plain := plain_of(method)) in series:
            rows.append(Row(title, difference_label(method), "difference", *_difference(values, series[plain], form)))
    return rows


def plain_of(method: str) -> str:
    """``"CoOp_PLPP TOP_K=3"`` -> CoOp, what it is compared with; nothing for a method without PLPP."""
    name = method.partition(" ")[0]
    return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else ""


def difference_label(method: str) -> str:
    return f"{method} - {plain_of(method)}"


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
        series = _average_series([parts[d] for d in datasets], [c for c in columns if c not in (H, MEAN_H)])
        if not series.columns:
            continue
        averaged[method] = series
        hs = [_cells(parts[d], form, None).get(H) for d in datasets]
        if mean_h and all(hs):
            mean_of_h[method] = statistics.fmean(h.value for h in hs)
    rows = [Row(title, m, "measured", _cells(s, form, mean_of_h.get(m)), _seeds(s)) for m, s in averaged.items()]
    return rows + _differences(title, averaged, form)


def _every_shot(series: Series, records: Sequence[Record], all_shots: Sequence[int]) -> Series:
    """What learns nothing is the same at any number of shots."""
    if records[0].note["learns"]:
        return series
    (values,) = series.columns.values()
    return Series({str(shots): values for shots in all_shots})


def title_of(dataset: str) -> str:
    """The paper's name of a data set; of anything else (one's own, a column) its own."""
    try:
        return paper_name(full_name(dataset))
    except InputError:
        return dataset


def dataset_order(dataset: str, shots: int) -> tuple[int, str, int]:
    """What to sort by: the papers' order first."""
    title = title_of(dataset)
    known = (*PAPERS, "ImageNetV2", "ImageNet-Sketch", "ImageNet-A", "ImageNet-R")
    return (known.index(title) if title in known else len(known), title, shots)


def method_order(methods: Iterable[str]) -> list[str]:
    """Zero-shot first, then each method with its PLPP forms after it."""
    return sorted(methods, key=lambda m: (not m.startswith("Zeroshot"), m.partition(" ")[0].removesuffix(SUFFIX), m))


# ---- published figures -------------------------------------------------------------------------------------------------

PUBLISHED_NAMES = {"CLIP": "ZeroshotCLIP", "Zero-shot CLIP": "ZeroshotCLIP", "Deep Vision Prompting": "VPT"}
TARGET_COLUMNS = {"ImageNet_source": "source", "Average_targets": AVERAGE}
FILES = {"halves": ("base_to_new", "base_to_new_by_shots"), "targets": ("cross_dataset", "domain_generalization")}


@functools.cache
def read_published(name: str) -> list[dict[str, str]]:
    """A file of plpp_reg/published/, every value as it is printed."""
    text = resources.files("plpp_reg.published").joinpath(f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def our_name(method: str) -> str:
    """``"CoOp [rerun in DePT]"`` -> CoOp, ``"CoOp+PLPP [ICLR24 submission]"`` -> CoOp_PLPP: whose figures a row has."""
    plain = re.split(r" [\[(]", method)[0].replace("+PLPP", SUFFIX)
    return PUBLISHED_NAMES.get(plain, plain)


def published_rows(
    title: str, form: str, backbone: str, dataset: str, shots: int, methods: Sequence[str], columns: Sequence[str]
) -> list[Row]:
    """Rows of the literature for these methods, where ours are comparable: the same backbone, data set and shots."""
    if backbone != "ViT-B/16":
        return []
    if form == "targets":
        return _published_targets(title, dataset, shots, methods, columns)
    if form == "shots":
        return _published_shots(title, dataset, methods, columns)
    rows = []
    for file in FILES[form]:
        for line in read_published(file):
            wanted = (
                line["dataset"] == dataset and int(line.get("shots") or 16) == shots and our_name(line["method"]) in methods
            )
            if wanted and not (file == "base_to_new_by_shots" and shots == 16):  # those stand in base_to_new too
                cells = {c: Figure(float(line[k])) for c, k in (("base", "base"), ("new", "new"), (H, "hm")) if line[k]}
                rows.append(_published(title, file, line, cells))
    return rows


def _published(title: str, file: str, line: Mapping[str, str], cells: Mapping[str, Figure]) -> Row:
    wrong = [
        f"{m['column']} as printed, {m['follows']} follows: {m['note']}"
        for m in read_published("misprints")
        if m["file"] == file and m["method"] == line["method"] and m["dataset"] == line.get("dataset", "")
        if m["shots"] == line.get("shots", "")
    ]
    return Row(title, line["method"], "published", cells, "", "; ".join([line["source"], *wrong]))


def _published_shots(title: str, dataset: str, methods: Sequence[str], columns: Sequence[str]) -> list[Row]:
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for line in read_published("few_shot"):
        if line["dataset"] == dataset and our_name(line["method"]) in methods and line["shots"] in columns:
            found.setdefault((line["method"], line["source"]), {})[line["shots"]] = Figure(float(line["accuracy"]))
    return [
        _published(title, "few_shot", {"method": m, "source": source, "dataset": dataset}, cells)
        for (m, source), cells in found.items()
    ]


def _published_targets(title: str, dataset: str, shots: int, methods: Sequence[str], columns: Sequence[str]) -> list[Row]:
    if dataset != "ImageNet" or shots != 16:
        return []
    rows = []
    for file in FILES["targets"]:
        lines = read_published(file)
        named = {TARGET_COLUMNS.get(k, k): k for k in lines[0] if k not in ("method", "source")}
        ours = {column: column if column in ("source", AVERAGE) else title_of(column) for column in columns}
        if sorted(ours.values()) != sorted(named):
            continue  # other targets: their average is another figure
        for line in lines:
            other_backbone = re.search(r"\[(RN50|ViT-B/32|ViT-H/14)\]", line["method"])
            if our_name(line["method"]) in methods and not other_backbone:
                cells = {c: Figure(float(line[named[t]])) for c, t in ours.items() if line[named[t]]}
                rows.append(_published(title, file, line, cells))
    return rows


# ---- writing -----------------------------------------------------------------------------------------------------------


def write_tables(folder: str | Path, form: str, output: str = "", mean_h: bool = False, published: bool = True) -> str:
    """The tables of a folder as ``"markdown"``, ``"csv"`` or ``"latex"``, printed or written to ``output``."""
    runs = read_runs(folder)
    text = WRITERS[form](make_tables(runs, mean_h, published), runs.missing)
    if output:
        write_text(output, text)
    else:
        print(text, end="")
    return text


def _cell(row: Row, column: str, plus_minus: str, none: str) -> str:
    figure = row.cells.get(column)
    if figure is None:
        return none
    value = f"{figure.value:+.2f}" if row.kind == "difference" else f"{figure.value:.2f}"
    return value if math.isnan(figure.spread) else f"{value} {plus_minus} {figure.spread:.2f}"


def _label(row: Row) -> str:
    return f"{row.label} (published)" if row.kind == "published" else row.label


LEGEND = (
    "Accuracy in percent, mean ± sample standard deviation over seeds. Differences are paired over seeds, ± half the 95% "
    "interval (Student's t)."
)
LEGEND_H = (
    " H is the harmonic mean of the mean base and the mean new accuracy, in the average too; its spread is that of each "
    "seed's H."
)


def markdown(tables: Sequence[Table], missing: Sequence[str]) -> str:
    lines: list[str] = []
    for table in tables:
        lines += [f"## {table.protocol} ({table.backbone})", ""]
        header = ["data set", "method", *(title_of(c) for c in table.columns), "seeds", "reference"]
        lines += [f"| {' | '.join(header)} |", "|" + "---|" * 2 + "---:|" * (len(table.columns) + 1) + "---|"]
        for row in table.rows:
            cells = [_cell(row, column, "±", "") for column in table.columns]
            line = [row.group, _label(row), *cells, row.n, row.source]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
        lines += ["", LEGEND + (LEGEND_H if H in table.columns else ""), ""]
    return "\n".join([*lines, *_missing_lines(missing)]).rstrip("\n") + "\n"


def _missing_lines(missing: Sequence[str]) -> list[str]:
    return [f"Missing, {len(missing)} runs:", "", *(f"- {line}" for line in missing)] if missing else []


def to_csv(tables: Sequence[Table], missing: Sequence[str]) -> str:
    """A line a figure, unrounded; ``spread`` is the sample standard deviation, of a difference half its 95% interval."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["protocol", "backbone", "group", "method", "kind", "column", "value", "spread", "seeds", "source"])
    for table in tables:
        for row in table.rows:
            for column in table.columns:
                if column in row.cells:
                    value, spread = row.cells[column]
                    rest = ["" if math.isnan(spread) else repr(spread), row.n, row.source]
                    head = [table.protocol, table.backbone, row.group, row.label, row.kind, column]
                    writer.writerow([*head, repr(value), *rest])
    for line in missing:
        writer.writerow(["", "", "", "", "missing", "", "", "", "", line])
    return buffer.getvalue()


LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def latex(tables: Sequence[Table], missing: Sequence[str]) -> str:
    """For the package booktabs; published rows carry the number of their source, listed below."""
    lines: list[str] = []
    for table in tables:
        sources = list(dict.fromkeys(row.source for row in table.rows if row.source))
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{_tex(f'{table.protocol}, {table.backbone}. {LEGEND}')}}}"]
        lines += [rf"\begin{{tabular}}{{ll{'r' * (len(table.columns) + 1)}}}", r"\toprule"]
        header = ["data set", "method", *(title_of(c) for c in table.columns), "seeds"]
        lines += [" & ".join(map(_tex, header)) + r" \\", r"\midrule"]
        group = table.rows[0].group if table.rows else ""
        for row in table.rows:
            if row.group != group:
                lines.append(r"\midrule")
                group = row.group
            note = rf"\,[{sources.index(row.source) + 1}]" if row.source else ""
            cells = [_tex(_cell(row, column, "±", "--")) for column in table.columns]
            lines.append(" & ".join([_tex(row.group), _tex(_label(row)) + note, *cells, row.n]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        lines += [f"% [{i}] {source}" for i, source in enumerate(sources, start=1)] + [""]
    return "\n".join([*lines, *(f"% missing: {line}" for line in missing)]).rstrip("\n") + "\n"


WRITERS: dict[str, Callable[[Sequence[Table], Sequence[str]], str]] = {"markdown": markdown, "csv": to_csv, "latex": latex}
