"""Reading recorded runs: what is whole and of what was planned last counts; what is missing or failed is named."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plpp_reg.errors import InputError
from plpp_reg.results.job import JOB, SUPERSEDED, read_failure, read_note, run_label
from plpp_reg.results.record import RESULT, is_number, read_result
from plpp_reg.results.tables.settings import Made, Name, Settings, relevant, tell_apart

ZERO_SHOT = "ZeroshotCLIP"


class Record(NamedTuple):
    """One finished run: its note, each test's accuracy in percent, and the row that it belongs to, named for its settings.

    ``seen``: hash of the pictures of each test by its name, and of "training"; empty of runs made before that was recorded.
    """

    note: Mapping[str, Any]
    accuracies: Mapping[str, float]
    place: Path
    row: Name
    settings: Settings
    seen: Mapping[str, str]

    @property
    def cell(self) -> tuple[str, int]:
        return cell_of(self.note)

    @property
    def target(self) -> str:
        """Which target alone it was trained and tested on; empty: it was trained on its data set."""
        return str(self.note.get("target", ""))

    @property
    def own_test(self) -> str:
        """The test on its data set; empty: there is none."""
        return "" if self.target else str(self.note["test"])

    @property
    def method(self) -> Name:
        """What the row is called where it names no setting."""
        return name_of_note(self.note)


class Found(NamedTuple):
    """A run's folder and what was planned in it; ``result`` where it is whole and of that plan, else ``why`` it does not count.

    ``note`` is empty where no plan can be read: a run of ``plpp train``, or a broken job.json.
    """

    place: Path
    note: Mapping[str, Any]
    result: Mapping[str, Any] | None
    why: str = ""


class Runs(NamedTuple):
    """What lies below a folder: whole results, and what is missing or failed, in words.

    ``zero_shot``: a record of zero-shot CLIP for every cell of a table whose runs say it, and that has no run of its own;
    ``outside``: finished runs of no protocol.
    """

    records: list[Record]
    missing: list[str]
    zero_shot: Sequence[Record] = ()
    outside: Sequence[Found] = ()


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
        elif RESULT in files or "config.yaml" in files:
            found.append(Found(Path(place), {}, *_result_or_why(Path(place))))
    return found


def _planned(place: Path) -> Found:
    try:
        note = read_note(place)
    except InputError:
        return Found(place, {}, None, f"its {JOB} cannot be read")
    result, why = _result_or_why(place)
    if result is None or result.get("protocol") != note:
        failure = read_failure(place)
        return Found(place, note, None, f"failed: {failure[0]}" if failure else why or "not run yet with these settings")
    tested = [result["metrics"], *(test["metrics"] for test in result.get("tests", {}).values())]
    if not all(0 <= metrics.get("accuracy", -1) <= 100 for metrics in tested):
        return Found(place, note, None, f"no accuracy in its {RESULT}")
    return Found(place, note, result)


def _result_or_why(place: Path) -> tuple[dict[str, Any] | None, str]:
    """A run's record, or why there is none."""
    if not os.path.lexists(place / RESULT):
        return None, "not finished"
    try:
        return read_result(place), ""
    except InputError:
        return None, f"its {RESULT} cannot be read"


def accuracies(note: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, float]:
    """Each test's accuracy by its name."""
    tests = {name: test["metrics"]["accuracy"] for name, test in result.get("tests", {}).items()}
    return {note["test"]: result["metrics"]["accuracy"], **tests}


def seen_by(note: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of pictures: those of each test by its name, those that were trained on as "training"."""
    parts = {note["test"]: result.get("pictures_sha256")}
    parts |= {name: test.get("pictures_sha256") for name, test in result.get("tests", {}).items()}
    parts = {test: pictures for test, pictures in parts.items() if isinstance(pictures, dict)}
    seen = {test: next((p[part] for part in ("test", "val") if part in p), "") for test, p in parts.items()}
    return {**seen, "training": parts.get(note["test"], {}).get("train", "")}


def read_runs(folder: str | Path) -> Runs:
    """Every run below a folder.

    Raises:
        InputError: no such folder, or no run in it.
    """
    if not (found := find_runs(folder)):
        raise InputError(f"{str(folder)!r}: expected runs of plpp run or plpp train in it, got none")
    return as_runs(found)


def as_runs(found: Sequence[Found]) -> Runs:
    """What counts of these, and the others in words."""
    counted, missing = [], []
    for run in found:
        if run.note and run.result:
            counted.append(run)
        elif not run.result:
            missing.append(f"{run_label(run.note) if run.note else run.place}: {run.why}")
    rows = tell_apart([_made(run.note, run.result) for run in counted])
    records = [
        Record(run.note, accuracies(run.note, run.result), run.place, row, settings, seen_by(run.note, run.result))
        for run, (row, settings) in zip(counted, rows, strict=True)
    ]
    return Runs(records, missing, _zero_shot_of(counted, records), [run for run in found if run.result and not run.note])


def zero_shot_accuracy(result: Mapping[str, Any]) -> float | None:
    """Of the images that a run, or one of its further tests, was tested on; None where it does not say."""
    told = result.get("evaluation")
    told = told.get("zero_shot") if isinstance(told, dict) else None
    metrics = told.get("metrics") if isinstance(told, dict) else None
    value = metrics.get("accuracy") if isinstance(metrics, dict) else None
    return value if is_number(value) and 0 <= value <= 100 else None


def _zero_shot_of(found: Sequence[Found], records: Sequence[Record]) -> list[Record]:
    there = {(*_section(r.note), r.note["dataset"], r.note["shots"]) for r in records if r.note["method"] == ZERO_SHOT}
    there |= {(*key[:-1], None) for key in there}  # one run of it stands for every number of shots
    made: dict[tuple[Any, ...], Record] = {}
    # of a cell one that was tested on all of its targets, if there is one, before students of one each
    for run, record in sorted(zip(found, records, strict=True), key=lambda each: each[1].target):
        note = run.note
        cell = (*_section(note), note["dataset"], note["shots"])
        known = cell in made or (*cell, record.target) in made or cell in there
        if known or (note["table"] == "shots" and (*cell[:-1], None) in there):
            continue
        cell = (*cell, record.target) if record.target else cell
        tests = {note["test"]: run.result, **run.result.get("tests", {})}
        figures = {name: zero_shot_accuracy(test) for name, test in tests.items()}
        if all(value is not None for value in figures.values()):
            its_own = {**note, "method": ZERO_SHOT, "variant": "", "learns": False}
            made[cell] = Record(its_own, figures, run.place, Name(ZERO_SHOT), {}, record.seen)
    return list(made.values())


def _section(note: Mapping[str, Any]) -> tuple[str, str, str]:
    return note["name"], note["table"], note["backbone"]


def cell_of(note: Mapping[str, Any]) -> tuple[str, int]:
    """Data set and shots; 0 where figures of any number of shots are one: of what learns nothing, in a table over shots."""
    return note["dataset"], note["shots"] if note["learns"] or note["table"] != "shots" else 0


def name_of_note(note: Mapping[str, Any]) -> Name:
    """``CoOp_PLPP TOP_K=3``."""
    return Name(note["method"], note["variant"])


def _made(note: Mapping[str, Any], result: Mapping[str, Any]) -> Made:
    settings = relevant(result["config"], note["method"], note["learns"], result.get("teacher"))
    return Made(_section(note), name_of_note(note), cell_of(note), settings)
