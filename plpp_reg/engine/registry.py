"""Trainers by name. Asking for a name finds it; nothing has to be imported first."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from plpp_reg.errors import InputError, unknown
from plpp_reg.loss import SUFFIX
from plpp_reg.trainers import TRAINERS

if TYPE_CHECKING:
    from plpp_reg.engine.trainer import PromptTrainer


def trainer_names() -> list[str]:
    """Every name that ``--trainer`` takes of ours: X, and X_PLPP where X learns text context."""
    return [n for name in TRAINERS for n in ([name, name + SUFFIX] if _load(TRAINERS[name]).learns_text_context else [name])]


def config_nodes(own: type[PromptTrainer] | None = None) -> dict[str, dict[str, object]]:
    """The ``TRAINER.<node>`` defaults of every method, and of one's own trainer; some share a node, as upstream has it."""
    nodes: dict[str, dict[str, object]] = {}
    for c in [_load(place) for place in TRAINERS.values()] + ([own] if own else []):
        if c.config_node:
            nodes.setdefault(c.config_node, {}).update(c.config_defaults)
    return nodes


def find_trainer(name: str) -> tuple[type[PromptTrainer], str, bool]:
    """The class, its plain name and whether PLPP is asked for. A trainer of one's own goes as ``package.module:Class``.

    >>> find_trainer("CoOp_PLPP")
    (<class 'plpp_reg.trainers.coop.CoOp'>, 'CoOp', True)

    Raises:
        InputError: no such name, or ``X_PLPP`` of a method without text context.
    """
    plain = name.removesuffix(SUFFIX)
    with_plpp = plain != name
    if plain in TRAINERS:
        place = TRAINERS[plain]
    elif ":" in plain:
        place = plain
    else:
        raise unknown("trainer", name, trainer_names())
    cls = _load(place)
    if with_plpp and not cls.learns_text_context:
        raise InputError(f"{name}: {plain} learns no text context, so PLPP has nothing to act on: use {plain}")
    return cls, plain, with_plpp


def find_named_by_file(name: str, where: str, flag: str) -> tuple[type[PromptTrainer], str, bool]:
    """As :func:`find_trainer`, of a name that stands in a file: one of ours, or in a module that this process has imported.

    Args:
        name: of the trainer.
        where: the file, as a message names it.
        flag: of the command line, by which a user may name another.

    Raises:
        InputError: another name, for a file is no reason to import code; or what :func:`find_trainer` refuses.
    """
    module, colon, cls = name.removesuffix(SUFFIX).partition(":")
    if colon and cls not in getattr(sys.modules.get(module), "__dict__", {}):
        raise InputError(
            f"{where}: expected a trainer of plpp-reg's own, got {name!r}: {flag} {name} imports it, a file does not"
        )
    return find_trainer(name)


def _load(place: str) -> type[PromptTrainer]:
    from plpp_reg.engine.trainer import PromptTrainer

    module, _, name = place.partition(":")
    if not module or module.startswith("."):
        raise InputError(f"trainer {place!r}: expected package.module:Class")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise InputError(f"trainer {place!r}: expected package.module:Class, got {e}") from e
    if not (isinstance(cls, type) and issubclass(cls, PromptTrainer)):
        raise InputError(f"trainer {place!r}: expected a subclass of plpp_reg.engine.trainer.PromptTrainer, got {cls!r}")
    return cls
