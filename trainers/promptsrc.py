"""PromptSRC: self-regulating prompts (arXiv 2307.06948)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plpp_reg.data.templates import SIXTY
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.method import Batch, Classes, Inputs, setting
from plpp_reg.engine.zero_shot import template_features
from plpp_reg.trainers.ivlp import IVLP


class PromptSRC(IVLP):
    """IVLP held to the frozen CLIP's features and predictions, and averaged over its epochs.

    With w, f the prompted class and image features and w0, f0 the frozen ones, all normalised (w0: of the mean over 60
    templates), and the mean absolute difference ``l1``::

        L = ce + TEXT_LOSS_WEIGHT * l1(w, w0) + IMAGE_LOSS_WEIGHT * l1(f, f0) + KL(softmax(s f0 w0) || softmax(s f w)) / C

    the last being the mean over B. At the end of the training the parameters are the average of those after each epoch, with
    weights of a Gaussian (mean GPA_MEAN, standard deviation GPA_STD epochs).
    """

    @dataclass(frozen=True)
    class Config(IVLP.Config, node="PROMPTSRC"):
        n_ctx_vision: int = setting(4, least=0)
        n_ctx_text: int = setting(4, least=1)
        text_loss_weight: float = setting(25.0, least=0)
        image_loss_weight: float = setting(10.0, least=0)
        gpa_mean: float = setting(15.0)
        gpa_std: float = setting(1.0, above=0)
        epochs: int = setting(10, least=1, key="OPTIM.MAX_EPOCH")

    def build(self) -> None:
        c = self.config
        exponents = [-((epoch - c.gpa_mean) ** 2) / (2 * c.gpa_std**2) for epoch in range(1, c.epochs + 1)]
        # from the largest: far from the mean, all of them would be 0
        gauss = [math.exp(exponent - max(exponents)) for exponent in exponents]
        self.epoch_weights = [g / sum(gauss) for g in gauss]
        super().build()
        self.average = {name: torch.zeros_like(p) for name, p in self.saved.state_dict().items()}

    @property
    def inputs(self) -> Inputs:
        return replace(super().inputs, training_features={"features": self.frozen})

    @functools.cached_property
    def frozen_class_features(self) -> Tensor:
        """(C, embed_dim), normalised: of the mean over the 60 templates."""
        return normalize(template_features(self.clip.text, SIXTY, self.classnames).float().mean(0))

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        c, w, w0 = self.config, classes.features, self.frozen_class_features
        f, f0 = self.image_features(batch), self.frozen_features(batch)
        logits = self.cosines(f, w)
        log_p, log_p0 = logits.float().log_softmax(1), self.cosines(f0, w0).float().log_softmax(1)
        return {
            **self.fit(logits, batch),
            "scl_text": c.text_loss_weight * F.l1_loss(w, w0),
            "scl_image": c.image_loss_weight * F.l1_loss(f, f0),
            "scl_logits": F.kl_div(log_p, log_p0, reduction="sum", log_target=True) / logits.numel(),
        }

    def end_epoch(self, epoch: int) -> None:
        weight = self.epoch_weights[epoch - 1]
        for name, value in self.saved.state_dict().items():
            self.average[name] += weight * value
        if epoch == self.config.epochs:
            self.saved.load_state_dict(self.average)

    def method_state(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_method_state(self, state: dict[str, Any]) -> None:
        for name, value in self.average.items():
            value.copy_(state["average"][name])
