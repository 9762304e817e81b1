"""A teacher without numbers: what it says has its shapes, and what it computes can be counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from yacs.config import CfgNode

from plpp_reg.clip.architectures import clip_without_weights
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.method import Backbone
from plpp_reg.engine.teacher import Loaded, MethodEncoder, Spoken, Teacher


class TeacherWithoutNumbers(Teacher):
    """The teacher that ``cfg.TEACHER`` names, on a CLIP without weights: nothing of its backbone is read.

    Args:
        cfg: the student's configuration.
        classnames: C names.
        student: the student's CLIP without weights, which serves a teacher on the same backbone.
    """

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], student: nn.Module) -> None:
        super().__init__(cfg, classnames)
        named = self.named
        name = named.cfg.MODEL.BACKBONE.NAME
        model = student if name == cfg.MODEL.BACKBONE.NAME else clip_without_weights(name)
        own = TeacherWithoutNumbers(named.cfg, classnames, model) if named.cls.distils else None
        method = named.cls(named.config, Backbone(model, TextTower(model), ImageTower(model)), classnames, teacher=own)
        encoder = MethodEncoder(method) if method.not_exported else method.frozen
        side = model.visual.input_resolution
        self.loaded = Loaded(method.requires_grad_(False), encoder, {"SIZE": (side, side)})
        self.class_features = torch.empty(len(classnames), model.text_projection.shape[1], device="meta")
        self.scale = torch.empty((), device="meta")
        self.spoken = Spoken(self.class_features, self.scale, {}, self.loaded.input)
