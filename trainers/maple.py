"""MaPLe: multi-modal prompt learning (arXiv 2210.03117)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from plpp_reg.clip.deep import check_depth, random_prompt
from plpp_reg.clip.prompts import PromptLearner, first_words
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.method import Batch, Classes, Inputs, Method, Settings, precision, setting
from plpp_reg.trainers.ivlp import IVLP, prompted_features, say_context


class MultiModalPromptLearner(PromptLearner):
    """Text prompts of the first ``depth`` layers, and for each a linear map that makes the image tower's of them."""

    def __init__(self, clip_model: nn.Module, classnames: Sequence[str], n_ctx: int, ctx_init: str, depth: int) -> None:
        super().__init__(clip_model, classnames, **first_words(n_ctx, ctx_init))
        image_tower = ImageTower(clip_model)
        check_depth("PROMPT_DEPTH", depth, min(len(clip_model.transformer.resblocks), image_tower.depth))
        shape, widths = self.ctx.shape, (self.ctx.shape[1], image_tower.width)
        self.proj = nn.Linear(*widths)
        self.compound_prompts_text = nn.ParameterList(random_prompt(*shape) for _ in range(depth - 1))
        self.compound_prompt_projections = nn.ModuleList(nn.Linear(*widths) for _ in range(depth - 1))
        for projection in self.compound_prompt_projections:  # upstream copies one layer, so all of them start the same
            projection.load_state_dict(self.compound_prompt_projections[0].state_dict())
        self.to(self.ctx.device)

    def image_prompts(self) -> list[Tensor]:
        """(M, width) for layers 0, 1, ... of the image tower."""
        deep = zip(self.compound_prompt_projections, self.compound_prompts_text, strict=True)
        return [self.proj(self.ctx), *(projection(prompt) for projection, prompt in deep)]


class MaPLe(Method):
    """Deep prompts in both towers, as IVLP's, whose visual ones are linear maps of the text prompts, layer by layer."""

    @dataclass(frozen=True)
    class Config(Settings, node="MAPLE"):
        n_ctx: int = setting(2, least=1)
        ctx_init: str = setting("a photo of a")
        prec: str = precision("fp16")
        prompt_depth: int = setting(9, least=1)  # layers with prompts of their own, the first included

    learns_text_context = True
    model_name = "MultiModalPromptLearner"
    not_loaded = IVLP.not_loaded
    not_exported = IVLP.not_exported
    inputs = Inputs(pixels=True)

    def build(self) -> None:
        c = self.config
        self.prompt_learner = MultiModalPromptLearner(self.clip.model, self.classnames, c.n_ctx, c.ctx_init, c.prompt_depth)
        say_context(self.say, self.prompt_learner, c.ctx_init)

    @classmethod
    def settings_of(cls, state: Mapping[str, Tensor]) -> dict[str, object]:
        deep = [name for name in state if re.fullmatch(r"prompt_learner\.compound_prompts_text\.\d+", name)]
        ctx = state.get("prompt_learner.ctx")
        return {} if ctx is None else {"n_ctx": len(ctx), "prompt_depth": 1 + len(deep)}

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        return self.encode(self.prompt_learner, list(self.prompt_learner.compound_prompts_text), with_states)

    def image_features(self, batch: Batch) -> Tensor:
        return prompted_features(self.clip.image, batch["img"], self.prompt_learner.image_prompts())
