"""KDPL: knowledge distillation for prompt learning without labels (arXiv 2407.03056), over any method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from plpp_reg.engine.method import Batch, Inputs, Method, Settings, setting
from plpp_reg.errors import InputError
from plpp_reg.loss.distillation import kept_classes, symmetric_kl
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.kgcoop import KgCoOp
from plpp_reg.trainers.maple import MaPLe
from plpp_reg.trainers.promptsrc import PromptSRC
from plpp_reg.trainers.vpt import VPT


class WithoutLabels(Method):
    """A method whose cross-entropy gives way to a distance from its teacher's predictions; its other losses stay.

    With p, p^t the softmax of the student's and of the teacher's cosines, both times the student's scale::

        kd = mean over B of 1/2 KL(p^t || p) + 1/2 KL(p || p^t)

    over all classes, or over the K_MAX that the teacher finds likeliest in the batch, as where the classes are a dictionary.
    """

    @dataclass(frozen=True)
    class Config(Settings):
        k_max: int = setting(0, least=0, key="TRAINER.KDPL.K_MAX")  # 0: all classes

    distils = True

    def build(self) -> None:
        super().build()
        classes, k = len(self.classnames), self.config.k_max
        if classes < 2:
            raise InputError(f"{type(self).__name__}: expected at least 2 classes, which a teacher tells apart, got {classes}")
        if k and not 2 <= k <= classes:
            raise InputError(f"TRAINER.KDPL.K_MAX: expected 2 to {classes} (the classes), or 0 for all of them, got {k}")
        if k and self.ranks.size > 1:
            raise InputError(f"TRAINER.KDPL.K_MAX: expected one process that sees the whole batch, got {self.ranks.size}")

    @property
    def inputs(self) -> Inputs:
        own, teacher = super().inputs, {"teacher_features": self.teacher.encoder}
        return replace(own, labels=False, training_features={**own.training_features, **teacher})

    def fit(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        teacher = self.cosines(batch["teacher_features"], self.teacher.class_features)
        if k := self.config.k_max:
            kept = kept_classes(teacher, k)
            logits, teacher = logits[:, kept], teacher[:, kept]
        return {"kd": symmetric_kl(logits, teacher).mean()}


class CoOp_KDPL(WithoutLabels, CoOp):
    """CoOp by KDPL's loss alone."""

    @dataclass(frozen=True)
    class Config(CoOp.Config, WithoutLabels.Config): ...


class KgCoOp_KDPL(WithoutLabels, KgCoOp):
    """KgCoOp by KDPL's loss, its class features near the template's."""

    @dataclass(frozen=True)
    class Config(KgCoOp.Config, WithoutLabels.Config): ...


class MaPLe_KDPL(WithoutLabels, MaPLe):
    """MaPLe by KDPL's loss alone."""

    @dataclass(frozen=True)
    class Config(MaPLe.Config, WithoutLabels.Config): ...


class VPT_KDPL(WithoutLabels, VPT):
    """VPT by KDPL's loss alone."""

    @dataclass(frozen=True)
    class Config(VPT.Config, WithoutLabels.Config): ...


class PromptSRC_KDPL(WithoutLabels, PromptSRC):
    """PromptSRC by KDPL's loss and its own three of consistency with the frozen CLIP, which read no label."""

    @dataclass(frozen=True)
    class Config(PromptSRC.Config, WithoutLabels.Config): ...
