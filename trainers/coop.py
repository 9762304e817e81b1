"""CoOp: context optimization (arXiv 2109.01134)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from plpp_reg.clip.prompts import POSITIONS, PromptLearner
from plpp_reg.engine.method import Method, Settings, precision, setting


class CoOp(Method):
    """Learns M context vectors, shared or class-specific, by cross-entropy alone."""

    @dataclass(frozen=True)
    class Config(Settings, node="COOP"):
        n_ctx: int = setting(16, least=1)
        csc: bool = setting(False)  # class-specific context
        ctx_init: str = setting("")
        prec: str = precision("fp16")
        class_token_position: str = setting("end", choices=POSITIONS)

    learns_text_context = True
    not_exported = ""

    def build(self) -> None:
        c = self.config
        self.prompt_learner = PromptLearner(
            self.clip.model, self.classnames, c.n_ctx, c.ctx_init, c.class_token_position, class_specific=c.csc
        )

    @classmethod
    def settings_of(cls, state: Mapping[str, Tensor]) -> dict[str, object]:
        ctx = state.get("ctx")
        # without words: they are where a context starts, and this one has been trained
        return {} if ctx is None else {"n_ctx": ctx.shape[-2], "csc": ctx.dim() == 3, "ctx_init": ""}

    @property
    def saved(self) -> nn.Module:
        return self.prompt_learner

    @property
    def bound_to_classes(self) -> str:
        if not self.config.csc:
            return ""
        return (
            "TRAINER.COOP.CSC: expected shared context (False) to evaluate on other classes than those trained on, got "
            "class-specific context: the new classes have no vectors"
        )
