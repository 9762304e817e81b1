"""KgCoOp: knowledge-guided context optimization (arXiv 2303.13283)."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from plpp_reg.data import template
from plpp_reg.engine.trainer import check_weight
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.zeroshot import template_features


class KgCoOp(CoOp):
    """CoOp whose class features are held near those of the hand-crafted template.

    ``L = ce + W * (1 - mean over C of cos(w_c, w_c of the template))``
    """

    config_defaults = {**CoOp.config_defaults, "W": 8.0}

    # upstream makes these in its prompt learner, and uses them nowhere
    not_loaded = ("bias_vectors", "meta_net.linear1.")  # CoCoOp's meta_net has a linear2: its files are not KgCoOp's

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        check_weight("TRAINER.COOP.W", self.method_cfg.W)
        return super().build(clip_model, classnames)

    @functools.cached_property
    def hand_crafted(self) -> Tensor:
        """(C, embed_dim), normalised: the class features of the data set's template."""
        return self.normalize(template_features(self.tower, [template(self.cfg.DATASET.NAME)], self.data.classnames)[0])

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        class_features = self.class_features()
        logits = self.logits(self.image_features(batch), class_features)
        similarity = (class_features * self.hand_crafted).sum(-1)
        return {
            "ce": self.cross_entropy(logits, batch["label"]),
            "kg": self.method_cfg.W * (1 - similarity.mean()),
        }
