"""The regularizer's settings as a configuration's node ``TRAINER.PLPP``: its keys, and the regularizer that one describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from plpp_reg.errors import InputError
from plpp_reg.loss.functional import STATES
from plpp_reg.loss.regularizer import PerplexityRegularizer, settings_defaults


def node_defaults() -> dict[str, float | int | str | bool]:
    """``ENABLED``, which is off, ``STATES``, and every setting of the regularizer, by the names that the node has."""
    return {"ENABLED": False, "STATES": STATES[0], **{name.upper(): value for name, value in settings_defaults().items()}}


def regularizer_from(
    node: Mapping[str, Any], embedding: Tensor, candidates: Sequence[int] | Tensor | None = None
) -> PerplexityRegularizer:
    """The regularizer with a node's settings; what is missing there has its default.

    Args:
        node: ``cfg.TRAINER.PLPP``.
        embedding, candidates: as :class:`PerplexityRegularizer` has them.

    Raises:
        InputError: a setting out of its range; the message names the node.
    """
    settings = {name: node[name.upper()] for name in settings_defaults() if name.upper() in node}
    try:
        return PerplexityRegularizer(embedding, candidates=candidates, **settings)
    except InputError as e:
        raise InputError(f"TRAINER.PLPP: {e}") from e
