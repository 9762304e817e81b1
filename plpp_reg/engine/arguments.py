"""What a run is, out of what a command line names: the resolved configuration, and the method."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from yacs.config import CfgNode

from plpp_reg.clip.load import EMBEDDED
from plpp_reg.data import template
from plpp_reg.engine import config, registry
from plpp_reg.errors import InputError
from plpp_reg.io.paths import usable_path
from plpp_reg.loss import SUFFIX

if TYPE_CHECKING:
    from plpp_reg.engine.method import Method

DEFAULT_TRAINER = "CoOp_PLPP"
DEFAULT_DATASET = "emoji"
DEFAULT_RECIPE = "few_shot_16"


class RunArguments(NamedTuple):
    """What a command line names; Dassl's flags, empty where not given."""

    trainer: str = ""
    root: str = ""
    output_dir: str = ""
    resume: str = ""
    seed: int | None = None
    transforms: tuple[str, ...] = ()
    config_file: str = ""
    dataset_config_file: str = ""
    backbone: str = ""
    eval_only: bool = False
    model_dir: str = ""
    load_epoch: int | None = None
    no_train: bool = False
    opts: tuple[str, ...] = ()


def shipped_config(*parts: str) -> Path:
    """A file of configs/, wherever the package is installed."""
    return Path(str(resources.files("plpp_reg.configs"))).joinpath(*parts)


def resolve(args: RunArguments) -> tuple[CfgNode, type[Method]]:
    """Defaults, then the data set's file, the method's file, the flags, ``KEY VALUE`` pairs: each overrides the one before.

    With no data set named it is the embedded one, with no backbone the embedded one; with no method file it is the recipe that
    the package ships for the method and such a backbone.
    """
    requested = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    cls, plain, with_plpp = registry.find_trainer(args.trainer or requested.get("TRAINER.NAME", DEFAULT_TRAINER))
    if ":" in (teacher := requested.get("TEACHER.TRAINER", "")):
        registry.find_trainer(teacher)  # imported here, for the command line says so
    cfg = config.get_cfg_default(cls)
    files = [args.dataset_config_file or shipped_config("datasets", f"{DEFAULT_DATASET}.yaml")]
    if args.config_file:
        files.append(args.config_file)
    else:
        embedded = (args.backbone or requested.get("MODEL.BACKBONE.NAME") or EMBEDDED) == EMBEDDED
        recipe = shipped_config("trainers", plain, f"{EMBEDDED if embedded else DEFAULT_RECIPE}.yaml")
        files += [recipe] if recipe.is_file() else []  # a trainer of one's own has none
    for file in files:
        config.merge_file(cfg, file)
    flags = {
        "DATASET.ROOT": args.root,
        "OUTPUT_DIR": args.output_dir,
        "RESUME": args.resume,
        "SEED": args.seed,
        "INPUT.TRANSFORMS": args.transforms,
        "MODEL.BACKBONE.NAME": args.backbone,
    }
    for key, value in flags.items():
        if value not in ("", None, ()):
            config.set_value(cfg, key, value)
    config.merge_list(cfg, args.opts)
    if with_plpp:
        cfg.TRAINER.PLPP.ENABLED = True
    elif cfg.TRAINER.PLPP.ENABLED:
        registry.find_trainer(plain + SUFFIX)  # refused for the same reason by either spelling
    cfg.TRAINER.NAME = plain + (SUFFIX if cfg.TRAINER.PLPP.ENABLED else "")
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME or EMBEDDED
    if cfg.SEED < 0:
        cfg.SEED = secrets.randbelow(2**31)
    check(cfg)
    cls.Config.read(cfg)
    return cfg, cls


def check(cfg: CfgNode) -> None:
    choices = {"TEST.FINAL_MODEL": ("last_step", "best_val"), "TEST.SPLIT": ("test", "val")}
    values = config.flat(cfg)
    for key, allowed in choices.items():
        if values[key] not in allowed:
            raise InputError(f"{key}: expected one of {', '.join(map(repr, allowed))}, got {values[key]!r}")
    for key in ("OUTPUT_DIR", "RESUME", "DATASET.ROOT", "MODEL.INIT_WEIGHTS", "TEACHER.RUN", "TEACHER.WEIGHTS"):
        try:
            config.set_value(cfg, key, usable_path(values[key]))
        except InputError as e:
            raise InputError(f"{key}: {e}") from e
    if cfg.SEED >= 2**32:  # numpy's bound
        raise InputError(f"SEED: expected an integer < 2**32, got {cfg.SEED}")
    template(cfg.DATASET.NAME, cfg.DATASET.TEMPLATE)  # refused here, before a folder is made
    if cfg.TRAIN.PRINT_FREQ < 1:
        raise InputError(f"TRAIN.PRINT_FREQ: expected an integer >= 1, got {cfg.TRAIN.PRINT_FREQ}")


def further_config(cfg: CfgNode, opts: Sequence[str]) -> CfgNode:
    """The run's configuration with KEY VALUE pairs on top, for one further test."""
    changed = config.copied(cfg)
    config.merge_list(changed, opts)
    check(changed)
    return changed
