"""IVLP: independent vision-language prompting, the baseline of MaPLe (arXiv 2210.03117) and PromptSRC (2307.06948)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from plpp_reg.clip.deep import VisualPrompts, check_depth, shallow
from plpp_reg.clip.prompts import PromptLearner, first_words
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.method import Batch, Classes, Inputs, Method, Settings, precision, setting


class VisionLanguagePrompts(VisualPrompts):
    """Prompts of both towers' first layers, learned independently."""

    def __init__(self, clip_model: nn.Module, classnames: Sequence[str], config: IVLP.Config) -> None:
        super().__init__(ImageTower(clip_model), config.n_ctx_vision, config.prompt_depth_vision)
        check_depth("PROMPT_DEPTH_TEXT", config.prompt_depth_text, len(clip_model.transformer.resblocks))
        self.prompt_learner = PromptLearner(clip_model, classnames, **first_words(config.n_ctx_text, config.ctx_init))
        self.deep_text = shallow(self, "text_encoder", config.prompt_depth_text, *self.prompt_learner.ctx.shape)
        self.to(self.prompt_learner.ctx.device)


def prompted_features(tower: ImageTower, images: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """(B, 3, H, W), (M, width) for layers 0, 1, ... -> (B, embed_dim), normalised."""
    first, *deep = layers
    return normalize(tower(images, first, deep))


def prompts_of(state: Mapping[str, Tensor], tower: str, encoder: str, first: str) -> dict[str, object]:
    """``n_ctx_<tower>`` and ``prompt_depth_<tower>`` as a checkpoint has them; nothing where it has no first prompt."""
    if first not in state or state[first].dim() != 2:
        return {}
    layers = [name for name in state if re.fullmatch(rf"{encoder}\.transformer\.resblocks\.\d+\.VPT_shallow", name)]
    return {f"n_ctx_{tower}": len(state[first]), f"prompt_depth_{tower}": 1 + len(layers)}


def say_context(say: Callable[[str], object], learner: PromptLearner, words: str) -> None:
    said = f"the first {learner.n_ctx} of {words.replace('_', ' ')!r}" if learner.from_words else f"{learner.n_ctx} at random"
    say(f"Initial text context: {said}")


class IVLP(Method):
    """Learns deep prompts in both towers by cross-entropy alone; without visual prompts the image tower is the frozen one."""

    @dataclass(frozen=True)
    class Config(Settings, node="IVLP"):
        n_ctx_vision: int = setting(2, least=0)
        n_ctx_text: int = setting(2, least=1)
        ctx_init: str = setting("a photo of a")
        prec: str = precision("fp16")
        prompt_depth_vision: int = setting(9, least=0)  # layers with prompts of their own, the first included
        prompt_depth_text: int = setting(9, least=1)

    learns_text_context = True
    model_name = "VLPromptLearner"
    not_loaded = ("image_encoder.", "text_encoder.", "logit_scale", "prompt_learner.ZS_image_encoder.")  # the frozen CLIP
    not_exported = "class_features: they belong with image features that are not the frozen tower's"

    def build(self) -> None:
        self.prompts = VisionLanguagePrompts(self.clip.model, self.classnames, self.config)
        say_context(self.say, self.prompts.prompt_learner, self.config.ctx_init)

    @classmethod
    def settings_of(cls, state: Mapping[str, Tensor]) -> dict[str, object]:
        visual = prompts_of(state, "vision", "image_encoder", "image_encoder.VPT")
        text = prompts_of(state, "text", "text_encoder", "prompt_learner.ctx")
        return {"n_ctx_vision": 0, "prompt_depth_vision": 0, **visual, **text}

    @property
    def saved(self) -> nn.Module:
        return self.prompts

    @property
    def inputs(self) -> Inputs:
        return Inputs(pixels=True) if self.prompts.layers else super().inputs

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        return self.encode(self.prompts.prompt_learner, self.prompts.deep_text, with_states)

    def image_features(self, batch: Batch) -> Tensor:
        layers = self.prompts.layers
        return prompted_features(self.clip.image, batch["img"], layers) if layers else self.frozen_features(batch)
