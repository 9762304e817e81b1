"""The first stage: both towers together, from random weights. What is kept of it is the image tower."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from embedded_data import Corpus, augment
from embedded_model import EMBED, contrast_loss, image_features, new_clip, next_word_loss, text_features
from embedded_stage import BATCH, PROMPT, Stage, matrices_and_others
from embedded_text import Text, mixed_caption
from torch import Tensor, nn
from torch.nn import functional as F

DROPPED = 0.5  # share of image patches left out of a step, until the last part of training
WHOLE_FROM = 0.92


class Joint(Stage):
    """Contrast with captions, partition into named classes, one proxy an emoji, next words."""

    name = "joint"
    weights = {"contrast": 1.0, "partition": 1.0, "proxy": 0.5, "words": 0.3}
    matrix_rate, rate = 1.5e-3, 1e-3
    warmup, decay_from = 300, 0.6

    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        torch.manual_seed(args.seed)
        text = Text(corpus.emoji, args.seed, mixed_caption)
        super().__init__(args, args.steps, corpus, text, new_clip(len(text.ids)))
        self.proxies = nn.Parameter(torch.randn(len(corpus.emoji), EMBED))
        self.kept = {"proxies": self.proxies.data}
        matrices, others = matrices_and_others(self.model)
        self.optimize(matrices, [([*others, self.proxies], self.rate)])

    def losses(self) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.args.seed, 2, self.step])
        g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
        text, model, corpus = self.text, self.model, self.corpus
        chosen, picture = corpus.draw(BATCH, rng)
        dropped = DROPPED if self.step < WHOLE_FROM * self.steps else 0.0
        images = image_features(model, augment(corpus.pictures[picture], g), g, dropped)
        tokens, true = self.captions(chosen, rng)
        texts, states = text_features(model, tokens)
        scale = model.logit_scale.exp()
        names, class_of = text.partition(rng)
        prompt = ["a photo of a {}.", "a {}.", "{}", "a picture of a {}.", "an emoji of a {}."][rng.integers(5)]
        if rng.random() < 0.4:
            prompt = PROMPT
        classes, _ = text_features(model, text.encode([prompt.format(name) for name in names]))
        target = torch.from_numpy(class_of[text.subgroup_of[chosen]])
        proxy = scale * images @ F.normalize(self.proxies, dim=-1).T
        return {
            "contrast": contrast_loss(scale * images @ texts.T, true),
            "partition": F.cross_entropy(scale * images @ classes.T, target),
            "proxy": F.cross_entropy(proxy, torch.from_numpy(chosen)),
            "words": next_word_loss(model, tokens, states),
        }
