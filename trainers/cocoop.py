"""CoCoOp: conditional context optimization (arXiv 2203.05557)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from plpp_reg.clip.load import without_autocast
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.method import Classes, ContextSet, Method, Settings, precision, setting


class ConditionalPromptLearner(PromptLearner):
    """Context that a meta-net shifts by the image: ``v_m(x) = v_m + meta_net(f(x))``, f the normalised image feature."""

    def __init__(self, clip_model: nn.Module, classnames: Sequence[str], n_ctx: int, ctx_init: str) -> None:
        super().__init__(clip_model, classnames, n_ctx, ctx_init)
        image_width, width = clip_model.visual.output_dim, self.ctx.shape[-1]
        hidden = max(1, image_width // 16)
        layers = {"linear1": nn.Linear(image_width, hidden), "relu": nn.ReLU(), "linear2": nn.Linear(hidden, width)}
        self.meta_net = nn.Sequential(OrderedDict(layers)).to(self.ctx.device)

    def context(self, image_features: Tensor) -> Tensor:
        """(B, embed_dim) -> (B, M, D), float32."""
        with without_autocast(self.ctx.device):
            return self.ctx + self.meta_net(image_features).unsqueeze(1)


class CoCoOp(Method):
    """Each image has its own context, so its own class features; all images of a batch go through the text tower at once."""

    @dataclass(frozen=True)
    class Config(Settings, node="COCOOP"):
        n_ctx: int = setting(16, least=1)
        ctx_init: str = setting("")
        prec: str = precision("fp16")

    learns_text_context = True
    classes_depend_on_image = True
    splits_classes = False
    not_exported = "class_features: the logits are not one set of them against every image"

    def build(self) -> None:
        self.prompt_learner = ConditionalPromptLearner(
            self.clip.model, self.classnames, self.config.n_ctx, self.config.ctx_init
        )

    @classmethod
    def settings_of(cls, state: Mapping[str, Tensor]) -> dict[str, object]:
        return {"n_ctx": state["ctx"].shape[-2]} if "ctx" in state else {}

    @property
    def saved(self) -> nn.Module:
        return self.prompt_learner

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        learner, text = self.prompt_learner, self.clip.text
        if image_features is None:
            return self.encode(learner, with_states=with_states)
        context = learner.context(image_features)
        out = text(learner.tree(text.max_rows(len(image_features))), context, need_hidden=with_states)
        with without_autocast(context.device):
            features = normalize(out.features)  # (B, C, embed_dim)
        return Classes(features, (ContextSet(context, out.hidden),) if with_states else ())
