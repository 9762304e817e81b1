"""The second stage: a new text tower against the first stage's image tower, which is kept as it is.

Locked-image tuning (Zhai et al. 2022, arXiv 2111.07991), here on image features that are computed once: the
pictures are seen as augmentation shows them in VIEWS epochs.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from embedded_data import Corpus, augment
from embedded_model import contrast_loss, image_features, new_clip, next_word_loss, text_features
from embedded_stage import BATCH, Stage, matrices_and_others
from embedded_text import Text, plain_caption
from torch import Tensor, nn

VIEWS = 8
HEAD_GAIN = 4.0  # of ln_final at the start: words this short need long states, or no next word could be likely
DROPOUT = 0.1  # of what each residual block adds


class Locked(Stage):
    """Contrast of pictures with captions, and next words; no class is ever asked for by a hand-written prompt."""

    name = "text"
    weights = {"contrast": 1.0, "words": 0.3}
    # Slow word vectors stay as small as a prompt learner's first context vectors are (std 0.02), as CLIP's are: where they
    # grow, so does the number of steps that CoOp needs.
    matrix_rate, rate, word_rate = 2e-3, 2e-3, 5e-4
    warmup, decay_from = 100, 0.5

    def __init__(self, args: argparse.Namespace, corpus: Corpus, image_tower: nn.Module) -> None:
        torch.manual_seed(args.seed)
        text = Text(corpus.emoji, args.seed, plain_caption)
        model = new_clip(len(text.ids), args.text_width)
        model.visual = image_tower.requires_grad_(False)
        nn.init.constant_(model.ln_final.weight, HEAD_GAIN)
        super().__init__(args, args.text_steps, corpus, text, model)
        matrices, others = matrices_and_others(model)
        words = model.token_embedding.weight
        self.optimize(matrices, [([p for p in others if p is not words], self.rate), ([words], self.word_rate)])
        self.views = self.features(args.work / "views.pt")

    def features(self, store: Path) -> Tensor:
        """(VIEWS, pictures, embedding) unit features of the training pictures, computed once and kept in `store`."""
        if not store.exists():
            start = time.monotonic()
            views = []
            with torch.no_grad():
                for view in range(VIEWS):
                    g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + view)
                    parts = self.corpus.pictures.split(BATCH)
                    views.append(torch.cat([image_features(self.model, augment(part, g)) for part in parts]))
            partial = store.with_suffix(".part")
            torch.save(torch.stack(views), partial)
            os.replace(partial, store)
            print(f"features of {VIEWS} views: {time.monotonic() - start:.0f} s", flush=True)
        return torch.load(store, weights_only=True)

    def losses(self) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.args.seed, 3, self.step])
        chosen, picture = self.corpus.draw(BATCH, rng)
        images = self.views[rng.integers(VIEWS, size=BATCH), picture]
        tokens, true = self.captions(chosen, rng)
        torch.manual_seed(self.args.seed * 1_000_003 + self.step)  # for dropout
        texts, states = text_features(self.model, tokens, DROPOUT)
        return {
            "contrast": contrast_loss(self.model.logit_scale.exp() * images @ texts.T, true),
            "words": next_word_loss(self.model, tokens, states),
        }
