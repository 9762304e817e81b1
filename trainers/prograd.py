"""ProGrad: prompt-aligned gradient (arXiv 2205.14865)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plpp_reg.engine.method import Batch, Classes, setting
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.kgcoop import KgCoOp


def align(domain: Tensor, general: Tensor, strength: float = 1.0) -> Tensor:
    """The domain gradient without its part against the general one.

    ``g - strength * (g . u) u`` with ``u = general / |general|`` where ``g . u < 0``, else ``g``. Both of the same shape.
    """
    unit = general / general.norm().clamp_min(torch.finfo(general.dtype).tiny)
    along = (domain * unit).sum()
    return domain - strength * along.clamp_max(0) * unit


class ProGrad(CoOp):
    """CoOp whose gradient never goes against zero-shot CLIP's predictions.

    Two losses: ``ce``, and ``kl``, the cross-entropy of the logits under the zero-shot distribution at temperature LOSS.T,
    times T^2. Only ce's gradient moves the context, after :func:`align` with kl's, LOSS.LAMBDA strong. PLPP's terms join ce
    before that: with LAMBDA 1 no gradient goes against the zero-shot predictions, whatever it is made of, and two backward
    passes do for any number of losses.
    """

    @dataclass(frozen=True)
    class Config(CoOp.Config):  # its own keys where its own code has them
        t: float = setting(1.0, above=0, key="LOSS.T")
        strength: float = setting(1.0, least=0, key="LOSS.LAMBDA")
        dataset: str = setting("", key="DATASET.NAME")  # which names the template
        template: str = setting("", key="DATASET.TEMPLATE")  # one's own in its place

    apart = ("kl",)
    hand_crafted = KgCoOp.hand_crafted

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        images, t = self.image_features(batch), self.config.t
        logits = self.cosines(images, classes.features)
        with torch.no_grad():
            zero_shot = (self.cosines(images, self.hand_crafted).float() / t).softmax(-1)
        return {
            "ce": self.cross_entropy(logits, batch["label"]),
            "kl": -(zero_shot * (logits.float() / t).log_softmax(-1)).sum(-1).mean() * t**2,
        }

    def gradients(self, rest: list[Tensor], apart: dict[str, list[Tensor]]) -> list[Tensor]:
        return [align(g, general, self.config.strength) for g, general in zip(rest, apart["kl"], strict=True)]
