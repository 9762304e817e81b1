"""The time that a sweep still takes, learned from what is done: known kinds, like ones, none, several at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from plpp_reg.engine.run import RunArguments
from plpp_reg.experiments.jobs import Job
from plpp_reg.experiments.remaining import Remaining

SECONDS = {"ZeroshotCLIP": 2.0, "CoOp": 10.0, "CoOp_PLPP": 12.0, "MaPLe": 100.0}


def job(method: str, dataset: str = "dtd", seed: int = 1, shots: int = 16) -> Job:
    note = {"method": method, "variant": "", "dataset": dataset, "shots": shots, "seed": seed}
    return Job(Path(), Path(), RunArguments(), {}, note)


def words(jobs: list[Job], done: list[tuple[Job, float | None]], elapsed: float = 1.0, at_once: int = 1) -> str:
    remaining = Remaining(jobs, at_once)
    for each, seconds in done:
        remaining.add(each, seconds)
    return remaining.words(elapsed)


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ([], ""),
        ([("ZeroshotCLIP", 2.0)], ""),  # nothing that is left is like it
        ([("ZeroshotCLIP", 2.0), ("CoOp", 10.0)], "at least 50 s left"),  # 2 of its own and 3 with PLPP; MaPLe is unknown
        ([("CoOp", 10.0), ("CoOp_PLPP", 12.0), ("MaPLe", 100.0)], "at least 4.1 min left"),  # 2 each: 244 s; not zero-shot
        ([("CoOp", 10.0), ("CoOp_PLPP", 12.0), ("MaPLe", 100.0), ("ZeroshotCLIP", 2.0)], "about 4.1 min left"),
        ([("CoOp", None)], ""),  # another process has run it, or it failed
    ],
)
def test_runs_of_a_kind_take_what_those_before_took(done: list[tuple[str, float | None]], said: str) -> None:
    jobs = [job("ZeroshotCLIP"), *(job(m, seed=s) for m in ("CoOp", "CoOp_PLPP", "MaPLe") for s in (1, 2, 3))]
    assert words(jobs, [(job(method), seconds) for method, seconds in done]) == said


def test_other_data_are_scaled_by_what_others_took_on_them() -> None:
    jobs = [job(m, d) for d in ("dtd", "imagenet") for m in SECONDS]
    done = [(job(m), s) for m, s in SECONDS.items()]
    assert words(jobs, done) == "about 2.0 min left"  # as on the first: 2 + 10 + 12 + 100, CoOp's for both its forms: 122
    done.append((job("ZeroshotCLIP", "imagenet"), 6.0))  # three times as long
    assert words(jobs, done) == "about 6.0 min left"  # 3 * (10 + 10 + 100)


def test_several_at_once_share_what_is_left() -> None:
    jobs = [job("CoOp", seed=s) for s in range(9)]
    done = [(job("CoOp", seed=0), 30.0)]
    assert words(jobs, done, at_once=4) == "about 60 s left"
    assert words(jobs, done, elapsed=10.0, at_once=0) == "about 80 s left"  # three at a time, by their seconds
    assert words(jobs, [(each, 30.0) for each in jobs]) == ""
