"""Tables of the page, and the figures that are drawn of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from plpp_reg.results import numbers, plots
from plpp_reg.results.job import shots_text
from plpp_reg.results.plots import Bar, Level, Line, Picture, file_name
from plpp_reg.results.tables.records import ZERO_SHOT
from plpp_reg.results.tables.rows import Row, Table, title_of
from plpp_reg.results.tables.series import MEAN_H, Figure
from plpp_reg.results.tables.settings import Name

Marks = Mapping[tuple[str, Name, str], float]  # (group, plain row, column) -> zero-shot's figure less that row's


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
    source: str = "reference"


def full(table: Table) -> Grid:
    """Every row of a table, a block a data set."""
    blocks: dict[str, list[TableRow]] = {}
    for row in table.rows:
        cells = [_cell(row, row.cells.get(column)) for column in table.columns]
        blocks.setdefault(row.group, []).append(TableRow(row.label, row.kind, cells, row.n, row.source))
    columns = [*map(title_of, table.columns), "seeds"]
    return Grid("Every figure", columns, list(blocks.items()), any(row.source for row in table.rows), table.source)


def overview(table: Table, form: str) -> list[Grid]:
    """A table a column, with a column a data set, where there are several: H, the most shots and the average first."""
    groups = list(dict.fromkeys(row.group for row in table.rows))
    averages = {row.group for row in table.rows if row.average}
    groups.sort(key=lambda group: group not in averages)
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
            what = shots_text(int(column)) if form == "shots" else column
            grids.append(Grid(f"{what}, a column a data set", groups, [("", ours)]))
    return grids


def _cell(row: Row, figure: Figure | None) -> Cell:
    if figure is None:
        return Cell()
    different = row.kind == "difference"
    clear = different and abs(figure.value) > figure.spread  # nan is no interval
    return Cell(numbers.figure(figure.value, signed=different), numbers.half_width(figure.spread), clear)


def shot_curves(table: Table, name: str, pairs: Collection[tuple[Name, Name]]) -> list[Picture]:
    """Accuracy over shots, a figure a data set: mean, and a band of one standard deviation. ``pairs``: of ``runs.pairs_of``."""
    pictures = []
    ticks = [float(column) for column in table.columns]
    for group, rows in _by_group(table, "measured"):
        zero_shot = _zero_shot(rows)
        trained = [row for row in rows if row is not zero_shot] or rows
        style = plots.styles([row.name for row in trained], plain_forms([row.name for row in trained], pairs))
        lines = []
        for row in trained:
            points = [(float(c), row.cells[c]) for c in table.columns if c in row.cells]
            spreads = [0.0 if math.isnan(f.spread) else f.spread for _, f in points]
            x, y = [shots for shots, _ in points], [f.value for _, f in points]
            low, high = ([v + sign * s for v, s in zip(y, spreads, strict=True)] for sign in (-1, 1))
            lines.append(Line(row.label, style[row.name], x, y, low, high))
        title = f"{group}: accuracy over shots"
        said = [f"{row.label}: " + ", ".join(f"{shots_text(int(c))} {_say(row, c)}" for c in row.cells) for row in rows]
        pictures.append(
            plots.curves(
                f"{name}-{file_name(group)}-shots", title, f"{title}, percent. {'. '.join(said)}.", lines,
                "training images a class", "accuracy (%)", ticks, log_x=True, level=_level(zero_shot, trained),
            )
        )  # fmt: skip
    return pictures


def difference_bars(table: Table, name: str, form: str) -> list[Picture]:
    """Each method with PLPP against the plain one: a row a data set; a row a method where there is one data set."""
    by_group = _by_group(table, "difference")
    marks = _marks(table)
    columns = [c for c in table.columns if c != MEAN_H and any(c in row.cells for _, rows in by_group for row in rows)]
    drawn: list[tuple[str, list[str], dict[str, list[Bar | None]]]] = []
    if form == "targets":
        for group, rows in by_group:
            values = {row.label: [_bar(row, column, marks) for column in columns] for row in rows}
            drawn += [(f"{group}: {label}", list(map(title_of, columns)), {label: v}) for label, v in values.items()]
    elif len(by_group) == 1:
        ((group, rows),) = by_group
        values = {column: [_bar(row, column, marks) for row in rows] for column in columns}
        drawn.append((f"{group}: with PLPP against without", [row.label for row in rows], values))
    else:
        for label in dict.fromkeys(row.label for _, rows in by_group for row in rows):
            there = [(group, row) for group, rows in by_group for row in rows if row.label == label]
            drawn.append((label, [g for g, _ in there], {c: [_bar(row, c, marks) for _, row in there] for c in columns}))
    pictures = []
    for title, rows, values in drawn:
        said = [
            f"{row}: " + ", ".join(f"{c} {_say_bar(each[i])}" for c, each in values.items() if each[i])
            for i, row in enumerate(rows)
        ]
        alt = f"{title}, difference in points with half its 95% interval. {'. '.join(said)}."
        what = "difference in accuracy, points"
        pictures.append(plots.bars(f"{name}-{file_name(title)}", title, alt, rows, values, what, "zero-shot - plain"))
    return pictures


def _by_group(table: Table, kind: str) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.kind == kind and row.cells:
            groups.setdefault(row.group, []).append(row)
    return list(groups.items())


def plain_forms(rows: Sequence[Name], pairs: Collection[tuple[Name, Name]]) -> dict[Name, Name | None]:
    """Of these rows, each with PLPP -> the first that it is compared with, None where there is none."""
    return {row: next((p for treated, p in pairs if treated == row and p in rows), None) for row in rows if row.has_plpp}


def _zero_shot(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.name.method == ZERO_SHOT), None)


def _level(zero_shot: Row | None, trained: Sequence[Row]) -> Level | None:
    """Of what is the same at any number of shots."""
    if zero_shot is None or zero_shot in trained:
        return None
    return Level("zero-shot", next(iter(zero_shot.cells.values())).value)


def _marks(table: Table) -> Marks:
    found = {}
    for group, rows in _by_group(table, "measured"):
        if (zero_shot := _zero_shot(rows)) is None:
            continue
        for plain in rows:
            for column in plain.cells.keys() & zero_shot.cells.keys():
                found[group, plain.name, column] = zero_shot.cells[column].value - plain.cells[column].value
    return found


def _bar(row: Row, column: str, marks: Marks) -> Bar | None:
    if column not in row.cells:
        return None
    return Bar(*row.cells[column], marks.get((row.group, row.against, column), math.nan))


def _say(row: Row, column: str) -> str:
    cell = _cell(row, row.cells[column])
    return f"{cell.value} {cell.spread}".rstrip()


def _say_bar(bar: Bar) -> str:
    mark = "" if math.isnan(bar.mark) else f" (zero-shot {numbers.figure(bar.mark, 1, signed=True)})"
    return numbers.with_spread(bar.value, bar.half_width, 1, signed=True) + mark
