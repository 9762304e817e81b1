"""ProGrad: prompt-aligned gradient (arXiv 2205.14865)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plpp_reg.engine.trainer import check_weight
from plpp_reg.errors import InputError
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

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        if not self.cfg.LOSS.T > 0:
            raise InputError(f"LOSS.T: expected a number > 0, got {self.cfg.LOSS.T}")
        check_weight("LOSS.LAMBDA", self.cfg.LOSS.LAMBDA)
        return super().build(clip_model, classnames)

    hand_crafted = KgCoOp.hand_crafted

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, t = self.image_features(batch), self.cfg.LOSS.T
        logits = self.logits(images, self.class_features())
        with torch.no_grad():
            zero_shot = (self.logits(images, self.hand_crafted).float() / t).softmax(-1)
        return {
            "ce": self.cross_entropy(logits, batch["label"]),
            "kl": -(zero_shot * (logits.float() / t).log_softmax(-1)).sum(-1).mean() * t**2,
        }

    def backward(self, losses: dict[str, Tensor]) -> None:
        general = torch.autograd.grad(self.scaler.scale(losses["kl"]), self.trained(), retain_graph=True)
        self.ranks.average(general)
        super().backward({name: loss for name, loss in losses.items() if name != "kl"})
        for p, g in zip(self.trained(), general, strict=True):
            p.grad = align(p.grad, g, self.cfg.LOSS.LAMBDA)
