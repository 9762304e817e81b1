"""Tables as text: Markdown and LaTeX to read, CSV to compute with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence

from plpp_reg.results import numbers
from plpp_reg.results.tables.rows import Row, Table, title_of
from plpp_reg.results.tables.series import H

LEGEND = (
    "Accuracy in percent, mean ± sample standard deviation over seeds. Differences are paired over seeds, ± half the 95% "
    "interval (Student's t)."
)
LEGEND_H = (
    " H is the harmonic mean of the mean base and the mean new accuracy, in the average too; its spread is that of each "
    "seed's H."
)


def _cell(row: Row, column: str, none: str) -> str:
    figure = row.cells.get(column)
    return none if figure is None else numbers.with_spread(*figure, signed=row.kind == "difference")


def legend_of(table: Table) -> str:
    """What its figures are."""
    return table.legend or LEGEND + (LEGEND_H if H in table.columns else "")


def _label(row: Row) -> str:
    mark = "" if row.mark in row.label else row.mark  # some of the literature's say it themselves
    said = ", ".join(filter(None, ("published" if row.kind == "published" else "", mark)))
    return f"{row.label} ({said})" if said else row.label


def markdown(tables: Sequence[Table], missing: Sequence[str]) -> str:
    lines: list[str] = []
    for table in tables:
        lines += [f"## {table.protocol} ({table.backbone})", ""]
        header = ["data set", "method", *(title_of(c) for c in table.columns), "seeds", table.source]
        lines += [f"| {' | '.join(header)} |", "|" + "---|" * 2 + "---:|" * (len(table.columns) + 1) + "---|"]
        for row in table.rows:
            cells = [_cell(row, column, "") for column in table.columns]
            line = [row.group, _label(row), *cells, row.n, row.source]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
        lines += ["", legend_of(table), ""]
        lines += [*(f"- {note}" for note in table.notes), ""] if table.notes else []
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
        for note in table.notes:
            writer.writerow([table.protocol, table.backbone, "", "", "note", "", "", "", "", note])
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
        caption = _tex(f"{table.protocol}, {table.backbone}. {table.legend or LEGEND}")
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
        lines += [rf"\begin{{tabular}}{{ll{'r' * (len(table.columns) + 1)}}}", r"\toprule"]
        header = ["data set", "method", *(title_of(c) for c in table.columns), "seeds"]
        lines += [" & ".join(map(_tex, header)) + r" \\", r"\midrule"]
        group = table.rows[0].group if table.rows else ""
        for row in table.rows:
            if row.group != group:
                lines.append(r"\midrule")
                group = row.group
            note = rf"\,[{sources.index(row.source) + 1}]" if row.source else ""
            cells = [_tex(_cell(row, column, "--")) for column in table.columns]
            lines.append(" & ".join([_tex(row.group), _tex(_label(row)) + note, *cells, row.n]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        lines += [f"% [{i}] {source}" for i, source in enumerate(sources, start=1)]
        lines += [f"% {note}" for note in table.notes] + [""]
    return "\n".join([*lines, *(f"% missing: {line}" for line in missing)]).rstrip("\n") + "\n"


WRITERS: dict[str, Callable[[Sequence[Table], Sequence[str]], str]] = {"markdown": markdown, "csv": to_csv, "latex": latex}
