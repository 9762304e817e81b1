"""A method of one's own on the package's engine: CoOp with label smoothing. docs/guide.md says how to run it."""

from dataclasses import dataclass

from torch.nn import functional as F

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.engine.method import Method, Settings, setting


class Smooth(Method):
    @dataclass(frozen=True)
    class Config(Settings, node="SMOOTH"):  # its keys: TRAINER.SMOOTH.N_CTX, …
        n_ctx: int = setting(4, least=1)
        epsilon: float = setting(0.1, least=0, most=1)

    learns_text_context = True  # so there is a Smooth_PLPP
    not_exported = ""  # its class features classify CLIP's own image features

    def build(self):
        self.prompt_learner = PromptLearner(self.clip.model, self.classnames, n_ctx=self.config.n_ctx)

    def losses(self, batch, classes):
        logits = self.logits(batch, classes)
        return {"smooth_ce": F.cross_entropy(logits, batch["label"], label_smoothing=self.config.epsilon)}
