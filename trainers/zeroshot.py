"""Zero-shot CLIP: hand-crafted templates, nothing learned (arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plpp_reg.data import template
from plpp_reg.data.templates import SEVEN, SIXTY
from plpp_reg.engine.method import Classes, Method, Settings, setting
from plpp_reg.engine.zero_shot import zero_shot_classes


class ZeroshotCLIP(Method):
    """One template a data set: the baseline that every prompt learner is measured against."""

    @dataclass(frozen=True)
    class Config(Settings, node="ZEROSHOT"):
        dataset: str = setting("", key="DATASET.NAME")  # which names the template
        template: str = setting("", key="DATASET.TEMPLATE")  # one's own in its place

    learns = False
    splits_classes = False
    not_exported = ""

    def build(self) -> None:
        self.templates = self.choose_templates()
        first = self.classnames[0].replace("_", " ")
        self.say(f"Prompts: {', '.join(repr(t.replace('{}', first)) for t in self.templates)}, …")

    def choose_templates(self) -> list[str]:
        return [template(self.config.dataset, self.config.template)]

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        return Classes(zero_shot_classes(self.clip.text, self.templates, self.classnames))


class ZeroshotCLIP2(ZeroshotCLIP):
    """The mean of several templates' normalised features: OpenAI's seven, and the data set's own except for ImageNet; or sixty,
    which PromptSRC's code averages."""

    @dataclass(frozen=True)
    class Config(ZeroshotCLIP.Config):
        templates: str = setting("seven", choices=("seven", "sixty"))

    def choose_templates(self) -> list[str]:
        own, given = super().choose_templates(), bool(self.config.template)
        if self.config.templates == "sixty":
            return [*SIXTY, *(own if given else [])]
        return [*SEVEN, *(own if given or self.config.dataset != "ImageNet" else [])]
