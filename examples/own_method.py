"""A method of one's own on the package's engine: CoOp with label smoothing. docs/guide.md says how to run it."""

from torch.nn import functional as F

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.engine.trainer import PromptTrainer


class Smooth(PromptTrainer):
    config_node = "SMOOTH"  # its keys: TRAINER.SMOOTH.N_CTX, …
    config_defaults = {"N_CTX": 4, "EPSILON": 0.1, "PREC": "fp32"}
    learns_text_context = True  # so there is a Smooth_PLPP
    sees_pixels = False  # of an image it reads CLIP's frozen features alone

    def build(self, clip_model, classnames):
        return PromptLearner(clip_model, classnames, n_ctx=self.method_cfg.N_CTX)

    def trained(self):
        return [self.prompts.ctx]

    def compute_losses(self, batch):
        logits = self.logits(self.image_features(batch), self.class_features())
        epsilon = self.method_cfg.EPSILON
        return {"smooth_ce": F.cross_entropy(logits, batch["label"], label_smoothing=epsilon)}
