"""Runs outside of any protocol, those of ``plpp train``: each by itself, no mean of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from plpp_reg.loss import SUFFIX
from plpp_reg.results.job import shots_text
from plpp_reg.results.record import is_number
from plpp_reg.results.tables.records import Found, zero_shot_accuracy
from plpp_reg.results.tables.rows import Row, Table, dataset_order, title_of
from plpp_reg.results.tables.series import Figure
from plpp_reg.results.tables.settings import Made, Name, Settings, relevant, tell_apart
from plpp_reg.trainers import UNTRAINED

TITLE = "plpp train"
LEGEND = (
    "Percent, of the test that each run itself made; nothing is averaged. zero-shot: CLIP's own accuracy on the same images; "
    "calibration error: the mean distance between confidence and accuracy."
)
COLUMNS = {"accuracy": "accuracy", "macro-F1": "macro_f1", "calibration error": "calibration_error"}
ZERO_SHOT = "zero-shot"


class Outside(NamedTuple):
    """A run of no protocol, and what it is grouped by."""

    found: Found
    dataset: str
    classes: str  # all, base or new
    shots: int  # -1: all images, or a test, which takes none
    method: Name
    seed: int
    settings: Settings

    @property
    def backbone(self) -> str:
        return str(self.found.result.get("backbone", ""))


def outside_runs(found: Iterable[Found]) -> list[Outside]:
    """The finished ones, each named as rows are: of one method on one data set for what differs."""
    runs = [_outside(run) for run in found if not run.note and run.result is not None]
    made = [Made((), run.method, (run.dataset, run.shots), run.settings) for run in runs]
    runs = [run._replace(method=row) for run, (row, _) in zip(runs, tell_apart(made), strict=True)]
    return sorted(runs, key=lambda run: (*dataset_order(run.dataset, run.shots), run.classes, str(run.method), run.seed))


def _outside(found: Found) -> Outside:
    result = found.result
    config = result["config"] if isinstance(result["config"], dict) else {}
    shots, seed = (value if isinstance(value, int) else -1 for value in (config.get("DATASET.NUM_SHOTS"), result.get("seed")))
    if result.get("tested"):  # a test takes none
        shots = -1
    method = str(result.get("trainer", ""))
    learning = method.removesuffix(SUFFIX) not in UNTRAINED  # a trainer of one's own is taken to learn
    settings = relevant(result["config"], method, learning, result.get("teacher"))
    classes = str(config.get("DATASET.SUBSAMPLE_CLASSES") or "all")
    return Outside(found, str(result.get("dataset", "")), classes, shots, Name(method), seed, settings)


def outside_tables(folder: Path, found: Iterable[Found]) -> list[Table]:
    """One table a backbone, a row a run, with its folder below ``folder``."""
    tables: dict[str, list[Outside]] = {}
    for run in outside_runs(found):
        tables.setdefault(run.backbone, []).append(run)
    return [_table(folder, backbone, runs) for backbone, runs in sorted(tables.items())]


def _table(folder: Path, backbone: str, runs: Sequence[Outside]) -> Table:
    rows = [
        Row(_group(run), f"{run.method}, seed {run.seed}", "measured", run.method, _cells(run), "1", _place(folder, run))
        for run in runs
    ]
    twice = Counter((row.group, row.label) for row in rows)
    rows = [row._replace(label=f"{row.label}, {row.source}") if twice[row.group, row.label] > 1 else row for row in rows]
    columns = [column for column in (*COLUMNS, ZERO_SHOT) if any(column in row.cells for row in rows)]
    notes = [
        f"Below zero-shot CLIP: {row.label} on {row.group}, {row.cells['accuracy'].value:.2f} against "
        f"{row.cells[ZERO_SHOT].value:.2f}."
        for row in rows
        if ZERO_SHOT in row.cells and "accuracy" in row.cells and row.cells["accuracy"].value < row.cells[ZERO_SHOT].value
    ]
    return Table(TITLE, backbone, columns, rows, notes, LEGEND, "folder")


def _group(run: Outside) -> str:
    parts = [title_of(run.dataset), *([] if run.classes == "all" else [run.classes])]
    return ", ".join([*parts, *([shots_text(run.shots)] if run.shots > 0 else [])])


def _place(folder: Path, run: Outside) -> str:
    return run.found.place.relative_to(folder).as_posix()


def _cells(run: Outside) -> dict[str, Figure]:
    metrics = run.found.result["metrics"]
    cells = {column: Figure(metrics[key]) for column, key in COLUMNS.items() if is_number(metrics.get(key))}
    if (zero_shot := zero_shot_accuracy(run.found.result)) is not None:
        cells[ZERO_SHOT] = Figure(zero_shot)
    return cells
