"""plpp demo, and the programs in benchmarks/ and tools/ that give the documentation its figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy import stats

from plpp_reg.commands import cli
from plpp_reg.experiments import demo
from plpp_reg.results.record import read_result

ROOT = Path(__file__).parent.parent


def runs_of(base: list[float], new: list[float]) -> list[demo.DemoRun]:
    return [demo.DemoRun(b, n, [3000.0, 40.5], ["cat 0.50"]) for b, n in zip(base, new, strict=True)]


def test_the_table_is_paired_over_seeds():
    plain, treated = runs_of([50, 52, 55], [30, 31, 29]), runs_of([51, 52, 57], [33, 31, 33])
    text = demo.report([20.0, 10.0], {"CoOp": plain, "CoOp_PLPP": treated}, [1, 2, 3])
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "13.3" in rows["zero-shot"]  # harmonic mean of 20 and 10
    assert "52.3 ± 2.5" in rows["CoOp"] and "3,000" in rows["CoOp"] and "40.5" in rows["CoOp"]
    low, high = stats.ttest_rel([33, 31, 33], [30, 31, 29]).confidence_interval(0.95)
    assert f"{(low + high) / 2:+.1f} ± {(high - low) / 2:.1f}" in rows["difference"]


def test_demo_trains_prints_and_draws_and_goes_on(tmp_path, capsys):
    arguments = ["demo", "--seeds", "0", "3", "--output-dir", str(tmp_path / "demo"), "OPTIM.MAX_EPOCH", "1"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    for name in ("zero-shot", "CoOp", "CoOp_PLPP", "difference", "Nearest words"):
        assert name in first
    assert (tmp_path / "demo" / "demo.txt").read_text() in first
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert min(picture.size) >= 400
    results = {p.parent: read_result(p.parent) for p in (tmp_path / "demo").rglob("result.json")}
    assert {r["seed"] for r in results.values()} == {0, 3}
    assert {r["config"]["DATASET.SUBSAMPLE_CLASSES"] for r in results.values()} == {"base", "new"}
    trained = list((tmp_path / "demo").rglob("model.pth.tar-1"))
    assert len(trained) == 4  # two seeds, plain and PLPP; nothing else is trained
    written = {p: p.stat().st_mtime_ns for p in trained}
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.split("\n\n")[1] == first.split("\n\n")[1]
    assert {p: p.stat().st_mtime_ns for p in trained} == written  # done is not done again


def test_several_methods_stand_in_one_table_each_beside_its_own_plain_one(tmp_path, capsys):
    arguments = ["demo", "--methods", "VPT", "MaPLe", "IVLP", "--seeds", "1", "2", "--output-dir", str(tmp_path / "demo")]
    assert cli.main([*arguments, "OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    first = [line.split()[0] for line in lines[2:-1]]
    assert first == ["zero-shot", "VPT", "MaPLe", "MaPLe_PLPP", "difference", "IVLP", "IVLP_PLPP", "difference"]
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert min(picture.size) >= 250


def test_an_unknown_method(tmp_path, capsys):
    assert cli.main(["demo", "--output-dir", str(tmp_path / "demo"), "--methods", "MaPLE"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'MaPLe'" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("seeds", [["1", "1"], ["-2"], ["x"]])
def test_bad_seeds(seeds, tmp_path, capsys):
    assert cli.main(["demo", "--output-dir", str(tmp_path / "demo"), "--seeds", *seeds]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "demo").exists()


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
    "ranks": (["coop-plpp"], lambda row: row["processes"] == 2 and row["loss_rel_diff"] <= 1e-5 and row["speedup"] > 0),
    "methods": (
        ["literal-maple", "plpp-coop"],
        lambda row: (
            row["loss_rel_diff"] < 1e-4 and row["grad_rel_diff"] < 1e-4 and row["speedup"] > 0
            if row["case"].startswith("literal")
            else 0 <= row["plpp_looked_up"] <= 1 and row["plpp_overhead"] > -1
        ),
    ),
    "features": (
        ["ablation-vit-b-16", "evaluation"],
        lambda row: row["same_figures" if row["case"] == "evaluation" else "same_bits"] and row["speedup"] > 0,
    ),
    "attach": ([], lambda row: row["plain_seconds"] > 0 and row["attached"] > 0 and len(row["every_round"]) == 2),
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


def test_the_study_pairs_by_seed():
    spec = importlib.util.spec_from_file_location("study_plpp", ROOT / "tools" / "study_plpp.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)

    def record(seed: int, setting: str, base: float) -> dict:
        return {"seed": seed, "n_ctx": 4, "setting": setting, "base": base, "new": 10.0, "H": 20.0, "perplexity": 50.0}

    # out of order, and one seed of the setting is still missing: it must not be paired with another
    records = [record(2, "both 1", 33.0), record(1, "none", 20.0), record(2, "none", 31.0), record(3, "none", 99.0)]
    records.append(record(1, "both 1", 24.0))
    text = study.table(records)
    mean, half = 3.0, stats.t.ppf(0.975, 1) * 1.0  # differences 4 and 2: standard error 1
    assert f"| both 1 (2 seeds) | {mean:+.1f} ± {half:.1f} |" in text
