"""A run killed at any moment gives what an uninterrupted one gives; one process a folder, and one run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
from filelock import FileLock

from plpp_reg.commands import cli
from plpp_reg.engine import checkpoint
from plpp_reg.engine.trainer import Trainer
from plpp_reg.results import record as results

from helpers import engine as helpers
from helpers import processes
from helpers.engine import quietly
from helpers.resume import (
    EPOCHS,
    STEPS,
    Killed,
    arguments,
    assert_as_uninterrupted,
    command,
    final,
    kill_at,
)

pytestmark = pytest.mark.usefixtures("tiny_and_noisy")


@pytest.fixture(scope="module")
def world(resumable: Path) -> Path:
    return resumable


# Ten moments drawn by a seeded generator: in a step, or at one of the renames of config.yaml, checkpoints, pointers, result.
_rng = random.Random(2412)
MOMENTS = [(_rng.choice(["step", "after step"]), _rng.randint(1, EPOCHS * STEPS)) for _ in range(6)]
MOMENTS += [(_rng.choice(["before rename", "after rename"]), _rng.randint(2, 10)) for _ in range(4)]
MOMENTS += [("before removal", 2)]


@pytest.mark.parametrize(("place", "number"), MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, place, number)
        with pytest.raises(Killed):
            quietly(arguments(world, tmp_path / "out"))
    assert not (tmp_path / "out" / "result.json").exists() or place == "after rename"
    torch.manual_seed(999), random.seed(999), np.random.seed(999)  # a new process's streams hold something else
    quietly(arguments(world, tmp_path / "out"))
    assert_as_uninterrupted(world, tmp_path / "out")


def test_a_run_killed_again_and_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each attempt gets a little further: one epoch and two steps. Three are needed.
    attempts = 0
    while not (tmp_path / "out" / "result.json").exists():
        attempts += 1
        with monkeypatch.context() as patch:
            kill_at(patch, "step", STEPS + 3)
            try:
                quietly(arguments(world, tmp_path / "out"))
            except Killed:
                pass
        assert attempts <= EPOCHS
    assert attempts == EPOCHS
    assert_as_uninterrupted(world, tmp_path / "out")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("Resumed from") == EPOCHS - 1  # one file tells the whole story


DRIVER = """
import os, signal, sys
from helpers import engine as engine_helpers
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers.coop import CoOp
engine_helpers.register()
CoOp.losses = engine_helpers.noisy_losses
original, left = Trainer.step, [int(sys.argv[1])]
def step(self, *args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGTERM if os.name == "nt" else signal.SIGKILL)  # on Windows any of them is final
    return original(self, *args, **options)
Trainer.step = step
from plpp_reg.commands.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_process_killed_by_the_system_is_resumed_by_another(world: Path, tmp_path: Path) -> None:
    died = processes.run(DRIVER, "11", *command(world, tmp_path / "out"))
    assert died.returncode == (signal.SIGTERM if os.name == "nt" else -signal.SIGKILL), died.stderr
    assert not (tmp_path / "out" / "result.json").exists()
    # The dead process's lock does not stand in the way.
    assert cli.main(command(world, tmp_path / "out")) == 0
    assert_as_uninterrupted(world, tmp_path / "out")


@pytest.mark.parametrize("number", [3, 9])
def test_resume_into_another_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "step", number + STEPS)
        with pytest.raises(Killed):
            quietly(arguments(world, tmp_path / "old"))
    before = helpers.files_below(tmp_path / "old")
    contents = {name: (tmp_path / "old" / name).read_bytes() for name in before if (tmp_path / "old" / name).is_file()}
    quietly(arguments(world, tmp_path / "new", resume=str(tmp_path / "old")))
    assert_as_uninterrupted(world, tmp_path / "new")
    assert helpers.files_below(tmp_path / "old") == before
    assert all((tmp_path / "old" / name).read_bytes() == content for name, content in contents.items())


def test_best_on_validation_is_deployed_when_it_was_before_the_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Validation falls after epoch 1, so the best model lies in the old folder only.
    original, tested = Trainer.classify, []

    def seen(self, split="test"):
        tested.append(self.method.saved.ctx.detach().clone())
        return original(self, split)

    monkeypatch.setattr(Trainer, "test", lambda self, split: {"accuracy": 90.0 - self.state.epoch})
    monkeypatch.setattr(Trainer, "classify", seen)
    with monkeypatch.context() as patch:
        kill_at(patch, "step", 2 * STEPS + 2)
        with pytest.raises(Killed):
            quietly(arguments(world, tmp_path / "old"))
    quietly(arguments(world, tmp_path / "new", resume=str(tmp_path / "old")))
    best = final(tmp_path / "old", "model-best.pth.tar")
    assert best["epoch"] == 1
    assert torch.equal(tested[-1], best["state_dict"]["ctx"])


