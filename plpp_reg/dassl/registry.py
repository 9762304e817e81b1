"""Dassl's configuration and trainer registry, extended in memory."""

from __future__ import annotations

import sys
from typing import Any

from plpp_reg.attachment.with_plpp import with_plpp
from plpp_reg.errors import InputError, unknown
from plpp_reg.loss import SUFFIX
from plpp_reg.loss.settings import node_defaults
from plpp_reg.trainers import KDPL, NODES

# Where a method runs several backward passes through one forward pass: the one that belongs to the task's loss.
BACKWARD_PASS = {"ProGrad": 2}


def install() -> None:
    """Extend Dassl's defaults and registry; a second call changes nothing.

    Raises:
        InputError: Dassl cannot be imported.
    """
    try:
        import dassl.config
        import dassl.engine
        from dassl.config import defaults
    except ImportError as e:
        raise InputError(
            f"plpp_reg.dassl: expected Dassl to be importable, got: {e} (in its checkout: pip install -r requirements.txt && "
            "pip install --no-build-isolation -e .)"
        ) from e
    extend_defaults(defaults._C)
    keep_node(dassl.config)
    registry = dassl.engine.TRAINER_REGISTRY
    if not isinstance(registry, _Lazy):
        # the object itself changes its class, so that every module that holds it sees the new names
        registry.__class__ = type("Registry", (_Lazy, type(registry)), {})


def extend_defaults(cfg: Any) -> None:
    """``TRAINER.PLPP``, and the nodes of our own methods, which a host that has the method replaces by its own; ``TEACHER``."""
    from yacs.config import CfgNode

    from plpp_reg.dassl.engine_bridge import our_nodes, teacher_node

    if (teacher := teacher_node()) and "TEACHER" not in cfg:
        cfg.TEACHER = CfgNode(teacher)
    for name, defaults in {"PLPP": node_defaults(), **our_nodes()}.items():
        if name not in cfg.TRAINER:
            cfg.TRAINER[name] = CfgNode(defaults)


def keep_node(module: Any) -> None:
    """Dassl's ``clean_cfg`` removes every node below TRAINER but that of the trainer's name: it keeps PLPP, X's for X_PLPP, and
    what a method of ours reads."""
    original = getattr(module, "clean_cfg", None)
    if original is None or getattr(original, "keeps_plpp", False):
        return

    def clean_cfg(cfg: Any, trainer: str) -> None:
        plain = trainer.removesuffix(SUFFIX)
        names = {"PLPP", NODES.get(plain), *((KDPL,) if plain.endswith(f"_{KDPL}") else ())}
        kept = {name: cfg.TRAINER[name] for name in names if name in cfg.TRAINER}
        original(cfg, plain)
        for name, node in kept.items():
            cfg.TRAINER[name] = node

    clean_cfg.keeps_plpp = True
    rebind(original, clean_cfg)


def rebind(old: Any, new: Any) -> None:
    """Every module-level name that means ``old`` means ``new``, wherever it was imported to."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)


class _Lazy:
    """Stands before Dassl's ``Registry`` in the bases of its trainer registry: names are worked out when they are asked for."""

    def registered_names(self) -> list[str]:
        from plpp_reg.dassl.engine_bridge import our_names

        own = super().registered_names()
        names = [*own, *(name + SUFFIX for name in own if name + SUFFIX not in own and not name.endswith(SUFFIX))]
        return [*names, *(name for name in our_names() if name not in names)]

    def get(self, name: str) -> Any:
        own = super().registered_names()
        if name in own:
            cls = super().get(name)
            return cls if name.endswith(SUFFIX) or not hasattr(cls, "build_model") else _by_configuration(cls)
        plain = name.removesuffix(SUFFIX)
        if plain != name and plain in own:
            return with_plpp(super().get(plain), backward_pass=BACKWARD_PASS.get(plain))
        from plpp_reg.dassl.engine_bridge import our_names, our_trainer

        if name in our_names():
            return our_trainer(name)
        raise unknown("trainer", name, self.registered_names())


def _by_configuration(cls: type) -> type:
    """``cls``, except that ``cls(cfg)`` is ``with_plpp(cls)(cfg)`` where ``cfg.TRAINER.PLPP.ENABLED``."""

    class Chosen(cls):
        def __new__(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not Chosen:
                return super().__new__(self)
            node = getattr(cfg.TRAINER, "PLPP", None)
            wanted = node is not None and node.ENABLED
            return (with_plpp(cls, backward_pass=BACKWARD_PASS.get(cls.__name__)) if wanted else cls)(cfg, *args, **kwargs)

    Chosen.__name__, Chosen.__qualname__, Chosen.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Chosen
