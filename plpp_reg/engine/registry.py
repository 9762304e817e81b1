"""Trainers by name. Asking for a name finds it; nothing has to be imported first."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from plpp_reg.errors import InputError, unknown
from plpp_reg.loss import SUFFIX
from plpp_reg.trainers import TRAINERS

if TYPE_CHECKING:
    from plpp_reg.engine.method import Method


def trainer_names() -> list[str]:
    """Every name that ``--trainer`` takes of ours: X, and X_PLPP where X learns text context."""
    return [n for name in TRAINERS for n in ([name, name + SUFFIX] if _load(TRAINERS[name]).learns_text_context else [name])]


def method_defaults(own: type[Method] | None = None) -> dict[str, object]:
    """The keys that the methods, and one's own, read of the configuration, and their defaults; some share a node below
    TRAINER, as upstream has it, and some read keys that are not theirs."""
    methods = [_load(place) for place in TRAINERS.values()] + ([own] if own else [])
    return {key: default for method in methods for key, default in method.Config.defaults().items()}


def config_nodes() -> dict[str, dict[str, object]]:
    """The defaults of every method's own node, ``TRAINER.<node>``."""
    nodes: dict[str, dict[str, object]] = {}
    for key, default in method_defaults().items():
        *parents, leaf = key.split(".")
        if parents[:1] == ["TRAINER"] and parents[1] != "PLPP":
            nodes.setdefault(parents[1], {})[leaf] = default
    return nodes


def find_trainer(name: str) -> tuple[type[Method], str, bool]:
    """The method's class, its plain name and whether PLPP is asked for. One's own goes as ``package.module:Class``.

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
        instead = cls.instead_of_plpp or f"use {plain}"
        raise InputError(f"{name}: {plain} learns no text context, so PLPP has nothing to act on: {instead}")
    return cls, plain, with_plpp


def find_named_by_file(name: str, where: str, flag: str) -> tuple[type[Method], str, bool]:
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


def _load(place: str) -> type[Method]:
    from plpp_reg.engine.method import Method

    module, _, name = place.partition(":")
    if not module or module.startswith("."):
        raise InputError(f"trainer {place!r}: expected package.module:Class")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise InputError(f"trainer {place!r}: expected package.module:Class, got {e}") from e
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise InputError(f"trainer {place!r}: expected a subclass of plpp_reg.engine.method.Method, got {cls!r}")
    return cls
