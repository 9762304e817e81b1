"""The programs in benchmarks/ and tools/ that give the documentation its figures: what they measure, not how fast it is."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_the_benchmark_writes_its_rows(tmp_path):
    out = tmp_path / "rows.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "text_tower.py"), "--quick", "--json", str(out)]
    subprocess.run([*program, "--cases", "shared-short-names", "middle-short-names"], check=True, timeout=240)
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["shared-short-names", "middle-short-names"]
    for row in rows:
        assert row["max_abs_diff"] < 1e-4 and row["grad_rel_diff"] < 1e-5
        assert row["positions"] < row["reference_positions"]
        assert row["speedup"] == pytest.approx(row["reference_seconds"] / row["seconds"])


BENCHMARKS: dict[str, tuple[list[str], Callable[[dict[str, Any]], bool]]] = {
    "ranks": (["coop-plpp"], lambda row: row["processes"] == 2 and row["loss_rel_diff"] <= 1e-5),
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
def test_each_benchmark_measures_what_it_says(name: str, tmp_path: Path) -> None:
    cases, holds = BENCHMARKS[name]
    out = tmp_path / "rows.json"
    program = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--threads", "1", "--json", str(out)]
    subprocess.run([*program, *(["--cases", *cases] if cases else [])], check=True, timeout=240)
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("case") or row["position"] for row in rows] == (cases or ["end", "front"])
    assert all(map(holds, rows)), rows


def test_the_phases_of_a_cold_run_are_its_whole_time(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "cold_start.py"), "--quick", "--json", str(out)]
    subprocess.run(program, check=True, timeout=480)
    (row,) = json.loads(out.read_text())["rows"]
    for key in ("seconds", "cpu_seconds"):
        seconds = [row["phases"][phase][key] for phase in ("imports", "pictures", "features", "steps", "test", "rest")]
        assert row["case"] == "cold" and row[key] == pytest.approx(sum(seconds))
        assert all(seconds[:4])


def test_steps_over_processes_are_timed_by_the_wall_and_end_where_losses_differ(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    common, ranks = importlib.import_module("common"), importlib.import_module("ranks")
    monkeypatch.setattr(common, "CLOCK", common.CLOCK)
    row = {"classes": 20, "reference_seconds": 1.0, "seconds": 1.0, "speedup": 1.0}
    monkeypatch.setattr(ranks, "measure", lambda case, *_: {"case": case, **row, "loss_rel_diff": 2e-5})
    for flag, says in (("--cpu-time", "expected wall time"), ("--quick", "within 1e-05, got 2e-05")):
        monkeypatch.setattr(sys, "argv", ["ranks.py", flag, "--json", str(tmp_path / "rows.json")])
        with pytest.raises(SystemExit, match=says):
            ranks.main()
    assert not (tmp_path / "rows.json").exists()
