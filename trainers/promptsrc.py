"""PromptSRC: self-regulating prompts (arXiv 2307.06948)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.data.templates import SIXTY
from plpp_reg.engine.trainer import check_weight
from plpp_reg.errors import InputError
from plpp_reg.trainers.ivlp import IVLP
from plpp_reg.trainers.zeroshot import template_features


class PromptSRC(IVLP):
    """IVLP held to the frozen CLIP's features and predictions, and averaged over its epochs.

    With w, f the prompted class and image features and w0, f0 the frozen ones, all normalised (w0: of the mean over 60
    templates), and the mean absolute difference ``l1``::

        L = ce + TEXT_LOSS_WEIGHT * l1(w, w0) + IMAGE_LOSS_WEIGHT * l1(f, f0) + KL(softmax(s f0 w0) || softmax(s f w)) / C

    the last being the mean over B. At the end of the training the parameters are the average of those after each epoch, with
    weights of a Gaussian (mean GPA_MEAN, standard deviation GPA_STD epochs).
    """

    config_node = "PROMPTSRC"
    sees_frozen_features = True
    config_defaults = {
        **IVLP.config_defaults,
        "N_CTX_VISION": 4,
        "N_CTX_TEXT": 4,
        "TEXT_LOSS_WEIGHT": 25.0,
        "IMAGE_LOSS_WEIGHT": 10.0,
        "GPA_MEAN": 15.0,
        "GPA_STD": 1.0,
    }

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        cfg, epochs = self.method_cfg, range(1, self.cfg.OPTIM.MAX_EPOCH + 1)
        for key in ("TEXT_LOSS_WEIGHT", "IMAGE_LOSS_WEIGHT"):
            check_weight(f"TRAINER.PROMPTSRC.{key}", cfg[key])
        if not cfg.GPA_STD > 0:
            raise InputError(f"TRAINER.PROMPTSRC.GPA_STD: expected a number > 0, got {cfg.GPA_STD}")
        exponents = [-((epoch - cfg.GPA_MEAN) ** 2) / (2 * cfg.GPA_STD**2) for epoch in epochs]
        # from the largest: far from the mean, all of them would be 0
        gauss = [math.exp(exponent - max(exponents)) for exponent in exponents]
        self.epoch_weights = [g / sum(gauss) for g in gauss]
        prompts = super().build(clip_model, classnames)
        self.average = {name: torch.zeros_like(p) for name, p in prompts.state_dict().items()}
        return prompts

    @functools.cached_property
    def frozen_class_features(self) -> Tensor:
        """(C, embed_dim), normalised: of the mean over the 60 templates."""
        return self.normalize(template_features(self.tower, SIXTY, self.data.classnames).float().mean(0))

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        cfg, w, w0 = self.method_cfg, self.class_features(), self.frozen_class_features
        f, f0 = self.image_features(batch), self.frozen_image_features(batch)
        logits = self.logits(f, w)
        log_p, log_p0 = logits.float().log_softmax(1), self.logits(f0, w0).float().log_softmax(1)
        return {
            "ce": self.cross_entropy(logits, batch["label"]),
            "scl_text": cfg.TEXT_LOSS_WEIGHT * F.l1_loss(w, w0),
            "scl_image": cfg.IMAGE_LOSS_WEIGHT * F.l1_loss(f, f0),
            "scl_logits": F.kl_div(log_p, log_p0, reduction="sum", log_target=True) / logits.numel(),
        }

    def end_epoch(self) -> None:
        weight = self.epoch_weights[self.epoch - 1]
        for name, value in self.prompts.state_dict().items():
            self.average[name] += weight * value
        if self.epoch == self.cfg.OPTIM.MAX_EPOCH:
            self.prompts.load_state_dict(self.average)

    def method_state(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_method_state(self, state: dict[str, Any]) -> None:
        for name, value in self.average.items():
            value.copy_(state["average"][name])
