"""MaPLe: multi-modal prompt learning (arXiv 2210.03117)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from plpp_reg.clip.deep import check_prompts, random_prompt
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.vision import ImageTower
from plpp_reg.trainers.ivlp import IVLP, first_context


class MultiModalPromptLearner(PromptLearner):
    """Text prompts of the first ``depth`` layers, and for each a linear map that makes the image tower's of them."""

    def __init__(self, clip_model: nn.Module, classnames: Sequence[str], n_ctx: int, ctx_init: str, depth: int) -> None:
        super().__init__(clip_model, classnames, **first_context(n_ctx, ctx_init))
        image_tower = ImageTower(clip_model)
        check_prompts("PROMPT_DEPTH", depth, min(len(clip_model.transformer.resblocks), image_tower.depth))
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


class MaPLe(IVLP):
    """IVLP whose visual prompts are linear maps of the text prompts, layer by layer."""

    config_node = "MAPLE"
    config_defaults = {"N_CTX": 2, "CTX_INIT": "a photo of a", "PREC": "fp16", "PROMPT_DEPTH": 9}
    model_name = "MultiModalPromptLearner"

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        cfg = self.method_cfg
        learner = MultiModalPromptLearner(clip_model, classnames, cfg.N_CTX, cfg.CTX_INIT, cfg.PROMPT_DEPTH)
        self.say_context(learner)
        return nn.ModuleDict({"prompt_learner": learner})

    @property
    def learner(self) -> MultiModalPromptLearner:
        return self.prompts["prompt_learner"]

    def deep_context(self) -> Sequence[Tensor]:
        return list(self.learner.compound_prompts_text)

    def image_prompts(self) -> Sequence[Tensor]:
        return self.learner.image_prompts()
