"""``plpp report``: one self-contained HTML page of a folder of recorded runs, and its figures as PNGs beside it.

The tables are those of :mod:`plpp_reg.results.tables`; the page adds what a table cannot show. Everything that a run's files
say is treated as text: the template escapes it, and the page forbids scripts and anything from outside.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plpp_reg import __version__
from plpp_reg.errors import InputError
from plpp_reg.io.files import write_atomically, write_text
from plpp_reg.results import numbers, style
from plpp_reg.results.learned import Learned, Reader, no_reader
from plpp_reg.results.plots import Picture, file_name
from plpp_reg.results.report.grids import Grid, difference_bars, full, overview, shot_curves
from plpp_reg.results.report.mistakes import Gallery
from plpp_reg.results.report.page import script
from plpp_reg.results.report.runs import (
    Run,
    card_group,
    card_of,
    environment_of,
    failure_log,
    pairs_of,
    runs_of,
    title_of_run,
)
from plpp_reg.results.report.training import Training, Words, training, words
from plpp_reg.results.tables import make_tables, records
from plpp_reg.results.tables.outside import TITLE, outside_tables
from plpp_reg.results.tables.records import Found
from plpp_reg.results.tables.rendering import legend_of
from plpp_reg.results.tables.rows import Table

if TYPE_CHECKING:
    import jinja2

PAGE = "report.html"
TEMPLATE = "report.html.j2"
MOST_DETAILED = 24  # runs whose classes and mistakes are shown


class Section(NamedTuple):
    """A protocol and a backbone, or the runs outside of any."""

    anchor: str
    title: str
    overview: list[Grid]
    full: Grid | None
    legend: str
    notes: Sequence[str]
    results: list[Picture]
    training: list[Training]
    words: list[tuple[str, list[Words]]]


def write_report(
    folder: str | Path,
    output: str | Path = "",
    published: bool = True,
    say: Callable[[str], None] = print,
    reader: Callable[[], Reader] = no_reader,
) -> Path:
    """Write the page, by default ``folder``/report.html, and the figures into a folder ``<its name>_files`` beside it.

    Args:
        folder: the runs.
        output: the page.
        published: whether tables have rows of published figures.
        say: where lines go.
        reader: makes what reads the runs of version 0.1 out of their checkpoints, if there are some.

    Raises:
        InputError: no such folder, no run in it, or a place that cannot be written to.
    """
    found = records.find_runs(folder)
    if not found:
        raise InputError(f"{str(folder)!r}: expected recorded runs (folders with a result.json) in it, got none")
    path = Path(output) if output else Path(folder) / PAGE
    if path.is_dir():
        raise InputError(f"--output {str(path)!r}: expected the name of a file, got a folder")
    say(f"{len(found)} run{'s' * (len(found) != 1)} in {folder}")
    content = page(Path(folder), found, published, f"{path.stem}_files", Learned(reader))
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
    return _template().render(content).encode("utf-8", "replace").decode()


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = resources.files("plpp_reg.results").joinpath("templates", TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text)


def page(folder: Path, found: Sequence[Found], published: bool, files: str, learned: Learned) -> dict[str, Any]:
    """What the template shows of these runs."""
    recorded = records.as_runs(found)
    runs = runs_of(found, recorded.records)
    made = make_tables(recorded, published=published)
    sections = [_protocol(table, _of(runs, table), learned) for table in made]
    sections += [
        _outside(table, [run for run in runs if run.section[2] == table.backbone and not run.found.note], learned)
        for table in outside_tables(folder, found)
    ]
    gallery, detailed, cards = Gallery(), _detailed(runs), {}
    for run in found:
        card = card_of(folder, run, gallery if run.place in detailed else None)
        cards.setdefault(card_group(run), []).append(card)
    return {
        "title": "; ".join(section.title for section in sections) or folder.resolve().name or str(folder),
        "version": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "files": files,
        "light": style.LIGHT,
        "dark": style.DARK,
        "script": script(),
        "magnitude": numbers.magnitude,
        "detailed": len(detailed),
        "finished": sum(run.result is not None for run in found),
        "missing": [(title_of_run(folder, run), run.why, failure_log(run.place)) for run in found if run.result is None],
        "sections": sections,
        "environment": environment_of(found),
        "cards": list(cards.items()),
        "count": len(found),
    }


def _of(runs: Iterable[Run], table: Table) -> list[Run]:
    return [run for run in runs if run.found.note and (run.section[0], run.section[2]) == (table.protocol, table.backbone)]


def _detailed(runs: Sequence[Run]) -> set[Path]:
    """The runs whose mistakes are shown, :data:`MOST_DETAILED` at most: of each method and data set one before any has two."""
    counts: dict[tuple[Any, ...], int] = {}
    ranked = []
    for run in sorted(runs, key=lambda run: (-run.shots, run.seed)):
        key = (run.section, run.dataset, run.method)
        counts[key] = counts.get(key, 0) + 1
        ranked.append((counts[key], len(ranked), run.found.place))
    return {place for *_, place in sorted(ranked)[:MOST_DETAILED]}


# ---- tables ------------------------------------------------------------------------------------------------------------


def _protocol(table: Table, runs: Sequence[Run], learned: Learned) -> Section:
    form = runs[0].section[1]
    title = f"{table.protocol} ({table.backbone})"
    name = file_name(title)
    drawn = shot_curves(table, name, pairs_of(runs)) if form == "shots" else difference_bars(table, name, form)
    return Section(
        anchor=name,
        title=title,
        overview=overview(table, form),
        full=full(table),
        legend=legend_of(table),
        notes=table.notes,
        results=drawn,
        training=training(runs, name, learned),
        words=words(runs, learned),
    )


def _outside(table: Table, runs: Sequence[Run], learned: Learned) -> Section:
    """Runs of ``plpp train`` or others: each by itself, no mean of them."""
    title = f"Runs of {table.protocol} ({table.backbone})" if table.protocol == TITLE else table.protocol
    name = file_name(f"outside {table.backbone}")
    return Section(
        anchor=name,
        title=title,
        overview=[],
        full=full(table),
        legend=legend_of(table),
        notes=table.notes,
        results=[],
        training=training(runs, name, learned),
        words=words(runs, learned),
    )
