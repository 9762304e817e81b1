"""What context vectors say: the words nearest to each, how near those are, how well CLIP's text tower expects them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.clip.prompts import tokenizer
from plpp_reg.clip.vocabulary import MAX_BYTES, NearWord, candidate_ids, nearest_words
from plpp_reg.loss import functional as PF

SAMPLE = 512  # words whose nearest other word tells how far words lie from each other


class States(NamedTuple):
    """Context vectors as they stand somewhere: v (1 or P, M, D) and the states that PLPP reads for them, h (1 or P, M, D)."""

    context: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, context: Tensor, hidden: Tensor) -> States:
        """In three dimensions and float32; copies, since other weights may be loaded into the same tensors."""
        context = context.detach().float().clone()
        return cls(context if context.dim() == 3 else context.unsqueeze(0), hidden.detach().float().clone())


class Vector(NamedTuple):
    """One context vector."""

    prompt: int
    position: int
    nearest: list[NearWord]
    nearer_than: float  # share of words that lie less near to their nearest other word than this vector to its own
    norm: float
    perplexity: float  # of its nearest word, over the vocabulary
    expected: list[tuple[str, float]]  # the LM head's own words there, and their probabilities


class Reading(NamedTuple):
    """All vectors at one time, and their perplexity together."""

    perplexity: float
    vectors: list[Vector]


class Typical(NamedTuple):
    """Of the vocabulary's words: 5%, 50% and 95% points of the cosine to the nearest other word, and the median norm."""

    cosines: tuple[float, float, float]
    norm: float


class Vocabulary:
    """The words of one CLIP, the ``k`` nearest of which are told of each context vector."""

    def __init__(self, clip_model: nn.Module, k: int) -> None:
        self.table, self.k = clip_model.token_embedding.weight.detach().float(), k
        self.ids = candidate_ids(clip_model)  # of ``rows`` (n, D); None: all of the table's
        self.rows = self.table if self.ids is None else self.table[self.ids]

    def _parts(self, number: int) -> Iterator[slice]:
        """Of so many vectors, as many at a time as may meet all words at once."""
        return PF.parts(number, len(self.rows) * self.rows.element_size(), MAX_BYTES)

    @functools.cached_property
    def inverse_norm(self) -> Tensor:
        return PF.inverse_norm(self.rows)

    @functools.cached_property
    def nearest_other(self) -> Tensor:
        """(n,) of :data:`SAMPLE` words the cosine to the nearest other word, ascending."""
        at = torch.linspace(0, len(self.rows) - 1, min(SAMPLE, len(self.rows)), device=self.rows.device).long()
        found = []
        for part in self._parts(len(at)):
            words = at[part]
            cosines = (F.normalize(self.rows[words], dim=-1) @ self.rows.T).mul_(self.inverse_norm)  # (words, n)
            found.append(cosines.scatter_(1, words.unsqueeze(1), -1.0).amax(1))  # not to the word itself
            del cosines  # before the next part's
        return torch.cat(found).sort().values

    @property
    def typical(self) -> Typical:
        points = [float(self.nearest_other.quantile(q)) for q in (0.05, 0.5, 0.95)]
        return Typical((points[0], points[1], points[2]), float(self.rows.norm(dim=-1).median()))

    def nearest(self, vectors: Tensor) -> list[list[NearWord]]:
        """The words nearest to each of (M, D) vectors."""
        return nearest_words(vectors, self.table, self.k, self.ids)

    def perplexity(self, states: States) -> float:
        """Of all vectors together."""
        return math.exp(self._rows(states).nll.mean())

    def read(self, states: States) -> Reading:
        """Everything, of each vector of each prompt."""
        v, nll, expected = self._rows(states, with_expected=True)
        m = states.context.shape[1]
        vectors = []
        for i, words in enumerate(self.nearest(v)):
            nearer = float((self.nearest_other < words[0].cosine).float().mean())
            vectors.append(Vector(i // m, i % m, words, nearer, float(v[i].norm()), math.exp(nll[i]), expected[i]))
        return Reading(math.exp(nll.mean()), vectors)

    def _rows(self, states: States, with_expected: bool = False) -> _Rows:
        number = max(len(states.context), len(states.hidden))
        v, h = (t.expand(number, -1, -1).flatten(0, 1) for t in states)
        nll, expected = [], []
        for part in self._parts(len(v)):
            log_p = (h[part] @ self.rows.T).log_softmax(-1)
            _, nearest = PF.nearest_words(v[part], self.rows, 1, self.inverse_norm)
            nll.append(-log_p.gather(1, nearest)[:, 0])
            if with_expected:
                top = log_p.topk(self.k)
                ids_of_top = top.indices if self.ids is None else self.ids[top.indices]
                for ids, values in zip(ids_of_top.tolist(), top.values.exp().tolist(), strict=True):
                    expected.append([(tokenizer().decode([i]).strip(), p) for i, p in zip(ids, values, strict=True)])
        return _Rows(v, torch.cat(nll), expected)


class _Rows(NamedTuple):
    """By row: the vector (R, D), its nearest word's negative log-likelihood in nats (R,), the LM head's words if asked for."""

    v: Tensor
    nll: Tensor
    expected: list[list[tuple[str, float]]]
