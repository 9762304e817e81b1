"""CoOp: context optimization (arXiv 2109.01134)."""

from __future__ import annotations

from torch import Tensor, nn

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError


class CoOp(PromptTrainer):
    """Learns M context vectors, shared or class-specific, by cross-entropy alone."""

    config_node = "COOP"
    config_defaults = {
        "N_CTX": 16,
        "CSC": False,  # class-specific context
        "CTX_INIT": "",
        "PREC": "fp16",
        "CLASS_TOKEN_POSITION": "end",
    }
    learns_text_context = True
    sees_pixels = False

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module:
        cfg = self.method_cfg
        return PromptLearner(
            clip_model,
            classnames,
            n_ctx=cfg.N_CTX,
            ctx_init=cfg.CTX_INIT,
            position=cfg.CLASS_TOKEN_POSITION,
            class_specific=cfg.CSC,
        )

    def trained(self) -> list[nn.Parameter]:
        return [self.prompts.ctx]

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.logits(self.image_features(batch), self.class_features())
        return {"ce": self.cross_entropy(logits, batch["label"])}

    def check_classes(self, trained_on: list[str] | None) -> None:
        others = self.cfg.DATASET.SUBSAMPLE_CLASSES == "new" or trained_on not in (None, list(self.data.classnames))
        if self.method_cfg.CSC and others:
            raise InputError(
                "TRAINER.COOP.CSC: expected shared context (False) to evaluate on other classes than those trained on, got "
                "class-specific context: the new classes have no vectors"
            )
