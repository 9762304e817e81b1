"""What the tests of PromptKD and FDBPL share: a teacher of which all is given, and a trainer that learns from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from plpp_reg.data import DataSplit
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Method
from plpp_reg.engine.teacher import Spoken, Teacher
from plpp_reg.engine.trainer import Trainer

from helpers import engine as helpers
from helpers import methods as mh

TEACHER_WIDTH, TEACHER_SCALE = 80, 17.0  # neither is the student's


def unit(*shape: int, seed: int) -> Tensor:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return features / features.norm(dim=-1, keepdim=True)


def teacher_of(cfg, names: list[str], width: int = TEACHER_WIDTH, scale: float = TEACHER_SCALE) -> Teacher:
    """A teacher that is asked nothing: its class features and its scale are these."""
    teacher = Teacher(cfg, names)
    teacher.spoken = Spoken(unit(len(names), width, seed=11), torch.tensor(scale), {"made up": True}, {})
    return teacher


def build(
    cls: type[Method],
    *opts: object,
    width: int = TEACHER_WIDTH,
    clip_model: nn.Module | None = None,
    data: DataSplit | None = None,
    names: list[str] = mh.NAMES,
) -> Trainer:
    """A quiet trainer on the CPU, from seed 1, whose parameters are shaken."""
    fixed = ("USE_CUDA", False, f"TRAINER.{cls.Config.node}.PREC", "fp32")
    cfg = helpers.make_cfg(*fixed, *opts)
    cfg.TRAINER.NAME = cls.__name__ + ("_PLPP" if cfg.TRAINER.PLPP.ENABLED else "")
    trainer = Trainer(
        cls,
        cfg,
        data=data or mh.no_images(names),
        clip_model=clip_model or mh.clip_of(),
        log=RunLog(quiet=True),
        teacher=teacher_of(cfg, names, width),
    )
    mh.shake(trainer)
    return trainer


def batches(count: int, size: int = 6, width: int = TEACHER_WIDTH) -> list[dict[str, Tensor]]:
    """Of noise, with a teacher's features and without labels."""
    found = helpers.fixed_batches(count, size=size)
    return [{"img": b["img"], "teacher_features": unit(size, width, seed=20 + i)} for i, b in enumerate(found)]


def exact(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in batch.items()}


def assert_half_precision_is_near_float32(
    build: Callable[[str], Trainer], batches: Sequence[dict[str, Tensor]], precision: str
) -> None:
    """Two steps and the logits after them; what is trained stays float32. ``build`` takes a precision."""

    def steps(asked: str) -> tuple[Trainer, list[float], Tensor]:
        trainer = build(asked)
        *learned, last = batches
        losses = [trainer.step(batch)["loss"] for batch in learned]
        with torch.no_grad(), trainer.computing():
            return trainer, losses, helpers.logits_of(trainer, last)

    (trainer, losses, logits), (_, exact, exact_logits) = steps(precision), steps("fp32")
    assert trainer.precision == precision and logits.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trainer.parameters)
    assert losses == pytest.approx(exact, rel=0.05) and losses != exact
    assert (logits - exact_logits).abs().max() < 0.5
