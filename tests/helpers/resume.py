"""What the tests of killed runs and of their files share: a run that nobody interrupted, and ways to kill one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from plpp_reg.data import DATASETS, DatasetEntry
from plpp_reg.engine.run import RunArguments
from plpp_reg.engine.trainer import Trainer
from plpp_reg.io import files
from plpp_reg.trainers.coop import CoOp

from helpers import engine as helpers
from helpers.engine import quietly

EPOCHS, STEPS = 4, 4  # 25 images in batches of 6
RECIPE = {"OPTIM__MAX_EPOCH": EPOCHS, "TEST__FINAL_MODEL": "best_val", "TRAINER__PLPP": {"WEIGHT": 0.3, "INVERSE_WEIGHT": 0.7}}


class Killed(BaseException):
    """Not an Exception: nothing in the package may catch it, as nothing can catch SIGKILL."""


def make_world(world: Path) -> Path:
    """Pictures, a backbone, a recipe, and a run of it that nobody interrupted, in ``whole``."""
    helpers.make_images(world / "data")
    helpers.write_backbone(world / "tiny.pt")
    helpers.write_recipe(world / "recipe.yaml", **RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        make_tiny_and_noisy(patch)
        quietly(arguments(world, world / "whole"))
    return world


def make_tiny_and_noisy(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    patch.setattr(CoOp, "losses", helpers.noisy_losses)


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
        result.pop("seconds"), result.pop("phases")
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
        patch.setattr(Trainer, "step", dying(Trainer.step))
    elif place == "after step":
        patch.setattr(Trainer, "step", dying(Trainer.step, after=True))
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
