"""``plpp report``: one self-contained HTML page of a folder of recorded runs, and its figures as PNGs beside it.

The tables are those of :mod:`plpp_reg.tables`; the page adds what a table cannot show. Everything that a run's files say is
treated as text: the template escapes it, and the page forbids scripts and anything from outside.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from plpp_reg import __version__, plots, records
from plpp_reg.engine.files import write_atomically, write_text
from plpp_reg.errors import InputError
from plpp_reg.learned import PromptReader, Prompts, history
from plpp_reg.plots import Bar, Line, Picture
from plpp_reg.protocols import run_label
from plpp_reg.records import Found
from plpp_reg.rendering import LEGEND, LEGEND_H
from plpp_reg.rows import AVERAGE_OF, Row, Table, dataset_order, method_order, plain_of, title_of
from plpp_reg.series import MEAN_H, Figure, H
from plpp_reg.sweep import FAILED, duration
from plpp_reg.tables import make_tables

PAGE = "report.html"
TEMPLATE = "report.html.j2"
NOT_A_LOSS = ("lr", "acc", "perplexity")  # what a history holds beside losses


class Cell(NamedTuple):
    """``clear``: a difference whose 95% interval leaves out 0."""

    value: str = ""
    spread: str = ""
    clear: bool = False


class TableRow(NamedTuple):
    """A row of a table of the page."""

    label: str
    kind: str
    cells: list[Cell]
    n: str = ""
    source: str = ""


class Grid(NamedTuple):
    """A table of the page: blocks of rows, each below its title."""

    title: str
    columns: list[str]
    blocks: list[tuple[str, list[TableRow]]]
    has_source: bool = False


class Training(NamedTuple):
    """What the runs of one data set did over their epochs, and what is not known of it."""

    title: str
    pictures: list[Picture]
    without: list[str]


class Words(NamedTuple):
    """The nearest words of one run's prompts: a row a context vector, or why they cannot be read."""

    label: str
    prompts: Prompts | None
    why: str = ""


class Section(NamedTuple):
    """A protocol and a backbone, or the runs outside of any."""

    anchor: str
    title: str
    overview: list[Grid]
    full: Grid | None
    legend: str
    results: list[Picture]
    training: list[Training]
    words: list[tuple[str, list[Words]]]


class RunCard(NamedTuple):
    """Everything that is known of one run."""

    label: str
    place: str
    state: str
    figures: list[tuple[str, str]]
    config: str
    log: str


class Run(NamedTuple):
    """A run as the page groups it."""

    found: Found
    section: tuple[str, str, str]  # protocol, form of its table, backbone
    dataset: str
    shots: int
    method: str
    seed: int


def write_report(
    folder: str | Path, output: str | Path = "", published: bool = True, say: Callable[[str], None] = print
) -> Path:
    """Write the page, by default ``folder``/report.html, and the figures into a folder ``<its name>_files`` beside it.

    Raises:
        InputError: no such folder, no run in it, or a place that cannot be written to.
    """
    found = records.find_runs(folder)
    if not found:
        raise InputError(f"{str(folder)!r}: expected recorded runs (folders with a result.json) in it, got none")
    path = Path(output) if output else Path(folder) / PAGE
    if path.is_dir():
        raise InputError(f"--output {str(path)!r}: expected the name of a file, got a folder")
    say(f"{len(found)} runs in {folder}")
    content = page(Path(folder), found, published, f"{path.stem}_files")
    pictures = [p for s in content["sections"] for p in (*s.results, *(q for t in s.training for q in t.pictures))]
    html = render(content)
    try:
        for picture in pictures:
            png = picture.png
            write_atomically(path.parent / f"{path.stem}_files" / f"{picture.name}.png", lambda p, png=png: p.write_bytes(png))
        write_text(path, html)
    except OSError as e:
        raise InputError(f"--output {str(path)!r}: expected a place to write to, got {e}") from e
    say(f"Report: {path} ({len(html.encode()) / 2**20:.1f} MiB), {len(pictures)} figures in {path.stem}_files")
    return path


