"""``job.json``: what is planned in a run's folder, and what a table needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JOB = "job.json"  # what is planned in a folder; without a result beside it that fits, the run is missing
FAILED = "failed.json"
SUPERSEDED = "superseded"  # results of other settings, set aside: never counted, never deleted
TABLES = ("halves", "targets", "shots")  # the forms of a protocol's table

# What every note says.
NOTE = {"name": str, "table": str, "dataset": str, "shots": int, "method": str, "variant": str, "backbone": str, "test": str}
NOTE |= {"learns": bool, "seed": int}


def shots_text(shots: int) -> str:
    """``1 shot``, ``16 shots``."""
    return f"{shots} shot{'' if shots == 1 else 's'}"


def run_label(note: Mapping[str, Any]) -> str:
    """``base_to_new: dtd, 16 shots, CoOp_PLPP TOP_K=3, seed 1``."""
    variant = f" {note['variant']}" if note["variant"] else ""
    return f"{note['name']}: {note['dataset']}, {shots_text(note['shots'])}, {note['method']}{variant}, seed {note['seed']}"
