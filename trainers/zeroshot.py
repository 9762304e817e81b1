"""Zero-shot CLIP: one hand-crafted template a data set, nothing learned (arXiv 2103.00020)."""

from __future__ import annotations

from torch import Tensor, nn

from plpp_reg.clip.prompts import encode_texts
from plpp_reg.datasets import template
from plpp_reg.engine.trainer import PromptTrainer


class ZeroshotCLIP(PromptTrainer):
    """The baseline that every prompt learner is measured against."""

    def build(self, clip_model: nn.Module, classnames: list[str]) -> None:
        pattern = template(self.cfg.DATASET.NAME)
        self.texts = [pattern.format(name.replace("_", " ")) for name in classnames]
        self.log(f"Prompts: {self.texts[0]!r}, …")

    def class_features(self) -> Tensor:
        return self.normalize(encode_texts(self.tower, self.texts))
