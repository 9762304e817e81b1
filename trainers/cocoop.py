"""CoCoOp: conditional context optimization (arXiv 2203.05557)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import without_autocast
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.engine.trainer import PromptTrainer


class ConditionalPromptLearner(PromptLearner):
    """Context that a meta-net shifts by the image: ``v_m(x) = v_m + meta_net(f(x))``, f the normalised image feature."""

    def __init__(self, clip_model: nn.Module, classnames: list[str], n_ctx: int, ctx_init: str) -> None:
        super().__init__(clip_model, classnames, n_ctx, ctx_init)
        image_width, width = clip_model.visual.output_dim, self.ctx.shape[-1]
        hidden = max(1, image_width // 16)
        layers = {"linear1": nn.Linear(image_width, hidden), "relu": nn.ReLU(), "linear2": nn.Linear(hidden, width)}
        self.meta_net = nn.Sequential(OrderedDict(layers)).to(self.ctx.device)

    def context(self, image_features: Tensor) -> Tensor:
        """(B, embed_dim) -> (B, M, D), float32."""
        with without_autocast(self.ctx.device):
            return self.ctx + self.meta_net(image_features).unsqueeze(1)


class CoCoOp(PromptTrainer):
    """Each image has its own context, so its own class features; all images of a batch go through the text tower at once."""

    config_node = "COCOOP"
    config_defaults = {"N_CTX": 16, "CTX_INIT": "", "PREC": "fp16"}
    learns_text_context = True
    sees_pixels = False
    splits_classes = False

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        return ConditionalPromptLearner(clip_model, classnames, self.method_cfg.N_CTX, self.method_cfg.CTX_INIT)

    def trained(self) -> list[nn.Parameter]:
        return list(self.prompts.parameters())

    def conditional_logits(self, image_features: Tensor, need_hidden: bool) -> Tensor:
        """(B, embed_dim) -> (B, C): image b against the class features of its own context."""
        context = self.prompts.context(image_features)
        tree = self.prompts.tree(self.tower.max_rows(len(image_features)))
        out = self.tower(tree, context, need_hidden=need_hidden)  # features (B, C, embed_dim)
        self.plpp_reads = context, out.hidden
        with torch.autocast(self.device.type, enabled=False):
            cosines = (self.normalize(out.features) @ image_features.unsqueeze(-1)).squeeze(-1)
            return self.clip_model.logit_scale.exp() * cosines

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.conditional_logits(self.image_features(batch), self.plpp_acts)
        return {"ce": self.cross_entropy(logits, batch["label"])}

    def prepare_inference(self) -> None:
        """Nothing is the same for two images."""

    def inference(self, batch: dict[str, Tensor]) -> Tensor:
        # every image has C features: as many images at once as leave them in a part of the memory bound
        a_image = 4 * len(self.data.classnames) * self.clip_model.text_projection.shape[1]
        at_once = max(1, int(self.tower.memory_mib * 2**20 / 8 / a_image))
        parts = self.image_features(batch).split(at_once)
        return torch.cat([self.conditional_logits(part, need_hidden=False) for part in parts])
