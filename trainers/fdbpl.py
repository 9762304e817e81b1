"""FDBPL: distillation by region-aware dual prompts (arXiv 2505.18053), as its published code computes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.engine.method import Batch, Classes, Inputs, Method, Settings, precision, setting
from plpp_reg.errors import InputError
from plpp_reg.loss import distillation

POSITIVE, NEGATIVE = "positive", "negative"


class FDBPL(Method):
    """Two contexts of one form, learned without a label from a teacher's predictions of kept crops.

    With z^+, z^- the logits by the positive and the negative context, z^t the teacher's, p their softmax and u the teacher's
    :func:`confidence <plpp_reg.loss.distillation.confidence>` in each crop::

        L = mean u 1/2 (KL(p^t || p^+) + KL(p^+ || p^t)) + mean (1 - u) sum p^- log p^- + COSINE_WEIGHT * mean u cos(z^+, z^-)

    A crop that tells much teaches the positive context as in KDPL; one that tells little makes the negative one's prediction
    flat. ``CASCADE margin`` adds CASCADE_WEIGHT times a second-order term in our reading of the paper's text; the published
    code's own is identically 0 (docs/fidelity.md). The positive context alone predicts.
    """

    @dataclass(frozen=True)
    class Config(Settings, node="FDBPL"):
        n_ctx: int = setting(4, least=1)  # of contexts that start at random
        ctx_init: str = setting("a photo of a")
        negative_init: str = setting("a photo of no")
        prec: str = precision("fp16")
        cosine_weight: float = setting(0.001, least=0)
        cascade: str = setting("none", choices=("none", "margin"))
        cascade_weight: float = setting(0.1, least=0)
        margin: float = setting(distillation.MARGIN, least=0)  # of a difference of cosines
        plpp_on: str = setting(POSITIVE, choices=(POSITIVE, "both"))

    distils = True
    learns_text_context = True
    not_exported = ""
    optional = ("negative.",)  # upstream's code does not save it, and it predicts nothing

    def build(self) -> None:
        c, model, names = self.config, self.clip.model, self.classnames
        if len(names) < 2:
            raise InputError(f"FDBPL: expected at least 2 classes, of which a teacher is more or less sure, got {len(names)}")
        if c.cascade == "margin" and self.ranks.size > 1:
            raise InputError(f"TRAINER.FDBPL.CASCADE margin: expected one process that sees all pairs, got {self.ranks.size}")
        self.prompt_learner = PromptLearner(model, names, c.n_ctx, c.ctx_init)
        self.prompt_learner.negative = PromptLearner(model, names, c.n_ctx, c.negative_init)
        count, others = self.prompt_learner.n_ctx, self.prompt_learner.negative.n_ctx
        if count != others:
            raise InputError(f"TRAINER.FDBPL.NEGATIVE_INIT: expected {count} tokens, as of the positive context, got {others}")

    @property
    def saved(self) -> nn.Module:
        return self.prompt_learner

    @property
    def inputs(self) -> Inputs:
        return replace(super().inputs, labels=False, training_features={"teacher_features": self.teacher.encoder})

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        both = self.encode_together([self.prompt_learner, self.prompt_learner.negative], with_states)
        positive, negative = (classes.features for classes in both)
        named = zip(both, (POSITIVE, NEGATIVE), strict=True)
        contexts = tuple(c._replace(name=name) for classes, name in named for c in classes.contexts)
        return Classes(positive, contexts if self.config.plpp_on == "both" else contexts[:1], (negative,))

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        c, images = self.config, self.image_features(batch)
        teacher = self.cosines(batch["teacher_features"], self.teacher.class_features)
        positive, negative = self.cosines(images, classes.features), self.cosines(images, classes.others[0])
        u = distillation.confidence(teacher)
        self.metrics["confidence"] = u.mean()
        losses = {
            "kd": (u * distillation.symmetric_kl(positive, teacher)).mean(),
            "entropy": ((1 - u) * distillation.negative_entropy(negative)).mean(),
            "cosine": c.cosine_weight * (u * distillation.first_order_cosine(positive, negative)).mean(),
        }
        if c.cascade == "margin":
            differences = (positive - negative) / self.clip.model.logit_scale.exp()
            losses["margin"] = c.cascade_weight * distillation.margin(differences, teacher, c.margin)
        return losses
