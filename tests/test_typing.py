"""A script of a user's that names what is public passes mypy --strict, and so does the room of the loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
from dataclasses import dataclass

import torch
from torch import Tensor

from plpp_reg import Components, Handle, PerplexityRegularizer, __version__, attach, with_plpp
from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.data import DataSplit, Datum, load_dataset
from plpp_reg.engine.frozen import FrozenEncoder
from plpp_reg.engine.method import Classes, ContextSet, Inputs, Method, Settings, setting
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.trainer import NonFiniteLoss, Trainer
from plpp_reg.errors import InputError
from plpp_reg.results.record import harmonic_mean, paired, read_result, summary


class Base:
    def build_model(self) -> None: ...

    def forward_backward(self, batch: object) -> dict[str, float]:
        return {}


Base_PLPP = with_plpp(Base)


@with_plpp
class Own(Base):
    pass


losses: dict[str, float] = Base_PLPP().forward_backward(None) | Own().forward_backward(None)


class Smooth(Method):
    @dataclass(frozen=True)
    class Config(Settings, node="SMOOTH"):
        n_ctx: int = setting(4, least=1)

    config: Config

    def build(self) -> None:
        self.prompt_learner = PromptLearner(self.clip.model, self.classnames, n_ctx=self.config.n_ctx)

    def losses(self, batch: dict[str, Tensor], classes: Classes) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(self.logits(batch, classes), batch["label"])}


regularizer = PerplexityRegularizer(torch.eye(100, 8))
parts: Components = regularizer.components(torch.randn(4, 8), torch.randn(4, 8))
model = torch.nn.Linear(2, 2)
handle: Handle = attach(model, regularizer)
"""


def mypy(what: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", folder / "cache", *what]
    return subprocess.run(command, cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)


def test_a_users_script_and_the_loss_are_typed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = mypy(["script.py", ROOT / "plpp_reg" / "loss"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