def test_a_finished_run_is_tested_again_and_not_trained(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    monkeypatch.setattr(Trainer, "step", lambda *args: pytest.fail("trained"))
    quietly(arguments(world, tmp_path / "out"))
    assert_as_uninterrupted(world, tmp_path / "out")


@pytest.mark.parametrize("place", ["before rename", "test"])
def test_a_finished_run_that_is_started_again_and_killed_keeps_its_result(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    before = (tmp_path / "out" / "result.json").read_bytes()
    with monkeypatch.context() as patch:
        if place == "test":
            patch.setattr(Trainer, "classify", lambda *args: (_ for _ in ()).throw(Killed))
        else:
            kill_at(patch, place, 2)
        with pytest.raises(Killed):
            quietly(arguments(world, tmp_path / "out"))
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_random_streams_come_back() -> None:
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second draw in store
    state = checkpoint.random_streams()

    def draw() -> tuple:
        return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand()

    first = draw()
    draw()
    checkpoint.restore_random_streams(state)
    assert draw() == first


# ---- one process a folder ------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_process_on_a_folder_stops(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with processes.started(HOLDER, str(tmp_path / "out" / ".lock"), stdin=PIPE, stdout=PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        assert cli.main(command(world, tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "another process" in error and str(tmp_path / "out") in error
        assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert cli.main(command(world, tmp_path / "out")) == 0  # the lock died with its holder


def test_a_run_holds_the_lock_that_the_other_looks_at(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other side of the test above: it is `.lock` in the folder that a run really holds, in every phase.
    held = []

    def look(original):
        def call(*args, **kwargs):
            lock = FileLock(tmp_path / "out" / ".lock")
            code = (
                "import sys; from filelock import *\ntry: FileLock(sys.argv[1]).acquire(timeout=0)\nexcept Timeout: sys.exit(7)"
            )
            held.append(subprocess.run([sys.executable, "-c", code, lock.lock_file]).returncode == 7)
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(Trainer, "train", look(Trainer.train))
    monkeypatch.setattr("plpp_reg.engine.run.write_result", look(results.write_result))
    quietly(arguments(world, tmp_path / "out"))
    assert held == [True, True]


# ---- a folder of another run ---------------------------------------------------------------------------------------------

CHANGES = [
    (["OPTIM.LR", "0.01"], "OPTIM.LR"),
    (["TRAINER.PLPP.WEIGHT", "0.5"], "TRAINER.PLPP.WEIGHT"),
    (["--seed", "2"], "SEED"),
    (["--trainer", "CoOp", "TRAINER.PLPP.ENABLED", "False"], "TRAINER.NAME"),
    (["INPUT.TRANSFORMS", "['normalize']"], "INPUT.TRANSFORMS"),
]


@pytest.mark.parametrize(("change", "key"), CHANGES, ids=lambda c: str(c))
@pytest.mark.parametrize("way", ["go on", "resume", "resume into it"])
def test_a_folder_of_another_run_is_refused_and_unchanged(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: list[str], key: str, way: str
) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    if way == "go on":
        line = command(world, tmp_path / "out", *change)
    elif way == "resume":
        line = command(world, tmp_path / "new", "--resume", str(tmp_path / "out"), *change)
    else:  # the run that is resumed fits, the folder that is written to does not
        assert cli.main(command(world, tmp_path / "other", *change)) == 0
        capsys.readouterr()
        line = command(world, tmp_path / "out", "--resume", str(tmp_path / "other"), *change)
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and key in error and str(tmp_path / "out") in error
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "same", [["DATALOADER.NUM_WORKERS", "1"], ["TRAIN.PRINT_FREQ", "3"], ["TRAIN.CHECKPOINT_FREQ", "2"]], ids=str
)
def test_what_changes_no_result_may_change(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: list[str]
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "step", 2 * STEPS)
        with pytest.raises(Killed):
            quietly(arguments(world, tmp_path / "out"))
    quietly(arguments(world, tmp_path / "out", opts=tuple(same)))
    helpers.assert_same(final(tmp_path / "out"), final(world / "whole"))
