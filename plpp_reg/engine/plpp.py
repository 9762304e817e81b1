"""PLPP over every context set that a method has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from plpp_reg.clip.vocabulary import candidate_ids
from plpp_reg.engine.method import ContextSet
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import Components, PerplexityRegularizer
from plpp_reg.loss.settings import regularizer_from

MOST_LOG_PERPLEXITY = 700  # its exp is a float still


def regularizer_for(cfg: CfgNode, clip_model: nn.Module) -> PerplexityRegularizer:
    """PLPP with the settings of ``cfg.TRAINER.PLPP``, over the words of the backbone.

    Raises:
        InputError: a setting out of its range.
    """
    return regularizer_from(cfg.TRAINER.PLPP, clip_model.token_embedding.weight, candidate_ids(clip_model))


class Terms(NamedTuple):
    """PLPP's weighted losses by their names in the log, and log perplexities, of which not all are at hand at every step."""

    losses: dict[str, Tensor]
    log_perplexities: dict[str, Tensor]


class ContextTerms:
    """The terms of a method's context sets, each with a regularizer of its own, which remembers that set's nearest words."""

    def __init__(self, cfg: CfgNode, clip_model: nn.Module) -> None:
        self.cfg, self.clip_model = cfg, clip_model
        self.regularizers = [regularizer_for(cfg, clip_model)]

    @property
    def active(self) -> bool:
        """Whether a weight is above 0; if none is, off is exactly off."""
        return self.regularizers[0].active

    def __call__(self, contexts: Sequence[ContextSet], with_perplexity: bool) -> Terms:
        """Of each set the two losses and the perplexity; the latter costs a pass over the vocabulary unless the losses made it.

        Raises:
            InputError: no context set, though there is a weight.
        """
        if self.active and not contexts:
            raise InputError("PLPP: expected context vectors and their states among the method's classes, got none")
        terms = Terms({}, {})
        for i, context_set in enumerate(contexts if self.active else ()):
            suffix = f"_{context_set.name or i + 1}" if len(contexts) > 1 else ""
            factor = context_set.share * weight_of(context_set, len(contexts))
            losses, perplexity = self._regularizer(i).weighted(context_set.context, context_set.hidden, with_perplexity)
            terms.losses.update({n + suffix: loss if factor == 1 else factor * loss for n, loss in losses.items()})
            if perplexity is not None:  # the same on every rank
                terms.log_perplexities["perplexity" + suffix] = context_set.share * perplexity.log()
        return terms

    def _regularizer(self, i: int) -> PerplexityRegularizer:
        while i >= len(self.regularizers):
            self.regularizers.append(regularizer_for(self.cfg, self.clip_model))
        return self.regularizers[i]


def weight_of(context_set: ContextSet, sets: int) -> float:
    """Of one set's term among all: what it says, else each counts the same."""
    return 1 / sets if context_set.weight is None else context_set.weight


@torch.no_grad()
def measured(regularizer: PerplexityRegularizer, contexts: Sequence[ContextSet]) -> Components:
    """PLPP's figures of all sets together: the weighted sum of the losses, and of the logarithms of the perplexities."""
    parts = [regularizer.components(c.context, c.hidden) for c in contexts]
    if len(parts) == 1 and weight_of(contexts[0], 1) == 1:
        return parts[0]
    weights = [weight_of(c, len(contexts)) for c in contexts]
    sums = [sum(w * p[i] for w, p in zip(weights, parts, strict=True)) for i in range(3)]
    log = sum(w * p.perplexity.log() for w, p in zip(weights, parts, strict=True)) / sum(weights)
    return Components(*sums, log.exp())


def readable(log_perplexities: dict[str, float]) -> dict[str, float]:
    """Perplexities out of the logarithms that were averaged; what is no finite number is left out."""
    return {name: math.exp(log) for name, log in log_perplexities.items() if log < MOST_LOG_PERPLEXITY}
