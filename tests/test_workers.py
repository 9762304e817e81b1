"""Whoever runs a sweep's jobs, the results are the same; who dies is tried again; who is stopped leaves nothing half done."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml

from plpp_reg.commands.cli import main
from plpp_reg.errors import InputError
from plpp_reg.experiments import executors
from plpp_reg.experiments.jobs import Job
from plpp_reg.results import tables

from helpers import engine as helpers
from helpers import processes
from helpers.processes import until

METHODS = ["CoOp", "CoOp_PLPP"]
DYING = ["helpers.dying:DiesOnce", "helpers.dying:AlwaysDies"]


class Place(NamedTuple):
    """A protocol on the tiny data set, in a form that a fresh process knows: a folder, a file and a recipe."""

    folder: Path
    protocol: Path
    images: Path
    backbone: Path

    def argv(self, name: str, *more: str) -> list[str]:
        flags = ["--root", str(self.images), "--backbone", str(self.backbone), "--output", str(self.folder / name)]
        return ["run", str(self.protocol), *flags, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("workers")
    images = helpers.make_images(folder / "images")
    recipe = helpers.write_recipe(folder / "recipe.yaml")
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
    return Place(folder, protocol, images, helpers.write_backbone(folder / "tiny.pt"))


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


@pytest.fixture(scope="module")
def one(place: Place) -> Swept:
    return swept(place, "one", "--methods", *METHODS)


@pytest.fixture(scope="module")
def two(place: Place) -> Swept:
    return swept(place, "two", "--methods", *METHODS, *DYING, "--workers", "2")


@pytest.fixture(scope="module")
def ray(place: Place) -> Iterator[Swept]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(helpers.HERE))  # where the dying trainers are
        yield swept(place, "ray", "--methods", *METHODS, *DYING, "--executor", "ray", "--workers", "2")


@pytest.fixture(params=["two", "ray"])
def many(request: pytest.FixtureRequest) -> Swept:
    return request.getfixturevalue(request.param)


# ---- results -----------------------------------------------------------------------------------------------------------


def test_results_are_those_of_one_run_after_another(one: Swept, many: Swept) -> None:
    for method in METHODS:
        assert len(one.results(method)) == 2
        assert many.results(method) == one.results(method)


def test_tables_are_the_same_to_the_byte(one: Swept, many: Swept, tmp_path: Path) -> None:
    for method in METHODS:  # less the runs that were made to die
        for path in many.output.rglob(f"{method}/seed*/*.json"):
            copy = tmp_path / path.relative_to(many.output)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for form in tables.WRITERS:
        assert tables.tables_text(tmp_path, form) == tables.tables_text(one.output, form) != ""


def test_each_outcome_is_said_once(one: Swept, many: Swept) -> None:
    assert one.status == 0 and one.said[-1].startswith("All 4 runs are there")
    assert many.status == 1
    assert all(line.startswith(f"[{i}/8] ") for i, line in enumerate(many.said[:8], start=1))
    assert sum("FAILED" in line for line in many.said[:8]) == 1 and many.said[8].startswith("FAILED")


# ---- dying -------------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_tried_again_and_goes_on(one: Swept, many: Swept) -> None:
    (died,) = many.output.rglob("*DiesOnce/seed1/died")
    assert died.read_text() == "x"
    assert "(epoch 1)" in (died.parent / "log.txt").read_text()  # from its checkpoint, not from the beginning
    plain, again = one.results("CoOp"), many.results("helpers.dying:DiesOnce")
    metrics = [[(r["metrics"], r["losses"], r["tests"]) for r in results.values()] for results in (plain, again)]
    assert metrics[0] == metrics[1]


def test_one_that_always_dies_is_reported_and_the_others_finish(many: Swept) -> None:
    (died,) = many.output.rglob("*AlwaysDies/seed1/died")
    assert died.read_text() == "x" * executors.TRIES
    error = json.loads((died.parent / "failed.json").read_text())["error"]
    assert error.startswith("WorkerDied: ") and error in many.said[8] and "AlwaysDies, seed 1" in many.said[8]
    assert not (died.parent / "result.json").exists()
    assert len(many.results("helpers.dying:AlwaysDies")) == 1  # its other seed


def test_a_worker_that_dies_with_nothing_to_do_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        made = 0

        def __init__(self, *args: object, **options: object) -> None:
            Pool.made += 1

        def submit(self, *args: object) -> str:
            if Pool.made == 1:
                raise executors.BrokenProcessPool
            return "submitted"

    monkeypatch.setattr(executors, "ProcessPoolExecutor", Pool)
    job = Job(Path("x"), Path("x"), None, {}, {}, 1.0)
    assert executors._Slot(None, None).submit(job, 1) == "submitted" and Pool.made == 2


# ---- stopping ----------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


STOPPED = [
    ("Ctrl-C", ["--workers", "2"], 2),
    ("kill", ["--workers", "1"], 1),
    ("Ctrl-C", ["--executor", "ray", "--workers", "1"], 1),
    ("SIGTERM", ["--executor", "ray", "--workers", "1"], 1),
]
OWN_RAY = {"RAY_ADDRESS": None, "RAY_task_oom_retries": None}


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize(("how", "flags", "n"), STOPPED)
def test_stopped_nothing_goes_on_and_nothing_counts(place: Place, how: str, flags: list[str], n: int) -> None:
    output = place.folder / f"{how}-{len(flags)}"
    argv = place.argv(output.name, "--threads", "1", *flags, "--methods", "helpers.dying:NeverEnds")
    with processes.started(processes.PLPP, *argv, env=OWN_RAY, stderr=PIPE, start_new_session=True) as process:
        try:
            until(lambda: len([path for path in output.rglob("pid") if path.read_text()]) == n)
            pids = [int(path.read_text()) for path in output.rglob("pid")]
            assert process.pid not in pids and all(map(alive, pids))
            if how == "Ctrl-C":
                os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to everybody
                assert process.wait(30) == 130 and "plpp: stopped" in process.stderr.read()
            elif how.startswith("SIG"):
                number = signal.Signals[how]
                process.send_signal(number)
                assert process.wait(60) == 128 + number
                assert process.stderr.read() == f"plpp: stopped by {how}; the same command goes on from what is there\n"
            else:
                process.kill()
                process.wait(30)
            until(lambda: not any(map(alive, pids)), 10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not list(output.rglob("result.json")) and not list(output.rglob("failed.json"))
    assert "Missing" in tables.tables_text(output, "markdown")


# ---- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "-1"], "--workers: expected an integer, 0 to 1024, got -1"),
        (["--threads", "-2"], "--threads: expected an integer, 0 to 1024, got -2"),
        (["--executor", "rai"], "unknown executor 'rai': did you mean 'ray'?"),
        (["--address", "auto"], "--address 'auto': expected --executor ray with it"),
        (["--executor", "ray", "--address", "here:1", "--workers", "2"], "--workers 2: expected none with --address"),
    ],
)
def test_what_cannot_be_is_refused(place: Place, flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(place.argv("refused", *flags)) == 2
    assert message in capsys.readouterr().err
    assert not (place.folder / "refused").exists()


def test_more_threads_than_any_node_has_are_refused(place: Place, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    nodes = [{"Alive": alive, "Resources": {"CPU": count}} for alive, count in ((True, 1.0), (True, 2.0), (False, 8.0))]
    there = SimpleNamespace(nodes=lambda: nodes, shutdown=lambda: None)
    monkeypatch.setattr(executors, "_connected", lambda address, cpus: there)
    assert main(place.argv("wide", "--executor", "ray", "--threads", "3")) == 2
    assert "--threads 3: expected at most 2, the CPUs of Ray's largest node, got 3\n" in capsys.readouterr().err
    assert not list((place.folder / "wide").rglob("config.yaml"))  # nothing was started


@pytest.mark.skipif(sys.platform != "linux", reason="no memory monitor")
def test_a_run_that_does_not_fit_in_memory_is_tried_as_often_as_one_that_dies() -> None:
    code = """
