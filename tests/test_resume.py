"""A run killed at any moment gives what an uninterrupted one gives; files are whole or refused; one process a folder."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from plpp_reg import cli, results
from plpp_reg.datasets import DATASETS, DatasetEntry
from plpp_reg.engine import checkpoint, files
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError
from plpp_reg.trainers.coop import CoOp

import engine_helpers as helpers

EPOCHS, STEPS = 4, 4  # 25 images in batches of 6
RECIPE = {"OPTIM__MAX_EPOCH": EPOCHS, "TEST__FINAL_MODEL": "best_val", "TRAINER__PLPP": {"WEIGHT": 0.3, "INVERSE_WEIGHT": 0.7}}


class Killed(BaseException):
    """Not an Exception: nothing in the package may catch it, as nothing can catch SIGKILL."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a backbone, a recipe, and a run of it that nobody interrupted, in ``whole``."""
    world = tmp_path_factory.mktemp("world")
    helpers.make_images(world / "data")
    helpers.write_backbone(world / "tiny.pt")
    helpers.write_recipe(world / "recipe.yaml", **RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("engine_helpers:read_tiny"))
        patch.setattr(CoOp, "compute_losses", helpers.noisy_losses)
        quietly(arguments(world, world / "whole"))
    return world


@pytest.fixture(autouse=True)
def tiny_and_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("engine_helpers:read_tiny"))
    monkeypatch.setattr(CoOp, "compute_losses", helpers.noisy_losses)


def arguments(world: Path, out: Path, **more) -> RunArguments:
    return RunArguments(
        trainer="CoOp_PLPP",
        root=str(world / "data"),
        output_dir=str(out),
        config_file=str(world / "recipe.yaml"),
        backbone=str(world / "tiny.pt"),
        **more,
    )


def command(world: Path, out: Path, *more: str) -> list[str]:
    flags = ["--trainer", "CoOp_PLPP", "--root", str(world / "data"), "--output-dir", str(out)]
    return ["train", *flags, "--config-file", str(world / "recipe.yaml"), "--backbone", str(world / "tiny.pt"), *more]


def quietly(arguments: RunArguments) -> dict:
    return run(arguments, RunLog(quiet=True))[0]


def final(folder: Path, name: str = f"model.pth.tar-{EPOCHS}") -> dict:
    content = torch.load(folder / "prompt_learner" / name, weights_only=True)
    content["plpp_reg"].pop("seconds")
    return content


def assert_as_uninterrupted(world: Path, folder: Path) -> None:
    """Context, optimizer, schedule, history with its learning rates, random streams, and what is reported."""
    helpers.assert_same(final(folder), final(world / "whole"))
    helpers.assert_same(final(folder, "model-best.pth.tar"), final(world / "whole", "model-best.pth.tar"))
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, world / "whole"))
    for result in (ours, theirs):
        result.pop("seconds")
        for key in ("OUTPUT_DIR", "RESUME"):
            result["config"].pop(key)
    assert ours == theirs


def kill_at(patch: pytest.MonkeyPatch, place: str, number: int) -> None:
    """Raise Killed at the ``number``-th (1, 2, ...) time that the program comes to ``place``."""
    left = [number]

    def dying(original, after=False):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and not after:
                raise Killed
            value = original(*args, **kwargs)
            if left[0] == 0:
                raise Killed
            return value

        return call

    if place == "step":
        patch.setattr(PromptTrainer, "step", dying(PromptTrainer.step))
    elif place == "after step":
        patch.setattr(PromptTrainer, "step", dying(PromptTrainer.step, after=True))
    elif place == "before rename":
        patch.setattr(files.os, "replace", dying(os.replace))
    elif place == "after rename":
        patch.setattr(files.os, "replace", dying(os.replace, after=True))
    elif place == "before removal":  # of the previous epoch's file
        original = Path.unlink
        dies = dying(original)
        patch.setattr(
            Path, "unlink", lambda p, *a, **k: dies(p, *a, **k) if p.name.startswith("model") else original(p, *a, **k)
        )


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
import engine_helpers
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.trainers.coop import CoOp
engine_helpers.register()
CoOp.compute_losses = engine_helpers.noisy_losses
original, left = PromptTrainer.step, [int(sys.argv[1])]
def step(self, *args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGTERM if os.name == "nt" else signal.SIGKILL)  # on Windows any of them is final
    return original(self, *args, **options)
