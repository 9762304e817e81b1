"""Ray runs a sweep's jobs: what test_workers.py asks of processes, and what is Ray's own."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from plpp_reg.commands.cli import main
from plpp_reg.experiments import executors

from helpers import processes
from helpers.engine import HERE
from helpers.sweeps import DYING, METHODS, OWN_RAY, Place, SweepTests, Swept, stop, swept


@pytest.fixture(scope="module")
def many(sweep_place: Place) -> Swept:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(HERE))  # where the dying trainers are
        return swept(sweep_place, "many", "--methods", *METHODS, *DYING, "--executor", "ray", "--workers", "2")


class TestSweepByRay(SweepTests):
    pass


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_stopped_nothing_goes_on_and_nothing_counts(sweep_place: Place, how: str) -> None:
    stop(sweep_place, how, ["--executor", "ray", "--workers", "1"], 1)


def test_more_threads_than_any_node_has_are_refused(sweep_place: Place, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    nodes = [{"Alive": alive, "Resources": {"CPU": count}} for alive, count in ((True, 1.0), (True, 2.0), (False, 8.0))]
    there = SimpleNamespace(nodes=lambda: nodes, shutdown=lambda: None)
    monkeypatch.setattr(executors, "_connected", lambda address, cpus: there)
    assert main(sweep_place.argv("wide", "--executor", "ray", "--threads", "3")) == 2
    assert "--threads 3: expected at most 2, the CPUs of Ray's largest node, got 3\n" in capsys.readouterr().err
    assert not list((sweep_place.folder / "wide").rglob("config.yaml"))  # nothing was started


@pytest.mark.skipif(sys.platform != "linux", reason="no memory monitor")
def test_a_run_that_does_not_fit_in_memory_is_tried_as_often_as_one_that_dies() -> None:
    code = """
from plpp_reg.experiments import executors
ray = executors._connected("", 1)
(node,) = ray.nodes()  # as the test above makes them up
assert node["Alive"] is True and node["Resources"]["CPU"] == 1
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
