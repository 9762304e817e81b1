"""Damaged and hostile checkpoints, configurations and programs are refused in one line; nothing is executed or changed."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from plpp_reg.commands import cli

from helpers.resume import EPOCHS, command

pytestmark = pytest.mark.usefixtures("tiny_and_noisy")


@pytest.fixture(scope="module")
def world(resumable: Path) -> Path:
    return resumable


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
    elif how == "history of text":
        extra["history"] = "text"
    elif how == "history without a loss":
        extra["history"][-1].pop(extra["loss_names"][0])
    elif how == "seconds are text":
        extra["seconds"] = "9" * 5000
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
    elif how == "names are numbers":
        content["state_dict"][None] = torch.zeros(2)
    elif how == "sparse weight":
        content["state_dict"]["ctx"] = content["state_dict"]["ctx"].to_sparse()
    elif how == "weight without data":
        content["state_dict"]["ctx"] = content["state_dict"]["ctx"].to("meta")
    elif how == "sparse momentum":
        state = content["optimizer"]["state"][0]
        state["momentum_buffer"] = state["momentum_buffer"].to_sparse()
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
WRONG_WEIGHTS = [
    "names are numbers",
    "sparse weight",
    "weight without data",
    "sparse momentum",
    "weight is a number",
    "weight of another shape",
    "other weights",
    "no weights",
    "a tensor",
]
WRONG_STATE = [
    "history of text",
    "history without a loss",
    "seconds are text",
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
    before = {p: p.read_bytes() for p in bad.rglob("*") if p.is_file()}
    assert bad / "result.json" in before
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
    assert {p: p.read_bytes() for p in bad.rglob("*") if p.is_file()} == before  # the finished run's result too
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


class Program(torch.nn.Module):
    """What torch.jit.save makes an archive of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("kind", ["TorchScript", "pickle"])
@pytest.mark.parametrize("use", ["checkpoint", "initial weights", "backbone"])
def test_a_program_or_a_plain_pickle_is_refused_in_our_own_words(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, use: str
) -> None:
    # The backbone's own TorchScript is read: OpenAI's weights are one. This one holds no weights.
    shutil.copytree(world / "whole", tmp_path / "run")
    folder = tmp_path / "run" / "prompt_learner"
    (folder / "model-best.pth.tar").unlink()
    path = folder / f"model.pth.tar-{EPOCHS}" if use == "checkpoint" else tmp_path / "weights.pt"
    if kind == "TorchScript":
        torch.jit.save(torch.jit.script(Program()), str(path))
    else:
        path.write_bytes(pickle.dumps({"ctx": [1.0]}))
    more = {
        "checkpoint": ["--eval-only", "--model-dir", str(tmp_path / "run")],
        "initial weights": ["MODEL.INIT_WEIGHTS", str(path)],
        "backbone": ["--backbone", str(path)],
    }[use]
    assert cli.main(command(world, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error, error
    assert "weights_only" not in error and "torch.load" not in error and "trust" not in error, error
    reason = "TorchScript archive" if kind == "TorchScript" else "more than tensors and plain values"
    assert reason in error or (use, kind) == ("backbone", "TorchScript"), error