PromptTrainer.step = step
from plpp_reg.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("step", [3, 11])
def test_a_process_killed_by_the_system_is_resumed_by_another(world: Path, tmp_path: Path, step: int) -> None:
    path = [helpers.HERE, helpers.ROOT]
    died = subprocess.run(
        **helpers.python(DRIVER, str(step), *command(world, tmp_path / "out"), path=path, capture_output=True, timeout=120)
    )
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
    original, tested = PromptTrainer.test, []

    def fake(self, split="test"):
        if split == "val":
            return {"accuracy": 90.0 - self.epoch}
        tested.append(self.prompts.ctx.detach().clone())
        return original(self, split)

    monkeypatch.setattr(PromptTrainer, "test", fake)
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
    monkeypatch.setattr(PromptTrainer, "step", lambda *args: pytest.fail("trained"))
    quietly(arguments(world, tmp_path / "out"))
    assert_as_uninterrupted(world, tmp_path / "out")


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
    holder = subprocess.Popen(
        **helpers.python(HOLDER, str(tmp_path / "out" / ".lock"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert cli.main(command(world, tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "another process" in error and str(tmp_path / "out") in error
        assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    finally:
        holder.kill()
        holder.communicate()
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

    monkeypatch.setattr(PromptTrainer, "train", look(PromptTrainer.train))
    monkeypatch.setattr(results, "write_result", look(results.write_result))
    quietly(arguments(world, tmp_path / "out"))
    assert held == [True, True]


# ---- damaged and hostile files -------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (Path(self.path), "executed"))


def spoiled(content: dict, how: str):
    """A whole checkpoint with one thing wrong in it."""
    extra = content["plpp_reg"]
    if how == "no streams":
        extra.pop("streams")
    elif how == "streams of another kind":
        extra["streams"] = {"torch": 3}
    elif how == "extra is a number":
        content["plpp_reg"] = 3
    elif how == "no history":
        extra.pop("history")
    elif how == "epoch is text":
        content["epoch"] = "two"
    elif how == "epoch beyond the end":
        content["epoch"] = 99
    elif how == "no optimizer":
        content["optimizer"] = None
    elif how == "optimizer of another model":
        content["optimizer"] = {"state": {}, "param_groups": []}
    elif how == "no scheduler":
        content.pop("scheduler")
    elif how == "weight is a number":
        content["state_dict"]["ctx"] = 3
    elif how == "weight is nan":
        content["state_dict"]["ctx"] *= float("nan")
    elif how == "weight of another shape":
        content["state_dict"]["ctx"] = torch.zeros(2, 2)
    elif how == "other weights":
        content["state_dict"]["more"] = torch.zeros(2)
    elif how == "no weights":
        content.pop("state_dict")
    elif how == "a tensor":
        return torch.zeros(3)
    else:
        raise KeyError(how)
    return content


DAMAGE = ["empty", "cut", "cut by one byte", "one changed bit", "text", "pickle", "malicious", "malicious zip"]
WRONG_WEIGHTS = ["weight is a number", "weight of another shape", "other weights", "no weights", "a tensor"]
WRONG_STATE = [
    "weight is nan",
    "no streams",
    "streams of another kind",
    "extra is a number",
    "no history",
    "epoch is text",
    "epoch beyond the end",
    "no optimizer",
    "optimizer of another model",
    "no scheduler",
]


def damage(path: Path, how: str, trap: Path) -> None:
    whole = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "cut by one byte":
        path.write_bytes(whole[:-1])
    elif how == "one changed bit":
        ctx = torch.load(path, weights_only=True)["state_dict"]["ctx"].numpy().tobytes()
        path.write_bytes(whole.replace(ctx, bytes([ctx[0] ^ 1]) + ctx[1:], 1))
    elif how == "text":
        path.write_text("a checkpoint")
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {"ctx": [1, 2]}, "epoch": 2}))
    elif how == "malicious":
        path.write_bytes(pickle.dumps({"state_dict": {}, "epoch": 2, "x": Malicious(str(trap))}))
    elif how == "malicious zip":
        torch.save({**torch.load(path, weights_only=True), "x": Malicious(str(trap))}, path)
    else:
        torch.save(spoiled(torch.load(path, weights_only=True), how), path)


# Evaluation reads the weights alone, so the rest of the state may be anything there.
EVALUATED = [*DAMAGE, *WRONG_WEIGHTS, "weight is nan"]


@pytest.mark.parametrize(
    ("how", "way"),
    [(how, way) for how in [*DAMAGE, *WRONG_WEIGHTS, *WRONG_STATE] for way in ("go on", "resume")]
    + [(how, "evaluate") for how in EVALUATED],
)
def test_a_damaged_or_hostile_checkpoint_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, how: str, way: str
) -> None:
    bad, trap = tmp_path / "bad", tmp_path / "trap"
    shutil.copytree(world / "whole", bad)
    (bad / "prompt_learner" / "model-best.pth.tar").unlink()
    path = bad / "prompt_learner" / f"model.pth.tar-{EPOCHS}"
    damage(path, how, trap)
    spoilt = path.read_bytes()
    more = {
        "go on": [],
        "resume": ["--resume", str(bad)],
        "evaluate": ["--eval-only", "--model-dir", str(bad)],
    }[way]
    out = bad if way == "go on" else tmp_path / "out"
    assert cli.main(command(world, out, *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error, error
    assert "\x1b" not in error and "weights_only=False" not in error  # torch's advice is to run the file
    assert not trap.exists()
    assert path.read_bytes() == spoilt  # neither skipped nor written over
    if way != "go on":
        assert not (tmp_path / "out").exists()


def test_the_trap_would_have_sprung(world: Path, tmp_path: Path) -> None:
    # So that the test above cannot pass for want of a working attack.
    path, trap = tmp_path / "model", tmp_path / "trap"
    shutil.copy(world / "whole" / "prompt_learner" / f"model.pth.tar-{EPOCHS}", path)
    damage(path, "malicious zip", trap)
    torch.load(path, weights_only=False)
    assert trap.read_text() == "executed"


@pytest.mark.parametrize("text", ["", "\n", "../config.yaml", "/etc/passwd", "model.pth.tar-77", "model-best.pth.tar", "x-y"])
def test_a_pointer_that_names_no_checkpoint_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    (tmp_path / "out" / "prompt_learner" / "checkpoint").write_text(text)
    assert cli.main(command(world, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint" in error


@pytest.mark.parametrize("text", ["", "nonsense", "[1", "OPTIM: 3\n", "\0"])
def test_a_configuration_that_cannot_be_read_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    (tmp_path / "out" / "config.yaml").write_text(text)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert cli.main(command(world, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "out") in error
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


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


# ---- writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), Killed()], ids=repr)
@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException, there: bool) -> None:
    path = tmp_path / "folder" / "file"
    if there:
        files.write_text(path, "old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent and temporary != path  # a rename within one file system
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        files.write_atomically(path, write)
    assert helpers.files_below(tmp_path) == (["folder", "folder/file"] if there else ["folder"])
    assert not there or path.read_text() == "old"


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("n")
        assert path.read_text() == "old"
        temporary.write_text("new")

    files.write_atomically(path, write)
    assert path.read_text() == "new" and helpers.files_below(tmp_path) == ["file"]


def test_everything_a_run_writes_for_keeps_goes_through_a_rename(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed, original = set(), os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (renamed.add(Path(b).name), original(a, b))[1])
    quietly(arguments(world, tmp_path / "out", opts=("TEST.COMPUTE_CMAT", "True")))
    there = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    appended = {name for name in there if name in (".lock", "log.txt") or name.startswith("events.")}
    assert there - appended <= renamed
    assert "cmat.pt" in there and not any(name.endswith(".tmp") for name in there)


def test_the_pointer_never_names_a_file_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"state_dict": {}, "epoch": 1}
    checkpoint.save(tmp_path, content)

    def half(content, path):
        Path(path).write_bytes(b"PK")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, {**content, "epoch": 2})
    assert checkpoint.newest(tmp_path).name == "model.pth.tar-1"
    assert helpers.files_below(tmp_path) == ["checkpoint", "model.pth.tar-1"]


def test_find_takes_the_epoch_then_the_best_then_the_newest(tmp_path: Path) -> None:
    inside = tmp_path / "prompt_learner"
    for epoch in (1, 2, 10):
        checkpoint.save(inside, {"state_dict": {}, "epoch": epoch})
    assert checkpoint.find(tmp_path, "prompt_learner", 2).name == "model.pth.tar-2"
    assert checkpoint.find(tmp_path, "prompt_learner", None).name == "model.pth.tar-10"
    with pytest.raises(InputError, match="the nearest there is 10"):
        checkpoint.find(tmp_path, "prompt_learner", 8)
    checkpoint.save(inside, {"state_dict": {}, "epoch": 2}, best=True)
    assert checkpoint.find(tmp_path, "prompt_learner", None).name == "model-best.pth.tar"
    assert (inside / "checkpoint").read_text() == "model.pth.tar-10\n"
