"""Sweeps of a small protocol by one executor or another: what is the same of all of them, and that a stop leaves nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import yaml

from plpp_reg.commands.cli import main
from plpp_reg.experiments import executors
from plpp_reg.results import tables

from helpers import engine, processes

METHODS = ["CoOp", "CoOp_PLPP"]
DYING = ["helpers.dying:DiesOnce", "helpers.dying:AlwaysDies"]
OWN_RAY = {"RAY_ADDRESS": None, "RAY_task_oom_retries": None}


class Place(NamedTuple):
    """A protocol on the tiny data set, in a form that a fresh process knows: a folder, a file and a recipe."""

    folder: Path
    protocol: Path
    images: Path
    backbone: Path

    def argv(self, name: str, *more: str) -> list[str]:
        flags = ["--root", str(self.images), "--backbone", str(self.backbone), "--output", str(self.folder / name)]
        return ["run", str(self.protocol), *flags, *more]


def make_place(folder: Path) -> Place:
    images = engine.make_images(folder / "images")
    recipe = engine.write_recipe(folder / "recipe.yaml")
    content = {
        "table": "halves",
        "methods": ["CoOp"],
        "datasets": [f"folder:{images}"],
        "seeds": [1, 2],
        "shots": [2],
        "recipe": [str(recipe)],
        "set": {"DATASET.SUBSAMPLE_CLASSES": "base"},
        "test": "base",
        "tests": {"new": {"DATASET.SUBSAMPLE_CLASSES": "new"}},
    }
    protocol = folder / "small.yaml"
    protocol.write_text(yaml.safe_dump(content))
    return Place(folder, protocol, images, engine.write_backbone(folder / "tiny.pt"))


class Swept(NamedTuple):
    """A finished sweep: its exit status, what it said, and its folder."""

    status: int
    said: list[str]
    output: Path

    def results(self, method: str) -> dict[str, dict]:
        """What each run of a method recorded, less its time and its place."""
        found = {}
        for path in sorted(self.output.rglob("result.json")):
            result = json.loads(path.read_text())
            if result["trainer"] == method:
                del result["seconds"], result["phases"], result["config"]["OUTPUT_DIR"]
                found[str(path.relative_to(self.output))] = result
        return found


def swept(place: Place, name: str, *flags: str) -> Swept:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(place.argv(name, "--threads", "1", *flags))
    said = [line for line in out.getvalue().splitlines() if "(raylet)" not in line]  # Ray's own word on a death
    return Swept(status, said, place.folder / name)


class SweepTests:
    """What is asked of every executor: ``many`` is a sweep by it, ``sweep_one`` that of one run after another."""

    def test_results_are_those_of_one_run_after_another(self, sweep_one: Swept, many: Swept) -> None:
        for method in METHODS:
            assert len(sweep_one.results(method)) == 2
            assert many.results(method) == sweep_one.results(method)

    def test_tables_are_the_same_to_the_byte(self, sweep_one: Swept, many: Swept, tmp_path: Path) -> None:
        for method in METHODS:  # less the runs that were made to die
            for path in many.output.rglob(f"{method}/seed*/*.json"):
                copy = tmp_path / path.relative_to(many.output)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        for form in tables.WRITERS:
            assert tables.tables_text(tmp_path, form) == tables.tables_text(sweep_one.output, form) != ""

    def test_each_outcome_is_said_once(self, sweep_one: Swept, many: Swept) -> None:
        assert sweep_one.status == 0 and sweep_one.said[-1].startswith("All 4 runs are there")
        assert many.status == 1
        assert all(line.startswith(f"[{i}/8] ") for i, line in enumerate(many.said[:8], start=1))
        assert sum("FAILED" in line for line in many.said[:8]) == 1 and many.said[8].startswith("FAILED")

    def test_a_worker_that_dies_is_tried_again_and_goes_on(self, sweep_one: Swept, many: Swept) -> None:
        (died,) = many.output.rglob("*DiesOnce/seed1/died")
        assert died.read_text() == "x"
        assert "(epoch 1)" in (died.parent / "log.txt").read_text()  # from its checkpoint, not from the beginning
        plain, again = sweep_one.results("CoOp"), many.results("helpers.dying:DiesOnce")
        metrics = [[(r["metrics"], r["losses"], r["tests"]) for r in results.values()] for results in (plain, again)]
        assert metrics[0] == metrics[1]

    def test_one_that_always_dies_is_reported_and_the_others_finish(self, many: Swept) -> None:
        (died,) = many.output.rglob("*AlwaysDies/seed1/died")
        assert died.read_text() == "x" * executors.TRIES
        error = json.loads((died.parent / "failed.json").read_text())["error"]
        assert error.startswith("WorkerDied: ") and error in many.said[8] and "AlwaysDies, seed 1" in many.said[8]
        assert not (died.parent / "result.json").exists()
        assert len(many.results("helpers.dying:AlwaysDies")) == 1  # its other seed


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def stop(place: Place, how: str, flags: list[str], n: int) -> None:
    """Of a sweep of runs that never end, ``n`` at a time, that is stopped nothing goes on and nothing counts.

    Args:
        how: ``"Ctrl-C"``, ``"kill"`` or a signal's name.
    """
    output = place.folder / f"{how}-{len(flags)}"
    argv = place.argv(output.name, "--threads", "1", *flags, "--methods", "helpers.dying:NeverEnds")
    with processes.started(processes.PLPP, *argv, env=OWN_RAY, stderr=PIPE, start_new_session=True) as process:
        try:
            processes.until(lambda: process.poll() is not None or len([p for p in output.rglob("pid") if p.read_text()]) == n)
            assert process.poll() is None, process.stderr.read()
            pids = [int(path.read_text()) for path in output.rglob("pid")]
            assert process.pid not in pids and all(map(alive, pids))
            if how == "Ctrl-C":
                os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to everybody
                assert process.wait(30) == 130 and "plpp: stopped" in process.stderr.read()
            elif how.startswith("SIG"):
                number = signal.Signals[how]
                process.send_signal(number)
                assert process.wait(60) == 128 + number
                *others, last = process.stderr.read().splitlines()
                assert last == f"plpp: stopped by {how}; the same command goes on from what is there"
                rays_own = r"\[[\d-]+ [\d:,]+ \w \d+ \d+\] task_manager\.cc"  # of a task that it could not report
                assert all("ray" in flags and re.match(rays_own, line) for line in others)
            else:
                process.kill()
                process.wait(30)
            processes.until(lambda: not any(map(alive, pids)), 10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not list(output.rglob("result.json")) and not list(output.rglob("failed.json"))
    assert "Missing" in tables.tables_text(output, "markdown")
