"""A method with two context sets: one says what an image shows, one what it does not. PLPP reads both.

Class c's logit is its cosine with the first prompt less its cosine with the second, both learned by one cross-entropy. Run it
as docs/guide.md runs own_method.py: ``plpp train --trainer examples.two_contexts:Contrast_PLPP``.
"""

from dataclasses import dataclass

import torch

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.engine.method import Classes, Method, Settings, setting


class Contrast(Method):
    @dataclass(frozen=True)
    class Config(Settings, node="CONTRAST"):
        shows: str = setting("a photo of a")
        shows_not: str = setting("a photo of no")
        margin: float = setting(0.1, least=0)  # of the second cosine

    learns_text_context = True

    def build(self):
        self.shows = PromptLearner(self.clip.model, self.classnames, ctx_init=self.config.shows)
        self.shows_not = PromptLearner(self.clip.model, self.classnames, ctx_init=self.config.shows_not)

    def encode_classes(self, image_features=None, with_states=False):
        both = [self.encode(learner, with_states=with_states) for learner in (self.shows, self.shows_not)]
        named = zip(both, ("shows", "shows_not"), strict=True)
        contexts = tuple(c._replace(name=name) for classes, name in named for c in classes.contexts)
        return Classes(torch.stack([classes.features for classes in both]), contexts)  # (2, C, embed_dim)

    def logits(self, batch, classes):
        images, (shows, shows_not) = self.image_features(batch), classes.features
        return self.cosines(images, shows) - self.config.margin * self.cosines(images, shows_not)