def render(content: Mapping[str, Any]) -> str:
    """The page. What is no character (half a surrogate pair in a name) is replaced."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("plpp_reg").joinpath("templates", TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(content).encode("utf-8", "replace").decode()


def page(folder: Path, found: Sequence[Found], published: bool, files: str) -> dict[str, Any]:
    """What the template shows of these runs."""
    runs = sorted(filter(None, map(_run, found)), key=lambda r: (*dataset_order(r.dataset, r.shots), r.method, r.seed))
    made = make_tables(records.as_runs(found), published=published)
    reader = PromptReader()
    sections = [_protocol(table, _of(runs, table), reader) for table in made]
    if others := [run for run in runs if not run.found.note]:
        sections.append(_outside(folder, others, reader))
    cards: dict[str, list[RunCard]] = {}
    for run in found:
        cards.setdefault(_card_group(run), []).append(_card(folder, run))
    return {
        "title": folder.resolve().name or str(folder),
        "version": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "files": files,
        "light": plots.LIGHT,
        "dark": plots.DARK,
        "finished": sum(run.result is not None for run in found),
        "missing": [(_label(folder, run), run.why, _failure_log(run.place)) for run in found if run.result is None],
        "sections": sections,
        "environment": _environment(found),
        "cards": list(cards.items()),
        "count": len(found),
    }


def _run(found: Found) -> Run | None:
    """A finished run with what it is grouped by; None where its record does not say."""
    if found.result is None:
        return None
    note, result = found.note, found.result
    if note:
        section = (note["name"], note["table"], note["backbone"])
        method = f"{note['method']} {note['variant']}".rstrip()
        return Run(found, section, note["dataset"], note["shots"], method, note["seed"])
    shots, seed = (value if isinstance(value, int) else -1 for value in (_key(result, "DATASET.NUM_SHOTS"), result.get("seed")))
    section = ("", "", str(result.get("backbone", "")))
    return Run(found, section, str(result.get("dataset", "")), shots, str(result.get("trainer", "")), seed)


def _key(result: Mapping[str, Any], key: str) -> Any:
    return result["config"].get(key) if isinstance(result["config"], dict) else None


def _of(runs: Iterable[Run], table: Table) -> list[Run]:
    return [run for run in runs if run.found.note and (run.section[0], run.section[2]) == (table.protocol, table.backbone)]


# ---- tables ------------------------------------------------------------------------------------------------------------


def _protocol(table: Table, runs: Sequence[Run], reader: PromptReader) -> Section:
    form = runs[0].section[1]
    title = f"{table.protocol} ({table.backbone})"
    name = _file_name(title)
    drawn = _shot_curves(table, name) if form == "shots" else _difference_bars(table, name, form)
    return Section(
        anchor=name,
        title=title,
        overview=_overview(table, form),
        full=_full(table),
        legend=LEGEND + (LEGEND_H if H in table.columns else ""),
        results=drawn,
        training=_training(runs, name),
        words=_words(runs, reader),
    )


def _full(table: Table) -> Grid:
    blocks: dict[str, list[TableRow]] = {}
    for row in table.rows:
        cells = [_cell(row, row.cells.get(column)) for column in table.columns]
        blocks.setdefault(row.group, []).append(TableRow(row.label, row.kind, cells, row.n, row.source))
    columns = [*map(title_of, table.columns), "seeds"]
    return Grid("Every figure", columns, list(blocks.items()), any(row.source for row in table.rows))


def _overview(table: Table, form: str) -> list[Grid]:
    """A table a column, with a column a data set, where there are several: H, the most shots and the average first."""
    groups = list(dict.fromkeys(row.group for row in table.rows))
    groups.sort(key=lambda group: not group.startswith(AVERAGE_OF))
    if form == "targets" or len(groups) < 2:
        return []
    grids = []
    for column in reversed(table.columns):
        lines: dict[tuple[str, str], dict[str, Row]] = {}
        for row in table.rows:
            if row.kind != "published" and column in row.cells:
                lines.setdefault((row.label, row.kind), {})[row.group] = row
        ours = [
            TableRow(label, kind, [_cell(rows[g], rows[g].cells[column]) if g in rows else Cell() for g in groups])
            for (label, kind), rows in sorted(lines.items(), key=lambda item: item[0][1] == "difference")
        ]
        if ours:
            what = f"{column} shots" if form == "shots" else column
            grids.append(Grid(f"{what}, a column a data set", groups, [("", ours)]))
    return grids


def _cell(row: Row, figure: Figure | None) -> Cell:
    if figure is None:
        return Cell()
    different = row.kind == "difference"
    known = not math.isnan(figure.spread)
    spread = f"± {figure.spread:.2f}" if known else ""
    value = f"{figure.value:+.2f}" if different else f"{figure.value:.2f}"
    return Cell(value, spread, different and known and abs(figure.value) > figure.spread)


# ---- figures of results -----------------------------------------------------------------------------------------------


def _shot_curves(table: Table, name: str) -> list[Picture]:
    """Accuracy over shots, a figure a data set: mean, and a band of one standard deviation."""
    pictures = []
    ticks = [float(column) for column in table.columns]
    for group, rows in _by_group(table, "measured"):
        style = plots.styles([row.label for row in rows], _plain([row.label for row in rows]))
        lines = []
        for row in rows:
            points = [(float(c), row.cells[c]) for c in table.columns if c in row.cells]
            spreads = [0.0 if math.isnan(f.spread) else f.spread for _, f in points]
            x, y = [shots for shots, _ in points], [f.value for _, f in points]
            low, high = ([v + sign * s for v, s in zip(y, spreads, strict=True)] for sign in (-1, 1))
            lines.append(Line(row.label, style[row.label], x, y, low, high))
        title = f"{group}: accuracy over shots"
        said = [f"{row.label}: " + ", ".join(f"{c} shots {_say(row, c)}" for c in row.cells) for row in rows]
        pictures.append(
            plots.curves(
                f"{name}-{_file_name(group)}-shots", title, f"{title}, percent. {'. '.join(said)}.", lines,
                "training images a class", "accuracy (%)", ticks, log_x=True,
            )
        )  # fmt: skip
    return pictures


def _difference_bars(table: Table, name: str, form: str) -> list[Picture]:
    """Each method with PLPP against the plain one: a row a data set; a row a method where there is one data set."""
    by_group = _by_group(table, "difference")
    columns = [c for c in table.columns if c != MEAN_H and any(c in row.cells for _, rows in by_group for row in rows)]
    drawn: list[tuple[str, list[str], dict[str, list[Bar | None]]]] = []
    if form == "targets":
        for group, rows in by_group:
            values = {row.label: [_bar(row, column) for column in columns] for row in rows}
            drawn += [(f"{group}: {label}", list(map(title_of, columns)), {label: v}) for label, v in values.items()]
    elif len(by_group) == 1:
        ((group, rows),) = by_group
        values = {column: [_bar(row, column) for row in rows] for column in columns}
        drawn.append((f"{group}: with PLPP against without", [row.label for row in rows], values))
    else:
        for label in dict.fromkeys(row.label for _, rows in by_group for row in rows):
            there = [(group, row) for group, rows in by_group for row in rows if row.label == label]
            drawn.append((label, [g for g, _ in there], {c: [_bar(row, c) for _, row in there] for c in columns}))
    pictures = []
    for title, rows, values in drawn:
        said = [
            f"{row}: " + ", ".join(f"{c} {_say_bar(each[i])}" for c, each in values.items() if each[i])
            for i, row in enumerate(rows)
        ]
        alt = f"{title}, difference in points with half its 95% interval. {'. '.join(said)}."
        pictures.append(plots.bars(f"{name}-{_file_name(title)}", title, alt, rows, values, "difference in accuracy, points"))
    return pictures


def _by_group(table: Table, kind: str) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.kind == kind and row.cells:
            groups.setdefault(row.group, []).append(row)
    return list(groups.items())


def _plain(methods: Sequence[str]) -> dict[str, str]:
    return {method: plain for method in methods if (plain := plain_of(method))}


def _bar(row: Row, column: str) -> Bar | None:
    return Bar(*row.cells[column]) if column in row.cells else None


def _say(row: Row, column: str) -> str:
    cell = _cell(row, row.cells[column])
    return f"{cell.value} {cell.spread}".rstrip()


def _say_bar(bar: Bar) -> str:
    return f"{bar.value:+.1f}" + ("" if math.isnan(bar.half_width) else f" ± {bar.half_width:.1f}")


# ---- training ----------------------------------------------------------------------------------------------------------


def _training(runs: Sequence[Run], name: str) -> list[Training]:
    """Perplexity and every loss over epochs, a part a data set, at the most shots that it was run with."""
    parts = []
    for dataset, of_dataset in _grouped(runs, lambda run: run.dataset).items():
        most = max(run.shots for run in of_dataset)
        histories: dict[str, list[list[dict[str, float]]]] = {}
        without = []
        for run in of_dataset:
            if run.shots != most or run.found.note.get("learns") is False:
                continue
            try:
                epochs, why = history(run.found.place), "no checkpoint with its history"
            except InputError as e:
                epochs, why = [], str(e)
            if epochs:
                histories.setdefault(run.method, []).append(epochs)
            elif run.found.note or (run.found.place / "few_shot.json").is_file():
                without.append(f"{run.method}, seed {run.seed}: {why}")
        title = title_of(dataset) + (f", {most} shots" if most > 0 else "")
        pictures = _history_curves(histories, title, name) if histories else []
        if pictures or without:
            parts.append(Training(title, pictures, without))
    return parts


def _history_curves(histories: Mapping[str, list[list[dict[str, float]]]], title: str, name: str) -> list[Picture]:
    methods = method_order(histories)
    style = plots.styles(methods, _plain(methods))
    names = dict.fromkeys(key for method in methods for epochs in histories[method] for epoch in epochs for key in epoch)
    wanted = [*(key for key in ("perplexity", "loss") if key in names), *(k for k in names if k not in (*NOT_A_LOSS, "loss"))]
    pictures = []
    for key in wanted:
        lines = []
        for method in methods:
            by_epoch: dict[int, list[float]] = {}
            for epochs in histories[method]:
                for number, epoch in enumerate(epochs, start=1):
                    if key in epoch and (key != "perplexity" or epoch[key] > 0):
                        by_epoch.setdefault(number, []).append(epoch[key])
            if by_epoch:
                x, each = list(by_epoch), list(by_epoch.values())
                lines.append(Line(method, style[method], x, _means(each), list(map(min, each)), list(map(max, each))))
        if lines:
            what = (
                "perplexity of the context" if key == "perplexity" else "sum of the losses" if key == "loss" else f"loss {key}"
            )
            said = [f"{line.label}: from {line.y[0]:.4g} to {line.y[-1]:.4g} in {line.x[-1]} epochs" for line in lines]
            alt = f"{title}: {what} over epochs. {'. '.join(said)}."
            picture_name = f"{name}-{_file_name(title)}-{_file_name(key)}"
            axis = "perplexity" if key == "perplexity" else "mean of the epoch"
            log_y = key == "perplexity"
            pictures.append(plots.curves(picture_name, f"{title}: {what}", alt, lines, "epoch", axis, log_y=log_y))
    return pictures


def _means(each: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in each]


def _words(runs: Sequence[Run], reader: PromptReader) -> list[tuple[str, list[Words]]]:
    """By data set, of each method the run with the lowest seed, at the most shots."""
    parts = []
    for dataset, of_dataset in _grouped(runs, lambda run: run.dataset).items():
        most = max(run.shots for run in of_dataset)
        shown = []
        trained = [run for run in of_dataset if run.shots == most and run.found.note.get("learns") is not False]
        for method, of_method in _grouped(trained, lambda run: run.method).items():
            run = min(of_method, key=lambda run: run.seed)
            label = f"{method}, seed {run.seed}"
            try:
                shown.append(Words(label, reader.read(run.found.place)))
            except InputError as e:
                shown.append(Words(label, None, str(e)))
            except Exception as e:  # a file that nobody foresaw loses its words, not the page
                shown.append(Words(label, None, f"{type(e).__name__}: {e}"))
        if shown:
            parts.append((title_of(dataset) + (f", {most} shots" if most > 0 else ""), shown))
    return parts


def _grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


# ---- runs --------------------------------------------------------------------------------------------------------------


def _outside(folder: Path, runs: Sequence[Run], reader: PromptReader) -> Section:
    """Runs of ``plpp train`` or others: each by itself, no mean of them."""
    lines = []
    for run in runs:
        result = run.found.result
        accuracy = result["metrics"].get("accuracy") if isinstance(result["metrics"], dict) else None
        values = [run.method, title_of(run.dataset), str(_key(result, "DATASET.SUBSAMPLE_CLASSES") or "")]
        values += ["all" if run.shots < 0 else str(run.shots), str(run.seed)]
        values.append(f"{accuracy:.2f}" if isinstance(accuracy, (int, float)) else "")
        lines.append(TableRow(_place(folder, run.found), "measured", [Cell(value) for value in values]))
    columns = ["trainer", "data set", "classes", "shots", "seed", "accuracy"]
    return Section(
        anchor="outside",
        title="Runs outside a protocol",
        overview=[],
        full=Grid("Every run", columns, [("", lines)]),
        legend="Accuracy in percent, of the test that the run itself made; nothing is averaged.",
        results=[],
        training=_training(runs, "outside"),
        words=_words(runs, reader),
    )


def _label(folder: Path, run: Found) -> str:
    return run_label(run.note) if run.note else _place(folder, run)


def _place(folder: Path, run: Found) -> str:
    return run.place.relative_to(folder).as_posix()


def _card_group(run: Found) -> str:
    if not run.note:
        return "Runs outside a protocol"
    return f"{run.note['name']}: {title_of(run.note['dataset'])}"


def _card(folder: Path, run: Found) -> RunCard:
    figures: list[tuple[str, str]] = []
    result = run.result
    if result is not None:
        tests = {"": result["metrics"]}
        if run.note:
            tests = {run.note["test"]: result["metrics"], **{name: t["metrics"] for name, t in result.get("tests", {}).items()}}
        figures += [(f"{test} {name}".strip(), _text(v)) for test, metrics in tests.items() for name, v in _items(metrics)]
        figures += [(f"loss {name} of the last epoch", _text(v)) for name, v in _items(result.get("losses"))]
        if isinstance(result.get("seconds"), (int, float)):
            figures.append(("training", duration(result["seconds"])))
        figures += [(key, _text(result[key])) for key in ("files_sha256", "few_shot_sha256") if result.get(key)]
        figures += [(name, _text(v)) for name, v in _items(result.get("versions"))]
    return RunCard(
        label=_label(folder, run),
        place=_place(folder, run),
        state=run.why or "finished",
        figures=figures,
        config=_config(run),
        log=_failure_log(run.place),
    )


def _items(values: object) -> list[tuple[str, Any]]:
    return list(values.items()) if isinstance(values, dict) else []


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _config(run: Found) -> str:
    """The resolved configuration, a key a line: as the result has it, else as the folder has it."""
    if run.result is not None and isinstance(run.result["config"], dict) and run.result["config"]:
        return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in run.result["config"].items())
    try:
        return (run.place / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "none recorded: the run was not started"


def _failure_log(place: Path) -> str:
    try:
        lines = json.loads((place / FAILED).read_text(encoding="utf-8"))["log"]
        return "\n".join(map(str, lines))
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _environment(found: Sequence[Found]) -> Grid | None:
    """A column an environment, with the number of runs in it."""
    kinds: dict[str, int] = {}
    for run in found:
        versions = run.result.get("versions") if run.result is not None else None
        if isinstance(versions, dict):
            key = json.dumps(versions, sort_keys=True)
            kinds[key] = kinds.get(key, 0) + 1
    if not kinds:
        return None
    each = [json.loads(key) for key in kinds]
    names = dict.fromkeys(name for versions in each for name in versions)
    lines = [TableRow(name, "measured", [Cell(_text(v.get(name, "")), "") for v in each]) for name in names]
    return Grid("Versions", [f"{count} run{'s' * (count > 1)}" for count in kinds.values()], [("", lines)])


def _file_name(text: str) -> str:
    """A name that any file system takes, different for different texts."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:60]
    if plain == text.lower():
        return plain
    import hashlib

    return f"{plain}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:6]}".strip("-")
