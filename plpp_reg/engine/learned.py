"""A run's context vectors in words, for its record: a report of it then needs neither its checkpoint nor its backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from plpp_reg.clip.reading import States, Vocabulary
from plpp_reg.results.learned import NEAREST

if TYPE_CHECKING:
    from plpp_reg.engine.method import ContextSet, Method


@torch.no_grad()
def in_words(method: Method) -> dict[str, Any] | None:
    """The words nearest to each context vector as it is, of the first class's where each has its own, with their cosines,
    and the perplexity of the context; of several context sets, the first. None without context."""
    if not method.learns_text_context:
        return None
    return _read(method, method.contexts()[0])


def _read(method: Method, context_set: ContextSet) -> dict[str, Any]:
    states = States.of(context_set.context, context_set.hidden)
    vocabulary = Vocabulary(method.clip.model, NEAREST)
    nearest = [[[near.word, near.cosine] for near in words] for words in vocabulary.nearest(states.context[0])]
    return {"perplexity": vocabulary.perplexity(states), "nearest": nearest}


def learned(before: dict[str, Any] | None, method: Method) -> dict[str, Any] | None:
    """What :func:`in_words` said before training, and says now; None where no context was trained."""
    if before is None:
        return None
    after, *_ = method.contexts()
    own = after.context.dim() == 3
    return {"before": before, "after": _read(method, after), "of_class": method.classnames[0] if own else ""}
