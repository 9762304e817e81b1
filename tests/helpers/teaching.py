"""A teacher and its students on small pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from plpp_reg.data import DATASETS, DatasetEntry, DataSplit
from plpp_reg.engine.method import Classes, Inputs
from plpp_reg.engine.run import RunArguments
from plpp_reg.engine.teacher import Teacher
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers.coop import CoOp

from helpers import engine as helpers
from helpers.engine import quietly

KEPT = ("FEATURES.MAX_GIB", 1.0)
ZERO_SHOT = ("TEACHER.TRAINER", "ZeroshotCLIP")
PROMPTKD = ("TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", 1, "TRAINER.PROMPTKD.PREC", "fp32")


class Follows(CoOp):
    """Learns to say what its teacher says, by squares: the least that a student can be."""

    distils = True

    @property
    def inputs(self) -> Inputs:
        return replace(super().inputs, labels=False, training_features={"teacher_features": self.teacher.encoder})

    def losses(self, batch: dict[str, Tensor], classes: Classes) -> dict[str, Tensor]:
        difference = self.logits(batch, classes) - self.teacher.logits(batch["teacher_features"])
        return {"squares": difference.pow(2).mean() / 100}


STUDENT = f"{Follows.__module__}:Follows"


def make_world(world: Path) -> Path:
    """Pictures, two backbones, and the finished run of a teacher on the other one."""
    helpers.make_images(world / "data")
    helpers.write_backbone(world / "tiny.pt")
    helpers.write_backbone(world / "other.pt", seed=1)
    helpers.write_recipe(world / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
        for name, trainer in (("coop", "CoOp"), ("ivlp", "IVLP")):
            opts = ("TRAINER.IVLP.PROMPT_DEPTH_VISION", "1", "TRAINER.IVLP.PROMPT_DEPTH_TEXT", "2")
            quietly(arguments(world, name, trainer, *opts, backbone="other.pt"))
        quietly(arguments(world, "base", "CoOp", "DATASET.SUBSAMPLE_CLASSES", "base", backbone="other.pt"))
    return world


def arguments(world: Path, out: str | Path, trainer: str = STUDENT, *opts: object, backbone: str = "tiny.pt") -> RunArguments:
    return RunArguments(
        trainer=trainer,
        root=str(world / "data"),
        output_dir=str(world / out),
        config_file=str(world / "recipe.yaml"),
        backbone=str(world / backbone),
        opts=tuple(map(str, opts)),
    )


def student(data: DataSplit, *opts: object) -> Trainer:
    return helpers.make_trainer(data, *opts, cls=Follows)


def teacher_of(data: DataSplit, *opts: object) -> Teacher:
    cfg = helpers.make_cfg(*opts)
    cfg.MODEL.BACKBONE.NAME = "tiny"
    return Teacher(cfg, data.classnames, clip_model=helpers.tiny_clip())


def pixels(count: int = 3) -> Tensor:
    return helpers.fixed_batches(1, count)[0]["img"]
