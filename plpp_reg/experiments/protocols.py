"""The papers' protocols: what a file of configs/protocols/ says, read and checked. ``jobs`` expands them into runs."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plpp_reg.engine.arguments import shipped_config
from plpp_reg.errors import InputError, unknown
from plpp_reg.io.files import read_yaml
from plpp_reg.results.job import TABLES
from plpp_reg.results.record import is_number, is_text


@dataclass(frozen=True)
class Protocol:
    """What a file of configs/protocols/ says.

    ``table`` is the form of its table: base, new and H ("halves"), a column a target ("targets"), a column a number of shots
    ("shots"). ``recipe`` names files of configs/trainers/<method>/, the first that is there counts; ``{dataset}`` and
    ``{shots}`` stand for the run's. ``test`` is what the test on the run's own data is called, ``tests`` are further ones by
    name, ``targets`` further ones on other data sets. ``teacher`` says from whose run those learn that distil: its ``method``,
    or several, ``backbone``, ``recipe`` and what it ``set``s; empty: as their recipe has it. ``each`` is "target" where those
    that distil are trained on every target's own images, without labels, from the teacher of the data set. ``where`` changes
    recipe, settings, tests, teacher and each for some methods, data sets or shots. ``vary`` and ``variants`` make further runs
    of each X_PLPP: one key at a time, and sets of keys by name.
    """

    name: str
    table: str
    methods: Sequence[str]
    datasets: Sequence[str]
    recipe: Sequence[str]
    seeds: Sequence[int] = (1, 2, 3)
    shots: Sequence[int] = (16,)
    backbone: str = ""
    test: str = "test"
    set: Mapping[str, object] = field(default_factory=dict)
    tests: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    targets: Sequence[str] = ()
    teacher: Mapping[str, Any] = field(default_factory=dict)
    each: str = ""
    where: Sequence[Mapping[str, Any]] = ()
    vary: Mapping[str, Sequence[object]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def _list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _by_name(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(is_text(name) and fits(inner) for name, inner in value.items())


def _is_value(value: object) -> bool:
    """What a key of the configuration can have."""
    return isinstance(value, (str, bool)) or is_number(value) or (isinstance(value, list) and all(map(_is_value, value)))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and is_number(value)


TEXT = (is_text, "text")
TEXTS = (_list_of(is_text), "a list of text")
WHOLE_NUMBERS = (_list_of(_is_whole), "a list of integers")
SETTINGS = (_by_name(_is_value), "configuration keys and values")
NAMED_SETTINGS = (_by_name(SETTINGS[0]), "names with configuration keys and values")
KINDS = {
    **dict.fromkeys(("table", "backbone", "test", "each"), TEXT),
    **dict.fromkeys(("methods", "datasets", "recipe", "targets"), TEXTS),
    **dict.fromkeys(("seeds", "shots"), WHOLE_NUMBERS),
    "set": SETTINGS,
    **dict.fromkeys(("tests", "variants"), NAMED_SETTINGS),
    "teacher": (lambda value: isinstance(value, dict) and all(map(is_text, value)), "keys and values"),
    "where": (_list_of(_by_name(lambda value: True)), "a list of keys and values"),
    "vary": (_by_name(_list_of(_is_value)), "configuration keys, each with a list of values"),
}  # of a protocol file: whether a value fits its key, and what is expected
FIELDS = {f.name: f for f in dataclasses.fields(Protocol) if f.name != "name"}
WHERE = ("methods", "datasets", "shots", "recipe", "set", "test", "tests", "teacher", "each")
TARGET = "target"  # what each can be
TEACHER = {"method": "methods", "backbone": "backbone", "recipe": "recipe", "set": "set"}  # its keys, each of what kind


def protocol_names() -> list[str]:
    return sorted(path.stem for path in shipped_config("protocols").glob("*.yaml"))


def load_protocol(name: str, embedded: bool) -> Protocol:
    """A shipped protocol by its name, or one's own by its file. ``embedded``: as it runs without downloads."""
    path = shipped_config("protocols", f"{name}.yaml")
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise unknown("protocol", name, protocol_names())
    where = f"protocol {str(path)!r}"
    content = read_yaml(path, "protocol")
    if not isinstance(content, dict) or not isinstance(content.get("embedded", {}), dict):
        raise InputError(f"{where}: expected keys and values, got {type(content).__name__}")
    smaller = content.pop("embedded", None)
    if embedded:
        if smaller is None:
            raise InputError(f"{where}: it has no part 'embedded': name --root")
        content = {**content, "where": [], **smaller}
    return _protocol(path.stem, content, where)


def _check_kinds(entries: Mapping[str, Any], known: Collection[str], what: str, place: str) -> None:
    """
    Raises:
        InputError: a key that is not ``known`` (``what`` it is), or a value of another kind than its key has.
    """
    for key, value in entries.items():
        if key not in known:
            raise unknown(what, str(key), known)
        fits, words = KINDS[key]
        if not fits(value):
            raise InputError(f"{place}: {key}: expected {words}, got {short(value)}")


def _protocol(name: str, content: Mapping[str, Any], where: str) -> Protocol:
    _check_kinds(content, FIELDS, f"key in {where}:", where)
    for key, f in FIELDS.items():
        if key not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: expected a key {key!r}")
    if content["table"] not in TABLES:
        raise unknown(f"table in {where}:", str(content["table"]), TABLES)
    if content["table"] == "halves" and not {"base", "new"} <= {content.get("test"), *content.get("tests", ())}:
        raise InputError(f"{where}: expected tests base and new for a table of halves")
    for rule in content.get("where", ()):
        _check_kinds(rule, WHERE, f"key in where of {where}:", f"{where}: where")
    for part in (content, *content.get("where", ())):
        teacher = {TEACHER.get(key, key): value for key, value in part.get("teacher", {}).items()}
        if isinstance(teacher.get("methods"), str):
            teacher["methods"] = [teacher["methods"]]
        _check_kinds(teacher, tuple(TEACHER.values()), f"key in teacher of {where}:", f"{where}: teacher")
        if part.get("each", TARGET) != TARGET or ("each" in part and content["table"] != "targets"):
            raise InputError(f"{where}: each: expected {TARGET!r}, in a table of targets, got {part['each']!r}")
        if teacher and not teacher.get("methods"):
            raise InputError(f"{where}: teacher: expected a key 'method', got {', '.join(part['teacher'])}")
    for variant in content.get("variants", ()):
        if not as_folder(variant).strip("."):
            raise InputError(f"{where}: variants: expected names that a folder can have, got {variant!r}")
    for recipe in (*content["recipe"], *(name for rule in content.get("where", ()) for name in rule.get("recipe", ()))):
        if re.search(r"[{}]", recipe.replace("{dataset}", "").replace("{shots}", "")):
            raise InputError(f"{where}: recipe: expected no fields but {{dataset}} and {{shots}}, got {recipe!r}")
    if not name.strip("."):
        raise InputError(f"{where}: expected a name that a folder can have")
    return Protocol(name=name, **content)


def short(value: object) -> str:
    """A value as a line shows it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def as_folder(variant: str) -> str:
    """A variant's name as its folder has it."""
    return re.sub(r"[^\w.=+-]+", "_", variant)


def __getattr__(name: str) -> Any:
    """What stood here in version 0.2; it goes in version 0.4."""
    if name not in ("Choice", "Job", "choose", "plan", "learns"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from plpp_reg.experiments import jobs

    warnings.warn(
        f"plpp_reg.experiments.protocols.{name} is in plpp_reg.experiments.jobs since version 0.3, and goes in 0.4",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(jobs, name)
