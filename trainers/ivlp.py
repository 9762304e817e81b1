"""IVLP: independent vision-language prompting, the baseline of MaPLe (arXiv 2210.03117) and PromptSRC (2307.06948)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from plpp_reg.clip.deep import check_prompts, random_prompt, register
from plpp_reg.clip.prompts import PromptLearner, encode
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.trainer import PromptTrainer


def first_context(n_ctx: int, ctx_init: str, key: str = "N_CTX") -> dict[str, Any]:
    """PromptLearner's arguments: the first ``n_ctx`` tokens of the init words are learned; where there are not so many, the
    context starts at random."""
    check_prompts(key, n_ctx)
    if ctx_init and n_ctx <= len(encode(ctx_init.replace("_", " "))):
        return {"ctx_init": ctx_init, "n_learned": n_ctx}
    return {"n_ctx": n_ctx}


class VisualPrompts(nn.Module):
    """Prompts of the image tower's first ``depth`` layers, (count, width) each; state_dict names as upstream's."""

    def __init__(self, image_tower: ImageTower, count: int, depth: int, key: str = "PROMPT_DEPTH_VISION") -> None:
        super().__init__()
        check_prompts("N_CTX_VISION", count)
        check_prompts(key, depth, image_tower.depth)
        names = ["VPT", *(f"transformer.resblocks.{layer}.VPT_shallow" for layer in range(1, depth))]
        self.layers = [register(self, f"image_encoder.{name}", random_prompt(count, image_tower.width)) for name in names]


class VisionLanguagePrompts(VisualPrompts):
    """Prompts of both towers' first layers, learned independently."""

    def __init__(self, clip_model: nn.Module, classnames: Sequence[str], cfg) -> None:
        image_tower, blocks = ImageTower(clip_model), clip_model.transformer.resblocks
        super().__init__(image_tower, cfg.N_CTX_VISION, cfg.PROMPT_DEPTH_VISION)
        check_prompts("PROMPT_DEPTH_TEXT", cfg.PROMPT_DEPTH_TEXT, len(blocks))
        self.prompt_learner = PromptLearner(clip_model, classnames, **first_context(cfg.N_CTX_TEXT, cfg.CTX_INIT, "N_CTX_TEXT"))
        shape = self.prompt_learner.ctx.shape
        self.deep_text = [
            register(self, f"text_encoder.transformer.resblocks.{layer}.VPT_shallow", random_prompt(*shape))
            for layer in range(1, cfg.PROMPT_DEPTH_TEXT)
        ]
        self.to(self.prompt_learner.ctx.device)


class IVLP(PromptTrainer):
    """Learns deep prompts in both towers by cross-entropy alone."""

    config_node = "IVLP"
    config_defaults = {
        "N_CTX_VISION": 2,
        "N_CTX_TEXT": 2,
        "CTX_INIT": "a photo of a",
        "PREC": "fp16",
        "PROMPT_DEPTH_VISION": 9,  # layers with prompts of their own, the first included
        "PROMPT_DEPTH_TEXT": 9,
    }
    learns_text_context = True
    sees_frozen_features = False
    model_name = "VLPromptLearner"
    not_loaded = ("image_encoder.", "text_encoder.", "logit_scale", "prompt_learner.ZS_image_encoder.")  # the frozen CLIP

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        prompts = VisionLanguagePrompts(clip_model, classnames, self.method_cfg)
        self.say_context(prompts.prompt_learner)
        return prompts

    def say_context(self, learner: PromptLearner) -> None:
        words = self.method_cfg.CTX_INIT.replace("_", " ")
        said = f"the first {learner.n_ctx} of {words!r}" if learner.from_words else f"{learner.n_ctx} at random"
        self.log(f"Initial text context: {said}")

    def trained(self) -> list[nn.Parameter]:
        return list(self.prompts.parameters())

    @property
    def learner(self) -> PromptLearner:
        return self.prompts.prompt_learner

    def deep_context(self) -> Sequence[Tensor]:
        return self.prompts.deep_text

    def image_prompts(self) -> Sequence[Tensor]:
        """(M, width) for layers 0, 1, ... of the image tower."""
        return self.prompts.layers

    def image_features(self, batch: dict[str, Tensor]) -> Tensor:
        first, *deep = self.image_prompts()
        return self.normalize(self.image_tower(batch["img"], first, deep))

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        w = self.class_features()  # before the images: a text tower in chunks makes them again when images' states are freed
        return {"ce": self.cross_entropy(self.logits(self.image_features(batch), w), batch["label"])}
