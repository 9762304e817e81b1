"""Zero-shot CLIP: hand-crafted templates, nothing learned (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import without_autocast
from plpp_reg.clip.prompts import encode_texts
from plpp_reg.clip.text import TextTower
from plpp_reg.data import template
from plpp_reg.data.templates import SEVEN
from plpp_reg.engine.trainer import PromptTrainer


@torch.no_grad()
def template_features(tower: TextTower, templates: Sequence[str], classnames: Sequence[str]) -> Tensor:
    """(n_templates, C, embed_dim): the text features of each class in each template, not normalised."""
    names = [name.replace("_", " ") for name in classnames]
    with without_autocast(tower.positional_embedding.device):
        features = encode_texts(tower, [pattern.replace("{}", name) for pattern in templates for name in names])
    return features.unflatten(0, (len(templates), len(names)))


class ZeroshotCLIP(PromptTrainer):
    """One template a data set: the baseline that every prompt learner is measured against."""

    config_node = "ZEROSHOT"
    config_defaults = {"PREC": "fp32"}
    sees_pixels = False
    splits_classes = False

    def build(self, clip_model: nn.Module, classnames: list[str]) -> None:
        self.templates = self.choose_templates()
        first = classnames[0].replace("_", " ")
        self.log(f"Prompts: {', '.join(repr(t.replace('{}', first)) for t in self.templates)}, …")

    def choose_templates(self) -> list[str]:
        return [template(self.cfg.DATASET.NAME)]

    def class_features(self) -> Tensor:
        features = self.normalize(template_features(self.tower, self.templates, self.data.classnames))
        return self.normalize(features.mean(0))


class ZeroshotCLIP2(ZeroshotCLIP):
    """The mean of several templates' normalised features: OpenAI's seven, and the data set's own except for ImageNet."""

    def choose_templates(self) -> list[str]:
        own = [] if self.cfg.DATASET.NAME == "ImageNet" else [template(self.cfg.DATASET.NAME)]
        return [*SEVEN, *own]
