"""VPT: visual prompt tuning of CLIP's image tower (arXiv 2203.12119), as MaPLe's baseline has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from plpp_reg.clip.deep import VisualPrompts
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.method import Batch, Classes, Inputs, Method, Settings, precision, setting
from plpp_reg.engine.zero_shot import template_features
from plpp_reg.trainers.ivlp import IVLP, prompted_features, prompts_of


class VPT(Method):
    """Learns visual prompts; the class features are those of ``CTX_INIT``, a fixed text."""

    @dataclass(frozen=True)
    class Config(Settings, node="VPT"):
        n_ctx_vision: int = setting(2, least=1)
        ctx_init: str = setting("a photo of a")
        prec: str = precision("fp16")
        prompt_depth_vision: int = setting(1, least=1)  # layers with prompts of their own, the first included

    splits_classes = False
    not_loaded = IVLP.not_loaded
    not_exported = IVLP.not_exported
    inputs = Inputs(pixels=True)

    def build(self) -> None:
        pattern = self.config.ctx_init.replace("_", " ") + " {}."
        self.fixed_text = normalize(template_features(self.clip.text, [pattern], self.classnames)[0])  # (C, embed_dim)
        self.prompts = VisualPrompts(self.clip.image, self.config.n_ctx_vision, self.config.prompt_depth_vision)
        self.prompts.to(self.fixed_text.device)

    @classmethod
    def settings_of(cls, state: Mapping[str, Tensor]) -> dict[str, object]:
        return prompts_of(state, "vision", "image_encoder", "image_encoder.VPT")

    @property
    def saved(self) -> nn.Module:
        return self.prompts

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        return Classes(self.fixed_text)

    def image_features(self, batch: Batch) -> Tensor:
        return prompted_features(self.clip.image, batch["img"], self.prompts.layers)