from plpp_reg.experiments import executors
ray = executors._connected("", 1)
@ray.remote(max_retries=executors.TRIES - 1)
def endless():
    import time
    time.sleep(600)
try:
    ray.get(endless.remote(), timeout=60)
except ray.exceptions.OutOfMemoryError:
    print("out of memory")
"""
    too_much = {"RAY_memory_usage_threshold": "0.0001"}  # whatever runs is that
    done = processes.run(code, env={**OWN_RAY, **too_much})
    assert "out of memory" in done.stdout, done.stderr[-3000:]


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[ray\]"'):
        executors.choose("ray")


@pytest.mark.parametrize(
    ("visible", "there", "expected"),
    [
        (None, 0, [None, None, None]),
        (None, 2, ["0", "1", "0"]),
        ("5,7", 2, ["5", "7", "5"]),
        ("GPU-a, GPU-b,GPU-c,GPU-d", 4, ["GPU-a", "GPU-b", "GPU-c"]),
        ("", 0, [None, None, None]),
    ],
)
def test_each_worker_has_a_gpu(visible, there, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert executors._gpus(3) == expected


def test_threads_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(executors, "_run", lambda jobs, slots, threads: given.append(threads) or iter(()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    job = Job(Path("x"), Path("x"), None, {}, {}, 1.0)
    for n, threads in ((1, 0), (3, 0), (16, 0), (3, 5)):
        list(executors.processes(n, threads)([job] * n))
    assert given == [8, 2, 1, 5]
