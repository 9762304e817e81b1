"""``job.json``: what is planned in a run's folder, and what a table needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plpp_reg.errors import InputError
from plpp_reg.io.files import read_json
from plpp_reg.results.record import is_number, is_text, is_texts

JOB = "job.json"  # what is planned in a folder; without a result beside it that fits, the run is missing
FAILED = "failed.json"
SUPERSEDED = "superseded"  # results of other settings, set aside: never counted, never deleted
TABLES = ("halves", "targets", "shots")  # the forms of a protocol's table

# What every note says. That of a student of one target names this too ("target"), which it was trained and tested on.
NOTE = {"name": str, "table": str, "dataset": str, "shots": int, "method": str, "variant": str, "backbone": str, "test": str}
NOTE |= {"learns": bool, "seed": int}


def shots_text(shots: int) -> str:
    """``1 shot``, ``16 shots``."""
    return f"{shots} shot{'' if shots == 1 else 's'}"


def run_label(note: Mapping[str, Any]) -> str:
    """``base_to_new: dtd, 16 shots, CoOp_PLPP TOP_K=3, seed 1``."""
    variant = f" {note['variant']}" if note["variant"] else ""
    dataset = note["dataset"] + (f" to {note['target']}" if note.get("target") else "")
    return f"{note['name']}: {dataset}, {shots_text(note['shots'])}, {note['method']}{variant}, seed {note['seed']}"


def read_note(folder: str | Path) -> dict[str, Any]:
    """What was planned in a run's folder.

    Raises:
        InputError: no plan can be read there.
    """
    note = read_json(Path(folder) / JOB)
    if not isinstance(note, dict) or not all(_fits(note.get(key), kind) for key, kind in NOTE.items()):
        raise InputError(f"its {JOB} cannot be read")
    tests = note.get("tests", {})
    if (
        not is_text(note.get("target", ""))
        or note["table"] not in TABLES
        or not isinstance(tests, dict)
        or not all(map(is_texts, tests.values()))
    ):
        raise InputError(f"its {JOB} cannot be read")
    return note


def _fits(value: object, kind: type) -> bool:
    return {str: is_text, bool: lambda v: isinstance(v, bool), int: lambda v: isinstance(v, int) and is_number(v)}[kind](value)


def read_failure(folder: str | Path) -> tuple[str, list[str]] | None:
    """Why the run in a folder failed, and the last lines of its log; None where it did not, or does not say."""
    try:
        failed = read_json(Path(folder) / FAILED)
    except InputError:
        return None
    if not isinstance(failed, dict) or not is_text(failed.get("error")):
        return None
    log = failed.get("log")
    return failed["error"], [line for line in log if is_text(line)] if isinstance(log, list) else []
