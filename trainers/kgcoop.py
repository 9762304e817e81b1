"""KgCoOp: knowledge-guided context optimization (arXiv 2303.13283)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from plpp_reg.data import template
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.method import Batch, Classes, setting
from plpp_reg.engine.zero_shot import template_features
from plpp_reg.trainers.coop import CoOp


class KgCoOp(CoOp):
    """CoOp whose class features are held near those of the hand-crafted template.

    ``L = ce + W * (1 - mean over C of cos(w_c, w_c of the template))``
    """

    @dataclass(frozen=True)
    class Config(CoOp.Config):
        w: float = setting(8.0, least=0)
        dataset: str = setting("", key="DATASET.NAME")  # which names the template
        template: str = setting("", key="DATASET.TEMPLATE")  # one's own in its place

    # upstream makes these in its prompt learner, and uses them nowhere
    not_loaded = ("bias_vectors", "meta_net.linear1.")  # CoCoOp's meta_net has a linear2: its files are not KgCoOp's

    @functools.cached_property
    def hand_crafted(self) -> Tensor:
        """(C, embed_dim), normalised: the class features of the data set's template, or of one's own."""
        own = template(self.config.dataset, self.config.template)
        return normalize(template_features(self.clip.text, [own], self.classnames)[0])

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        similarity = (classes.features * self.hand_crafted).sum(-1)
        return {**super().losses(batch, classes), "kg": self.config.w * (1 - similarity.mean())}
