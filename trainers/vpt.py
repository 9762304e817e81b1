"""VPT: visual prompt tuning of CLIP's image tower (arXiv 2203.12119), as MaPLe's baseline has it."""

from __future__ import annotations

from torch import Tensor, nn

from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.trainers.ivlp import IVLP, VisualPrompts
from plpp_reg.trainers.zeroshot import template_features


class VPT(PromptTrainer):
    """Learns visual prompts; the class features are those of ``CTX_INIT``, a fixed text."""

    config_node = "VPT"
    config_defaults = {"N_CTX_VISION": 2, "CTX_INIT": "a photo of a", "PREC": "fp16", "PROMPT_DEPTH_VISION": 1}
    sees_frozen_features = False
    splits_classes = False
    not_loaded = IVLP.not_loaded
    image_features = IVLP.image_features
    image_prompts = IVLP.image_prompts
    trained = IVLP.trained
    compute_losses = IVLP.compute_losses

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        cfg = self.method_cfg
        pattern = cfg.CTX_INIT.replace("_", " ") + " {}."
        self.fixed_text = self.normalize(template_features(self.tower, [pattern], classnames)[0])  # (C, embed_dim)
        return VisualPrompts(self.image_tower, cfg.N_CTX_VISION, cfg.PROMPT_DEPTH_VISION).to(self.fixed_text.device)

    def class_features(self) -> Tensor:
        return self.fixed_text
