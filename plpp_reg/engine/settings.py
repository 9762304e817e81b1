"""A method's settings: a dataclass that holds the configuration's keys, their defaults and their ranges, all in one place."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from typing_extensions import Self
from yacs.config import CfgNode

from plpp_reg.clip.load import PRECISIONS
from plpp_reg.errors import InputError, unknown
from plpp_reg.loss.functional import STATES

KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text"}


def setting(
    default: bool | int | float | str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    key: str = "",
) -> Any:
    """A field of a method's ``Config``.

    Args:
        default: its value where nothing is said; its type is the field's.
        least, above, most: the range, ``least <= value``, ``above < value``, ``value <= most``.
        choices: the words that it may be.
        key: the whole key that it is read from, where that is not ``TRAINER.<node>.<NAME>``.
    """
    return field(
        default=default,
        metadata={"least": least, "above": above, "most": most, "choices": choices, "key": key, "setting": True},
    )


def precision(default: str) -> Any:
    """The field ``prec`` of a method that computes in another precision than fp32 unless told."""
    return setting(default, choices=tuple(PRECISIONS))


@dataclass(frozen=True)
class Settings:
    """What a method reads of the configuration; a method's ``Config`` is a frozen dataclass that extends it.

    Field ``n_ctx`` of a class with ``node="COOP"`` is the key ``TRAINER.COOP.N_CTX``; some methods share a node, as upstream
    has it. Whatever makes one, the configuration or a call, its values are checked.

    >>> @dataclass(frozen=True)
    ... class Config(Settings, node="OWN"):
    ...     n_ctx: int = setting(4, least=1)
    >>> Config().n_ctx, Config.key("n_ctx")
    (4, 'TRAINER.OWN.N_CTX')
    >>> Config(n_ctx=0)
    Traceback (most recent call last):
    plpp_reg.errors.InputError: TRAINER.OWN.N_CTX: expected an integer >= 1, got 0

    Raises:
        InputError: a value out of its range, or of another type than its default.
    """

    node: ClassVar[str] = ""
    prec: str = precision("fp32")
    states: str = setting(STATES[0], choices=STATES, key="TRAINER.PLPP.STATES")  # which of them PLPP reads

    def __init_subclass__(cls, node: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if node:
            cls.node = node

    def __post_init__(self) -> None:
        for f in fields(self):
            if "setting" in f.metadata:
                _check(self.key(f.name), getattr(self, f.name), f.default, f.metadata)

    @classmethod
    def key(cls, name: str) -> str:
        """The configuration's key of a field; empty where the class has no node."""
        return cls._keys()[name]

    @classmethod
    @functools.cache  # a plan of many runs asks for every method's at every run
    def _keys(cls) -> dict[str, str]:
        own = {f.name: f.metadata.get("key", "") for f in fields(cls)}
        return {name: key or (f"TRAINER.{cls.node}.{name.upper()}" if cls.node else "") for name, key in own.items()}

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """Every key that it reads, and its default."""
        keys = cls._keys()
        return {keys[f.name]: f.default for f in fields(cls) if keys[f.name]}

    @classmethod
    def read(cls, cfg: CfgNode) -> Self:
        """Out of a whole configuration."""
        values = {}
        for name, key in cls._keys().items():
            node: Any = cfg
            for part in filter(None, key.split(".")):
                node = node[part]
            if node is not cfg:
                values[name] = node
        return cls(**values)


def _check(key: str, value: object, default: object, bounds: Any) -> None:
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{key}: expected {KINDS[kind]}, got {value!r}")
    if bounds["choices"] and value not in bounds["choices"]:
        raise unknown(key, str(value), bounds["choices"])
    if not isinstance(value, (int, float)):
        return
    least, above, most = bounds["least"], bounds["above"], bounds["most"]
    inside = math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
    if not inside or (most is not None and value > most):
        ranges = [f"{sign} {bound:g}" for sign, bound in ((">=", least), (">", above), ("<=", most)) if bound is not None]
        raise InputError(f"{key}: expected {KINDS[kind]} {' and '.join(ranges)}, got {value}")
