"""What PLPP adds to a training step: operations and bytes from its shapes, seconds from the regularizer itself.

Letters of DESIGN section 1, with ``R`` context vectors (``P M``), ``r = min(R, chunk_size)`` of them at a time::

    operations   4 R K D forward and backward (prediction and label over the K words); where the prediction is over the whole
                 vocabulary, 2 R V D more in each; 8 K D a labelled row, the search among the 4 K words that it remembers,
                 and 2 V D one that is looked up in the vocabulary
    kept         R D + 8 R K; where the prediction is over the vocabulary r V more, and beyond one chunk R D more, while the
                 chunk alone has its 8 r K, and runs forward once more in backward
    working      r V of the cosines, and r (4 K) D of the words that are remembered (on a CPU they are not gathered)

A step looks up the rows that have moved too far from where they were looked up last (loss/nearest.py): all of them where
each image has its own context, few where SGD moves one. :data:`LOOKED_UP` is the share that is assumed of those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from plpp_reg.estimate.operations import Cost
from plpp_reg.estimate.throughput import Machine
from plpp_reg.loss.nearest import KEPT
from plpp_reg.loss.regularizer import PerplexityRegularizer, settings_defaults

LOOKED_UP = 0.1  # of the rows, a step; benchmarks/methods.py measured 0 (CoOp) to 0.25 (MaPLe)


class Rows(NamedTuple):
    """How many vectors PLPP labels in a step, how many it predicts (in P places), and whether each step has new ones."""

    labelled: int
    predicted: int
    new_each_step: bool

    @property
    def looked_up(self) -> float:
        """How many are looked up in the whole vocabulary, in a usual step."""
        return self.labelled * (1.0 if self.new_each_step else LOOKED_UP)


def plpp_cost(regularizer: PerplexityRegularizer, rows: Rows) -> Cost:
    """Operations, and bytes of float32; the formulae stand above. The first step looks up all rows, so ``working`` is its."""
    words, width = regularizer.vocabulary.shape
    k = regularizer.top_k if regularizer.label == "soft" else 1
    over_all = regularizer.normalize_over == "vocabulary"
    at_once = min(rows.predicted, regularizer.chunk_size) if over_all else rows.predicted
    several = at_once < rows.predicted
    term = rows.predicted * width * (4 * k + (2 * words if over_all else 0))
    kept = at_once * (8 * k + (words if over_all else 0)) + rows.predicted * width * (2 if several else 1)
    working = min(rows.labelled, regularizer.chunk_size) * (words + KEPT * k * width)
    search = 2 * width * (rows.labelled * KEPT * k + rows.looked_up * words)
    return Cost(term + search, term * (2 if several else 1), 4 * kept, 4 * working)


def plpp_seconds(regularizer: PerplexityRegularizer, rows: Rows, machine: Machine) -> float:
    """Of a usual step, forward and backward: the regularizer with these settings, timed on random vectors.

    Beyond two chunks of rows, two are timed and the rest is in proportion.

    Args:
        regularizer: the settings and the vocabulary's shape; its tensors need no numbers.
        rows: what it reads.
        machine: what is timed.
    """
    settings = {name: getattr(regularizer, name) for name in settings_defaults()}
    timed = PerplexityRegularizer(torch.rand(regularizer.vocabulary.shape, device=machine.device) - 0.5, **settings)
    most = 2 * regularizer.chunk_size
    labelled, predicted = min(rows.labelled, most), min(rows.predicted, most)
    width = regularizer.vocabulary.shape[1]
    # of one context in P places the places are timed as further vectors: the labels are looked up apart
    v, h = (torch.randn(predicted, width, device=machine.device, requires_grad=True) for _ in range(2))
    searched = torch.randn(labelled, width, device=machine.device)

    def term() -> None:
        timed.components(v, h, with_perplexity=False).total.backward()

    def search() -> None:
        timed.nearest.forget()
        timed.nearest(searched, timed.vocabulary, timed.inverse_norm, timed.top_k, timed.chunk_size)

    a_search = machine.seconds(search) / labelled
    a_term = machine.seconds(term) / predicted  # after the first time every row is remembered
    return a_term * rows.predicted + a_search * rows.looked_up
