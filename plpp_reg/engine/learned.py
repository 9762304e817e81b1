"""A run's context vectors in words, for its record: a report of it then needs neither its checkpoint nor its backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from plpp_reg.clip.reading import States, Vocabulary
from plpp_reg.results.learned import NEAREST

if TYPE_CHECKING:
    from plpp_reg.engine.trainer import PromptTrainer


@torch.no_grad()
def in_words(trainer: PromptTrainer) -> dict[str, Any] | None:
    """The words nearest to each context vector as it is, of the first class's where each has its own, with their cosines,
    and the perplexity of the context; None without context."""
    if not trainer.learns_text_context:
        return None
    learner = trainer.learner
    several = learner.class_specific or learner.position != "end"  # else the context has seen no name: one class says it all
    out = learner(trainer.tower, True, trainer.deep_context(), slice(None) if several else slice(1))
    states = States.of(trainer.context(), out.hidden)
    vocabulary = Vocabulary(trainer.clip_model, NEAREST)
    nearest = [[[near.word, near.cosine] for near in words] for words in vocabulary.nearest(states.context[0])]
    return {"perplexity": vocabulary.perplexity(states), "nearest": nearest}


def learned(before: dict[str, Any] | None, trainer: PromptTrainer) -> dict[str, Any] | None:
    """What :func:`in_words` said before training, and says now; None where no context was trained."""
    if before is None:
        return None
    own = trainer.context().dim() == 3
    return {"before": before, "after": in_words(trainer), "of_class": trainer.data.classnames[0] if own else ""}
