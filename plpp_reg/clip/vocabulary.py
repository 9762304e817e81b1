"""Reading prompts: which tokens are words, and which words are nearest to a context vector."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.loss import functional as PF

MAX_BYTES = 64 * 2**20  # of the cosines that are held at once


class NearWord(NamedTuple):
    """A word of the vocabulary and its cosine to a context vector."""

    word: str
    cosine: float


@functools.cache
def whole_word_ids() -> Tensor:
    """Ids of the tokens of CLIP's vocabulary that are a whole alphabetic word, sorted, (n,)."""
    from plpp_reg.clip.prompts import tokenizer

    words = [i for token, i in tokenizer().encoder.items() if token.endswith("</w>") and _text(i).isalpha()]
    return torch.tensor(sorted(words))


def _text(token_id: int) -> str:
    """What a token reads like: the encoder's keys are bytes in disguise."""
    from plpp_reg.clip.prompts import tokenizer

    return tokenizer().decode([token_id]).strip()


def candidate_ids(clip_model: nn.Module) -> Tensor | None:
    """The rows that may be a label: for a model some of whose rows were never trained, its trained whole words; else all."""
    trained = getattr(clip_model, "trained_token_ids", None)
    if trained is None:
        return None
    return trained[torch.isin(trained, whole_word_ids())]


def nearest_words(context: Tensor, embedding: Tensor, k: int = 5, candidates: Tensor | None = None) -> list[list[NearWord]]:
    """For each context vector, (M, D) or (P, M, D), its k nearest tokens of CLIP's vocabulary E (V, D), nearest first.

    >>> from plpp_reg.clip.load import load_clip
    >>> from plpp_reg.clip.prompts import PromptLearner
    >>> model = load_clip()
    >>> prompts = PromptLearner(model, ["cat"], ctx_init="a photo of a")
    >>> words = candidate_ids(model)
    >>> for near in nearest_words(prompts.ctx, model.token_embedding.weight, 2, words):
    ...     print(*(f"{word} {cosine:.2f}" for word, cosine in near))
    a 1.00 an 0.57
    photo 1.00 sketch 0.71
    of 1.00 drawing 0.43
    a 1.00 an 0.57
    """
    vectors = context.detach().float().flatten(0, -2)
    rows = embedding.detach().float()
    if candidates is not None:
        rows = rows[candidates.to(rows.device)]
    cosines, ids = PF.search_all(vectors, rows, PF.inverse_norm(rows), k, MAX_BYTES)
    if candidates is not None:
        ids = candidates.to(ids.device)[ids]
    return [
        [NearWord(_text(int(i)), float(c)) for i, c in zip(word_ids, word_cosines, strict=True)]
        for word_ids, word_cosines in zip(ids, cosines, strict=True)
    ]
