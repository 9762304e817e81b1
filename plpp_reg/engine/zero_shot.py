"""CLIP's own classifier of a data set's classes, by hand-crafted templates: what every trained prompt is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plpp_reg.clip.load import without_autocast
from plpp_reg.clip.prompts import encode_texts
from plpp_reg.clip.text import TextTower
from plpp_reg.engine.frozen import normalize


@torch.no_grad()
def template_features(tower: TextTower, templates: Sequence[str], classnames: Sequence[str]) -> Tensor:
    """(n_templates, C, embed_dim): the text features of each class in each template, not normalised."""
    names = [name.replace("_", " ") for name in classnames]
    with without_autocast(tower.positional_embedding.device):
        features = encode_texts(tower, [pattern.replace("{}", name) for pattern in templates for name in names])
    return features.unflatten(0, (len(templates), len(names)))


def zero_shot_classes(tower: TextTower, templates: Sequence[str], classnames: Sequence[str]) -> Tensor:
    """(C, embed_dim), normalised: the mean of each class's normalised features in the templates."""
    return normalize(normalize(template_features(tower, templates, classnames)).mean(0))
