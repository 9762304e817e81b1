"""Each run by itself: how the page groups it, everything that is known of it, and what it was made with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plpp_reg.results.job import read_failure, run_label
from plpp_reg.results.numbers import duration
from plpp_reg.results.record import is_number
from plpp_reg.results.report.details import Detail, details_of
from plpp_reg.results.report.grids import Cell, Grid, TableRow
from plpp_reg.results.report.mistakes import Gallery
from plpp_reg.results.tables.outside import outside_runs
from plpp_reg.results.tables.records import ZERO_SHOT, Found, Record, zero_shot_accuracy
from plpp_reg.results.tables.rows import dataset_order, title_of
from plpp_reg.results.tables.settings import Name, Settings, pair


class Run(NamedTuple):
    """A run as the page groups it."""

    found: Found
    section: tuple[str, str, str]  # protocol, form of its table, backbone
    dataset: str
    shots: int
    method: Name
    seed: int
    settings: Settings


class RunCard(NamedTuple):
    """Everything that is known of one run."""

    label: str
    place: str
    state: str
    figures: list[tuple[str, str]]
    details: list[Detail]
    config: str
    log: str


def runs_of(found: Sequence[Found], records: Sequence[Record]) -> list[Run]:
    """The finished ones with what they are grouped by, each named as its row of the tables is; ``records``: those in tables."""
    rows = {record.place: record for record in records}
    runs = [
        Run(run.found, ("", "", run.backbone), run.dataset, run.shots, run.method, run.seed, run.settings)
        for run in outside_runs(found)
    ]
    for run in found:
        if run.place in rows:
            note = run.note
            section = (note["name"], note["table"], note["backbone"])
            record = rows[run.place]
            runs.append(Run(run, section, note["dataset"], note["shots"], record.row, note["seed"], record.settings))
    return sorted(runs, key=lambda run: (*dataset_order(run.dataset, run.shots), str(run.method), run.seed))


def pairs_of(runs: Sequence[Run]) -> list[tuple[Name, Name]]:
    """(A row with PLPP, a plain row) as :func:`plpp_reg.results.tables.settings.pair` compares them."""
    kinds: dict[Name, dict[tuple[str, int], Settings]] = {}
    for run in runs:
        kinds.setdefault(run.method, {})[run.dataset, run.shots] = run.settings
    return list(pair(kinds)[0])


def zero_shot_of(runs: Sequence[Run]) -> float | None:
    """Zero-shot CLIP's accuracy on what these runs were tested on: its own run's, else as they say it."""
    own = [run.found.result["metrics"].get("accuracy") for run in runs if run.method.method == ZERO_SHOT]
    told = [zero_shot_accuracy(run.found.result) for run in runs]
    return next((value for value in (*own, *told) if is_number(value)), None)


def title_of_run(folder: Path, run: Found) -> str:
    """What was planned; of a run of no protocol what it is, and where."""
    if run.note:
        return run_label(run.note)
    place = place_of(folder, run)
    if run.result is None:
        return place
    what = f"{_method(run)} on {title_of(str(run.result.get('dataset', '')))}, seed {run.result.get('seed', '')}"
    return what if place == "." else f"{what}, in {place}"


def place_of(folder: Path, run: Found) -> str:
    """Its folder below ``folder``."""
    return run.place.relative_to(folder).as_posix()


def card_group(run: Found) -> str:
    """The title that its card stands below."""
    if not run.note:
        return "Runs outside a protocol"
    return f"{run.note['name']}: {title_of(run.note['dataset'])}"


def card_of(folder: Path, run: Found, gallery: Gallery | None) -> RunCard:
    """Metrics, losses, hashes, versions, the whole configuration, as text; with a ``gallery``, how good it is."""
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
        phases = [(name, seconds) for name, seconds in _items(result.get("phases")) if seconds > 0]
        if phases:
            each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in phases)
            figures.append(("seconds by phase", f"{each} (of the process that wrote the result)"))
        figures += [(key, _text(result[key])) for key in ("files_sha256", "few_shot_sha256") if result.get(key)]
        figures += [(f"pictures_sha256 {part}", _text(v)) for part, v in _items(result.get("pictures_sha256"))]
        figures += [(name, _text(v)) for name, v in _items(result.get("versions"))]
    return RunCard(
        label=title_of_run(folder, run),
        place=place_of(folder, run),
        state=run.why or "finished",
        figures=figures,
        details=details_of(result, run.note.get("test", "test"), _method(run), gallery) if result and gallery else [],
        config=_config(run),
        log=failure_log(run.place) if result is None else "",  # nothing of a run that finished after all
    )


def _method(run: Found) -> str:
    return str(run.note.get("method") or run.result.get("trainer", ""))


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


def failure_log(place: Path) -> str:
    """The last lines of a failed run's log; nothing where it did not fail."""
    failure = read_failure(place)
    return "\n".join(failure[1]) if failure else ""


def environment_of(found: Sequence[Found]) -> Grid | None:
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
