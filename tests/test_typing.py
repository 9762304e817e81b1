"""A script of a user's that names what is public passes mypy --strict, and so does the room of the loss."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# of torch: neither the script nor the loss has a type of these, and torch itself names them in many places
NOT_NAMED = ("_dynamo", "_export", "_functorch", "_higher_order_ops", "_inductor", "_prims", "_refs", "_subclasses")
NOT_NAMED += ("ao", "distributed", "export", "fx", "onnx", "profiler", "testing")
SCRIPT = """
from dataclasses import dataclass

import torch
from torch import Tensor

import plpp_reg.dassl
from plpp_reg import Components, Handle, PerplexityRegularizer, __version__, attach, with_plpp
from plpp_reg.clip import prompts, text, vision
from plpp_reg.clip.embedded import embedded_state_dict
from plpp_reg.clip.load import load_clip
from plpp_reg.clip.vocabulary import NearWord, candidate_ids, nearest_words
from plpp_reg.commands.cli import main
from plpp_reg.data import DataSplit, Datum, load_dataset
from plpp_reg.engine.config import get_cfg_default
from plpp_reg.engine.frozen import FrozenEncoder
from plpp_reg.engine.method import Classes, ContextSet, Inputs, Method, Settings, setting
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.teacher import Teacher
from plpp_reg.engine.trainer import NonFiniteLoss, Trainer
from plpp_reg.errors import InputError
from plpp_reg.loss import distillation, functional
from plpp_reg.results import evaluation
from plpp_reg.results.record import harmonic_mean, paired, read_result, summary
from plpp_reg.trainers import TRAINERS
from plpp_reg.trainers.coop import CoOp


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
        self.prompt_learner = prompts.PromptLearner(self.clip.model, self.classnames, n_ctx=self.config.n_ctx)

    @property
    def inputs(self) -> Inputs:
        return Inputs(features={"features": FrozenEncoder(self.clip.image)})

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        classes = self.encode(self.prompt_learner, with_states=with_states)
        sets: tuple[ContextSet, ...] = classes.contexts
        return Classes(classes.features, sets)

    def losses(self, batch: dict[str, Tensor], classes: Classes) -> dict[str, Tensor]:
        kd = distillation.kd(self.logits(batch, classes), torch.zeros(2, 3))
        return {"ce": self.cross_entropy(self.logits(batch, classes), batch["label"]), "kd": kd}


class Renamed(CoOp):
    model_name = "renamed"


def trained(teacher: Teacher, split: DataSplit, rest: str = "CoOp") -> float:
    datum: Datum = split.train[0]
    cfg = get_cfg_default(Smooth)
    trainer = Trainer(Smooth, cfg, data=split, clip_model=load_clip(), teacher=teacher)
    try:
        trainer.train()
    except NonFiniteLoss:
        return float(datum.label)
    return trainer.test()["accuracy"]


regularizer = PerplexityRegularizer(torch.eye(100, 8))
parts: Components = regularizer.components(torch.randn(4, 8), torch.randn(4, 8))
perplexity: Tensor = functional.perplexity(torch.zeros(3))
model = load_clip()
handle: Handle = attach(model, regularizer)
tower: text.TextTower = text.TextTower(model)
output: text.TextOutput = prompts.PromptLearner(model, ["cat"])(tower)
pixels: Tensor = vision.ImageTower(model)(torch.zeros(1, 3, 32, 32))
words: list[list[NearWord]] = nearest_words(torch.eye(4, 8), torch.eye(100, 8), 2, candidate_ids(model))
weights: dict[str, Tensor] = embedded_state_dict()
names: list[str] = sorted(TRAINERS)
status: int = main(["table", "output"])
try:
    result, trainer = run(RunArguments(trainer="CoOp"))
    found = evaluation.read(read_result("output"))
    line: str = f"{__version__}: {summary([1.0, 2.0])}, {paired([1.0], [2.0])}, {harmonic_mean(1.0, 2.0):.1f}"
except InputError as error:
    print(error, load_dataset("emoji").classnames, found)
"""


def test_the_script_names_what_the_page_calls_public() -> None:
    table = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").partition("| public |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith(("| `plpp_reg", "| `from"))]
    quoted = [words for row in rows for cell in row for words in re.findall("`([^`]+)`", cell)]
    named = {name for words in quoted for name in re.findall(r"\w+", words)}
    assert len(rows) > 9 and {"attach", "NonFiniteLoss", "embedded_state_dict"} <= named
    assert named - {"python", "m", "import", "ValueError"} <= set(re.findall(r"\w+", SCRIPT))


def as_installed(folder: Path) -> Path:
    """The package in a folder where mypy finds it, with plpp_reg.trainers inside, as an installed one has it."""
    package = folder / "site" / "plpp_reg"
    package.mkdir(parents=True)
    for path in (ROOT / "plpp_reg").iterdir():
        (package / path.name).symlink_to(path)
    (package / "trainers").symlink_to(ROOT / "trainers")
    return package


def test_a_users_script_and_the_loss_are_typed(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    package = as_installed(tmp_path)
    unread = ",".join(f"torch.{part}.*" for part in NOT_NAMED)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{unread}]\nfollow_imports = skip\n")
    kept = getattr(pytestconfig, "cache", None)  # what mypy knows of torch, by the content of its files
    cache = kept.mkdir("mypy") if kept else tmp_path / "cache"
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", cache]
    environment = {**os.environ, "MYPYPATH": str(package.parent)}
    done = subprocess.run(
        [*command, "script.py", package / "loss"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
