"""Which teacher a configuration names: a method of ours, its own configuration, its weights' file. Nothing of it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from yacs.config import CfgNode

from plpp_reg.engine import checkpoint, config, registry
from plpp_reg.engine.arguments import RunArguments, resolve
from plpp_reg.engine.frozen import tensors_sha256
from plpp_reg.engine.method import UNDECLARED, Method, Settings
from plpp_reg.errors import InputError
from plpp_reg.loss import SUFFIX
from plpp_reg.results.record import RESULT, read_if_whole

OF_NO_EFFECT = ("prec", "states")  # settings of a method that change nothing of what it says in the run's own precision
EXAMPLE = (
    "TEACHER: expected a teacher, got none: TEACHER.RUN FOLDER (of a finished run), or TEACHER.TRAINER ZeroshotCLIP2, or "
    "TEACHER.TRAINER PromptSRC with TEACHER.WEIGHTS FILE, and TEACHER.BACKBONE where it is not the student's"
)


def settings_of_effect(config: Settings) -> dict[str, Any]:
    """Of a method's settings, those on which depends what it says."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_NO_EFFECT}


class Named(NamedTuple):
    """What the node TEACHER names."""

    cls: type[Method]
    cfg: CfgNode  # its own, on the student's data
    weights: Path | None  # a checkpoint; None: it learns nothing
    learned_sha256: str  # of the checkpoint's tensors; empty: it learns nothing
    trained_on: list[str] | None  # class names; None: a file that does not say

    @property
    def config(self) -> Settings:
        return self.cls.Config.read(self.cfg)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its ``Config``, which is all that a method reads of a configuration."""
        return settings_of_effect(self.config)


def method_name(cfg: CfgNode) -> str:
    return str(cfg.TRAINER.NAME).removesuffix(SUFFIX)


def _check_method(cls: type[Method], cfg: CfgNode) -> None:
    """Whether cosines of image features with class features are all that it says."""
    if cls.classes_depend_on_image:
        raise InputError(
            f"TEACHER: expected a method whose class features are the same for every image, got {method_name(cfg)}"
        )
    if cls.not_exported == UNDECLARED:
        raise InputError(f"TEACHER: expected a method that says what its logits are (not_exported), got {method_name(cfg)}")


def _check_import(trainer: str) -> None:
    """A command line imports one's own trainer (package.module:Class) as it is resolved; what a file names is not imported."""
    if ":" in trainer:
        registry.find_named_by_file(trainer, "TEACHER.TRAINER", "on a command line TEACHER.TRAINER")


def of_run(node: CfgNode) -> Named:
    """Of a run's folder, whose configuration says everything."""
    folder = Path(node.RUN)
    beside = [key for key in ("WEIGHTS", "BACKBONE", "OPTS") if node[key]]
    beside += ["TRAINER"] if node.TRAINER and ":" not in node.TRAINER else []  # package.module:Class, which no file may name
    if beside:
        raise InputError(f"TEACHER.RUN: expected nothing beside it, which says everything, got TEACHER.{beside[0]} too")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"TEACHER.RUN {node.RUN!r}: expected the folder of a run, with its config.yaml, got none")
    if read_if_whole(folder) is None:
        raise InputError(
            f"TEACHER.RUN {node.RUN!r}: expected a finished run, got one without {RESULT} (a checkpoint of it: TEACHER.WEIGHTS "
            "FILE with TEACHER.TRAINER)"
        )
    _check_import(node.TRAINER)
    cfg, cls = config.of_run(folder, node.TRAINER)
    _check_method(cls, cfg)
    if not cls.learns:
        return Named(cls, cfg, None, "", [])
    if not (folder / cls.model_name).is_dir():
        raise InputError(f"TEACHER.RUN {node.RUN!r}: expected a run with a checkpoint, it has no folder {cls.model_name!r}")
    path = checkpoint.find(folder, cls.model_name, None)
    return _with_weights(cls, cfg, path, checkpoint.load(path))


def of_trainer(node: CfgNode, student: CfgNode) -> Named:
    """Of a method by its name, and the file of its weights."""
    if not node.TRAINER:
        if node.WEIGHTS:
            raise InputError("TEACHER.WEIGHTS: expected TEACHER.TRAINER beside it, the method that learned them")
        raise InputError(EXAMPLE)
    _check_import(node.TRAINER)
    backbone, opts = node.BACKBONE or student.MODEL.BACKBONE.NAME, tuple(map(str, node.OPTS))
    try:
        cfg, cls = resolve(RunArguments(trainer=node.TRAINER, backbone=backbone, seed=student.SEED, opts=opts))
    except InputError as e:
        raise InputError(f"TEACHER: {e}") from e
    _check_method(cls, cfg)
    if not cls.learns:
        if node.WEIGHTS:
            raise InputError(f"TEACHER.WEIGHTS: expected none, {method_name(cfg)} learns nothing")
        return Named(cls, cfg, None, "", [])
    if not node.WEIGHTS:
        raise InputError(
            f"TEACHER.WEIGHTS: expected a checkpoint of {method_name(cfg)}, or TEACHER.RUN with its run's folder, got none"
        )
    if not (path := Path(node.WEIGHTS)).is_file():
        raise InputError(f"TEACHER.WEIGHTS {node.WEIGHTS!r}: expected a checkpoint's file, got none")
    content = checkpoint.load(path)
    for name, value in cls.settings_of(checkpoint.plain_tensors(content)).items():
        config.set_value(cfg, cls.Config.key(name), value)
    return _with_weights(cls, cfg, path, content)


def _with_weights(cls: type[Method], cfg: CfgNode, path: Path, content: Mapping[str, Any]) -> Named:
    extra = content.get("plpp_reg") or {}
    state = {name: t for name, t in content["state_dict"].items() if isinstance(t, Tensor)}
    if cls.predicts_by_teacher:  # what its own teacher said is of what it says
        said = extra.get("said") or {}
        state |= {f"said.{name}": t for name, t in said.items() if isinstance(t, Tensor)}
    return Named(cls, cfg, path, tensors_sha256(state), extra.get("classnames"))
