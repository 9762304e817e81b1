"""PromptKD: unsupervised prompt distillation (arXiv 2403.02781)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from plpp_reg.clip.deep import VisualPrompts
from plpp_reg.clip.load import without_autocast
from plpp_reg.clip.projector import Projector
from plpp_reg.data import DataSplit
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.method import Batch, Classes, Inputs, Method, Settings, precision, setting
from plpp_reg.errors import InputError
from plpp_reg.loss import distillation
from plpp_reg.trainers.ivlp import IVLP


class PromptKD(Method):
    """An image tower that learns to see as a teacher does, from images alone; the class features W are the teacher's.

    ``L = KD_WEIGHT * T^2 / (B C) * sum_b KL(softmax(z^t / T) || softmax(z^s / T))`` with ``z^s = s f^s W^T``, ``z^t = s^t f^t
    W^T``, each with its own scale. The student's features f^s are its prompted image tower's, through the projector.
    """

    @dataclass(frozen=True)
    class Config(Settings, node="PROMPTKD"):
        n_ctx_vision: int = setting(4, least=0)
        prec: str = precision("fp16")
        prompt_depth_vision: int = setting(9, least=0)  # layers with prompts of their own, the first included
        projector: bool = setting(True)
        kd_weight: float = setting(1000.0, least=0)
        temperature: float = setting(1.0, above=0)
        batch: int = setting(32, least=1, key="DATALOADER.TRAIN_X.BATCH_SIZE")

    distils = predicts_by_teacher = True
    model_name = "VLPromptLearner"
    splits_classes = False
    instead_of_plpp = "PLPP trains its teacher, so use PromptKD with TEACHER.RUN a run of PromptSRC_PLPP, say"
    not_loaded = (*IVLP.not_loaded, "VPT_image_trans.conv1.1.num_batches_tracked")
    not_exported = IVLP.not_exported

    def build(self) -> None:
        c, tower = self.config, self.clip.image
        inputs, outputs = tower.visual.output_dim, self.teacher.encoder.width
        if len(self.classnames) < 2:
            raise InputError(f"PromptKD: expected at least 2 classes, which a teacher tells apart, got {len(self.classnames)}")
        if c.projector and self.ranks.size > 1:
            raise InputError(f"PromptKD: expected one process, for batch norm is over a whole batch, got {self.ranks.size}")
        if c.projector and c.batch < 2:
            raise InputError("DATALOADER.TRAIN_X.BATCH_SIZE: expected at least 2, for batch norm is over a batch, got 1")
        if not c.projector and inputs != outputs:
            raise InputError(
                f"TRAINER.PROMPTKD.PROJECTOR: expected True between features {inputs} and {outputs} wide, got False"
            )
        self.student = VisualPrompts(tower, c.n_ctx_vision, c.prompt_depth_vision)
        self.student.VPT_image_trans = Projector(inputs, outputs) if c.projector else None
        self.student.to(self.clip.model.text_projection.device)
        if not list(self.student.parameters()):
            raise InputError("PromptKD: expected visual prompts (N_CTX_VISION, PROMPT_DEPTH_VISION) or PROJECTOR, got neither")

    @property
    def saved(self) -> nn.Module:
        return self.student

    @property
    def inputs(self) -> Inputs:
        own = Inputs(pixels=True) if self.student.layers else super().inputs
        return replace(own, labels=False, training_features={"teacher_features": self.teacher.encoder})

    def split(self, data: DataSplit) -> DataSplit:
        if self.config.projector and len(data.train) == 1:
            raise InputError("PromptKD: expected at least 2 images for training, for batch norm is over a batch, got 1")
        return data

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        return Classes(self.teacher.class_features)

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        c, student = self.config, self.cosines(self.image_features(batch, training=True), classes.features)
        return {"kd": c.kd_weight * distillation.kd(student, self.teacher.logits(batch["teacher_features"]), c.temperature)}

    def image_features(self, batch: Batch, training: bool = False) -> Tensor:
        """(B, E of the teacher), normalised. ``training``: with batch norm by the batch's own statistics."""
        first, *deep = self.student.layers or [None]
        features = self.frozen_features(batch) if first is None else self.clip.image(batch["img"], first, deep)
        projector = self.student.VPT_image_trans
        with without_autocast(features.device):  # in float32, as its parameters are
            return normalize(features if projector is None else projector(features.float(), training))
