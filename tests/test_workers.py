"""Whoever runs a sweep's jobs, the results are the same; who dies is tried again; who is stopped leaves nothing half done.

Here processes of this machine do; in test_workers_ray.py Ray does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from plpp_reg.commands.cli import main
from plpp_reg.errors import InputError
from plpp_reg.experiments import executors
from plpp_reg.experiments.jobs import Job

from helpers.sweeps import DYING, METHODS, Place, SweepTests, Swept, stop, swept


@pytest.fixture(scope="module")
def many(sweep_place: Place) -> Swept:
    return swept(sweep_place, "many", "--methods", *METHODS, *DYING, "--workers", "2")


class TestSweepByProcesses(SweepTests):
    pass


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


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize(("how", "n"), [("Ctrl-C", 2), ("kill", 1)])
def test_stopped_nothing_goes_on_and_nothing_counts(sweep_place: Place, how: str, n: int) -> None:
    stop(sweep_place, how, ["--workers", str(n)], n)


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
def test_what_cannot_be_is_refused(sweep_place: Place, flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(sweep_place.argv("refused", *flags)) == 2
    assert message in capsys.readouterr().err
    assert not (sweep_place.folder / "refused").exists()


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


def test_a_worker_has_the_environment_of_its_own_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the first one in this process, whose server of forks it comes from."""
    watched, held = multiprocessing.Pipe(duplex=False)
    for folder in ("/first", "/second"):
        monkeypatch.setenv("PLPP_REG_CACHE", folder)
        slot = executors._Slot(None, watched)
        assert slot.pool.submit(os.getenv, "PLPP_REG_CACHE").result() == folder
        slot.pool.shutdown()
    held.close()
