"""The programs in benchmarks/ and tools/ that give the documentation its figures: what they measure, not how fast it is."""

from __future__ import annotations

import functools
import importlib
import json
import operator
import pickle
import statistics
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plpp_reg.engine import features
from plpp_reg.estimate import throughput

import common
import memory
from helpers import processes

Row = dict[str, Any]


def no_peak_mib(prepare: Callable[..., Callable[[], object]], *args: object, freed_returned: bool = False) -> float:
    """``memory.peak_mib`` but for the process and the figure: the step is sent, prepared and taken."""
    prepare, args = pickle.loads(pickle.dumps((prepare, args)))
    prepare(*args)()
    return 1.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Row]]]:
    """A program's rows; it runs in this process, and takes no peak memory, which takes processes of its own."""
    for name in ("text_tower", "methods", "cost"):
        monkeypatch.setattr(importlib.import_module(name), "peak_mib", no_peak_mib)
    monkeypatch.setattr(common, "CLOCK", common.CLOCK)
    threads = torch.get_num_threads()
    monkeypatch.setattr(features, "cache_folder", features.cache_folder)  # benchmarks/features.py has its own

    def rows_of(name: str, *flags: str) -> list[Row]:
        out = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--json", str(out), *flags])
        importlib.import_module(name).main()
        return json.loads(out.read_text())["rows"]

    yield rows_of
    torch.set_num_threads(threads)


def test_the_text_tower_beside_the_literal_one(run):
    rows = run("text_tower", "--cases", "shared-short-names", "middle-short-names")
    assert [row["case"] for row in rows] == ["shared-short-names", "middle-short-names"]
    for row in rows:
        assert row["max_abs_diff"] < 1e-4 and row["grad_rel_diff"] < 1e-5
        assert row["positions"] < row["reference_positions"]
        assert row["speedup"] == pytest.approx(row["reference_seconds"] / row["seconds"])


@pytest.mark.skipif(not memory.CAN_MEASURE, reason="Linux tells it")
def test_peak_memory_is_what_a_step_holds_at_most():
    assert memory.peak_mib(functools.partial, operator.mul, b"x", 100 * 2**20) == pytest.approx(100, abs=2)


def test_a_step_costs_what_is_said_of_it(run, monkeypatch):
    monkeypatch.setattr(throughput, "REPEATS", 1)
    monkeypatch.setattr(throughput, "LONG", 1e-4)
    (row,) = run("cost", "--cases", "CoOp_PLPP-10-32")
    assert row["seconds"] > 0 and row["predicted_mib"] > 0
    assert row["predicted_seconds"] >= sum(row["predicted_parts"].values())
    assert row["predicted_parts"]["text"] > 0 and row["predicted_parts"]["plpp"] > 0


BENCHMARKS: dict[str, tuple[list[str], Callable[[dict[str, Any]], bool]]] = {
    "methods": (
        ["literal-maple", "plpp-coop"],
        lambda row: (
            row["loss_rel_diff"] < 1e-4 and row["grad_rel_diff"] < 1e-4
            if row["case"].startswith("literal")
            else 0 <= row["plpp_looked_up"] <= 1
        ),
    ),
    "features": (
        ["ablation-vit-b-16", "evaluation"],
        lambda row: row["same_figures" if row["case"] == "evaluation" else "same_bits"],
    ),
    "distillation": (
        ["step-kdpl", "step-fdbpl", "step-promptkd", "upstream-kdpl", "upstream-fdbpl", "upstream-promptkd"],
        lambda row: (
            row["bound"] == {"step-kdpl": 1.05, "step-fdbpl": 2.1, "step-promptkd": 1.05}[row["case"]]
            if row["case"].startswith("step")
            else row["loss_rel_diff"] < 1e-4 and row["grad_rel_diff"] < 1e-4 and row["tflop"] < row["reference_tflop"]
        ),
    ),
    "attach": (
        [],
        lambda row: (
            len(row["every_round"]) == 2 and row["attached"] == pytest.approx(statistics.median(row["every_round"]), abs=1e-3)
        ),
    ),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_measures_what_it_says(name: str, run) -> None:
    cases, holds = BENCHMARKS[name]
    rows = run(name, "--threads", "1", *(["--cases", *cases] if cases else []))
    assert [row.get("case") or row["position"] for row in rows] == (cases or ["end", "front"])
    assert all(map(holds, rows)), rows


FEW_PICTURES = """
import runpy, sys
from plpp_reg.data import emoji
kept = {emoji.table()[0][1], emoji.table()[-1][1]}
few = [row for row in emoji.table() if row[1] in kept]
emoji.table = lambda: few
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_phases_of_a_cold_run_are_its_whole_time(run, monkeypatch) -> None:
    def forked(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        return processes.run(FEW_PICTURES, *command[1:], env=env, package=False, stderr=None)

    ways = types.SimpleNamespace(run=forked, PIPE=subprocess.PIPE)
    monkeypatch.setattr(importlib.import_module("cold_start"), "subprocess", ways)
    (row,) = run("cold_start")
    for key in ("seconds", "cpu_seconds"):
        seconds = [row["phases"][phase][key] for phase in ("imports", "pictures", "features", "steps", "test", "rest")]
        assert row["case"] == "cold" and row[key] == pytest.approx(sum(seconds))
        assert all(seconds[:4])


# a program whose processes are forks, in place of torch.multiprocessing's own, which get by pickle what they run
OF_FORKS = """
import os, pickle, runpy, sys, torch.multiprocessing
def spawn(function, args, nprocs):
    function, args = pickle.loads(pickle.dumps((function, args)))
    torch.multiprocessing.start_processes(function, args, nprocs, start_method="fork")
if hasattr(os, "fork"):
    torch.multiprocessing.spawn = spawn
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_steps_over_processes_are_those_of_one(tmp_path: Path) -> None:
    program, out = Path(common.__file__).with_name("ranks.py"), tmp_path / "rows.json"
    flags = ["--quick", "--threads", "1", "--cases", "coop-plpp", "--json", str(out)]
    done = processes.run(OF_FORKS, str(program), *flags, path=[program.parent])
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"] == "coop-plpp" and row["processes"] == 2 and row["loss_rel_diff"] <= 1e-5


def test_steps_over_processes_are_timed_by_the_wall_and_end_where_losses_differ(run, tmp_path, monkeypatch):
    ranks = importlib.import_module("ranks")
    row = {"classes": 20, "reference_seconds": 1.0, "seconds": 1.0, "speedup": 1.0}
    monkeypatch.setattr(ranks, "measure", lambda case, *_: {"case": case, **row, "loss_rel_diff": 2e-5})
    for flags, says in ((["--cpu-time"], "expected wall time"), ([], "within 1e-05, got 2e-05")):
        with pytest.raises(SystemExit, match=says):
            run("ranks", *flags)
    assert not (tmp_path / "rows.json").exists()
