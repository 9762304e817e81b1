"""The configuration: Dassl's keys and defaults, what each method adds, and ``TRAINER.PLPP``, in one yacs node."""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from plpp_reg.engine import registry
from plpp_reg.errors import InputError, unknown
from plpp_reg.io.files import read_yaml
from plpp_reg.loss.settings import node_defaults
from plpp_reg.results.record import NOT_IN_THE_RESULT

# Dassl's keys and defaults, as far as this engine honours them. Where ours differ, the comment says so.
DEFAULTS = {
    "VERSION": 1,
    "OUTPUT_DIR": "",  # Dassl: "./output"; empty here: output/<data set>/<trainer>/seed<seed>
    "RESUME": "",
    "SEED": 1,  # Dassl: -1, no fixed seed; here -1 draws one and records it
    "USE_CUDA": True,
    "INPUT": {
        "SIZE": (224, 224),
        "INTERPOLATION": "bilinear",
        "TRANSFORMS": (),
        "PIXEL_MEAN": [0.485, 0.456, 0.406],
        "PIXEL_STD": [0.229, 0.224, 0.225],
        "CROP_PADDING": 4,
        "RRCROP_SCALE": (0.08, 1.0),
        "COLORJITTER_B": 0.4,
        "COLORJITTER_C": 0.4,
        "COLORJITTER_S": 0.4,
        "COLORJITTER_H": 0.1,
        "RGS_P": 0.2,
        "VIEWS": 0,  # ours: so many augmentations of an image, seen in turn; 0: a new one each epoch, as Dassl
    },
    "DATASET": {
        "ROOT": "",
        "NAME": "",
        "NUM_SHOTS": -1,
        "SUBSAMPLE_CLASSES": "all",  # CoOp's: all, base or new
        "SEED": -1,  # of the few-shot picks and of the augmentation; -1: SEED
        "TEMPLATE": "",  # ours: the hand-crafted prompt, with {} for the name; empty: the data set's own
    },
    "DATALOADER": {
        "NUM_WORKERS": 4,
        "TRAIN_X": {"BATCH_SIZE": 32},
        "TEST": {"BATCH_SIZE": 32},
    },
    "MODEL": {
        "INIT_WEIGHTS": "",
        "BACKBONE": {"NAME": ""},
        "TEXT_MEMORY_MIB": 1024,  # bound on what the text tower keeps for backward: beyond it, classes go in chunks
    },
    "OPTIM": {
        "NAME": "adam",
        "LR": 0.0003,
        "WEIGHT_DECAY": 5e-4,
        "MOMENTUM": 0.9,
        "SGD_DAMPNING": 0.0,
        "SGD_NESTEROV": False,
        "ADAM_BETA1": 0.9,
        "ADAM_BETA2": 0.999,
        "LR_SCHEDULER": "single_step",
        "STEPSIZE": (-1,),
        "GAMMA": 0.1,
        "MAX_EPOCH": 10,
        "WARMUP_EPOCH": -1,
        "WARMUP_TYPE": "linear",
        "WARMUP_CONS_LR": 1e-5,
        "WARMUP_MIN_LR": 1e-5,
        "WARMUP_RECOUNT": True,
    },
    "TRAIN": {"CHECKPOINT_FREQ": 0, "PRINT_FREQ": 10},
    "TEST": {
        "PER_CLASS_RESULT": False,
        "COMPUTE_CMAT": False,
        "NO_TEST": False,
        "SPLIT": "test",
        "FINAL_MODEL": "last_step",
    },
    # a method of ours and its weights, from which others learn without labels: a run's folder, or the rest
    "TEACHER": {"RUN": "", "TRAINER": "", "BACKBONE": "", "WEIGHTS": "", "OPTS": ()},
    "FEATURES": {"MAX_GIB": 10.0},  # bound on the kept features of the frozen image tower, for all runs together; 0: none
    "TRAINER": {"NAME": ""},
}

# A later file or a command line that names the one means not what an earlier file named of the others.
REPLACED = {"TEACHER.TRAINER": ("RUN", "WEIGHTS", "OPTS"), "TEACHER.RUN": ("TRAINER", "BACKBONE", "WEIGHTS", "OPTS")}

# Keys of earlier versions that changed no result: passed over in a file, such as a run's own.
RETIRED = {"TRAINER.PLPP.CHUNK_SIZE"}  # now a bound in MiB, MEMORY_MIB

# Dassl's keys that name a choice of which this engine has one: accepted as they are, so that configuration files merge.
FIXED = {
    "VERBOSE": True,
    "INPUT.NO_TRANSFORM": False,
    "DATALOADER.K_TRANSFORMS": 1,
    "DATALOADER.RETURN_IMG0": False,
    "DATALOADER.TRAIN_X.SAMPLER": "RandomSampler",
    "DATALOADER.TEST.SAMPLER": "SequentialSampler",
    "TRAIN.COUNT_ITER": "train_x",
    "TEST.EVALUATOR": "Classification",
    "OPTIM.STAGED_LR": False,
    "LOSS.NAME": "prograd",
    "LOSS.GM": False,
}


def get_cfg_default(trainer: type | None = None) -> CfgNode:
    """A node with every key that this engine and its methods (and a ``trainer`` of one's own) know, at its default."""
    cfg = copied(DEFAULTS)
    for key, default in registry.method_defaults(trainer).items():
        *parents, leaf = key.split(".")
        node = cfg
        for name in parents:
            if name not in node:
                node[name] = CfgNode()
            node = node[name]
        node.setdefault(leaf, default)
    cfg.TRAINER.PLPP = copied(node_defaults())
    return cfg


def copied(values: Mapping[str, Any]) -> CfgNode:
    """A node of its own with these values, nested as they are; lists hold no lists.

    It takes a small part of the time of yacs's constructor and ``clone()``, and a plan of many runs copies many.
    """
    new = CfgNode()
    for name, value in values.items():
        new[name] = copied(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
    return new


def merge_file(cfg: CfgNode, path: str | Path, above: tuple[Path, ...] = ()) -> None:
    """Merge a YAML file; keys and values as in :func:`set_value`.

    ``_BASE_`` names a file, relative to this one, that is merged before it (as in fvcore and Detectron2); ``above`` are those
    that led here.
    """
    loaded = _read_yaml(path)
    if (base := loaded.pop("_BASE_", None)) is not None:
        place = Path(path).resolve()
        if not isinstance(base, str) or place in above:
            raise InputError(f"config file {str(path)!r}: _BASE_: expected another file's name, got {base!r}")
        merge_file(cfg, place.parent / base, (*above, place))
    pairs = dict(_flat(loaded))
    _give_way(cfg, pairs)
    for key, value in pairs.items():
        if key in RETIRED:
            continue
        try:
            set_value(cfg, key, value)
        except InputError as e:
            raise InputError(f"config file {str(path)!r}: {e}") from e


def merge_list(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge ``KEY VALUE KEY VALUE ...`` of a command line."""
    if len(opts) % 2:
        raise InputError(f"expected KEY VALUE pairs, got a key without a value: {opts[-1]!r}")
    _give_way(cfg, dict(zip(opts[::2], opts[1::2], strict=True)))
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        set_value(cfg, key, text)


def _give_way(cfg: CfgNode, pairs: Mapping[str, object]) -> None:
    """Who names a teacher means that one: what a file before it said of another is forgotten. A run says everything; of a
    method the weights and the settings are its own, while the backbone stays."""
    for key, others in REPLACED.items():
        if pairs.get(key):
            for other in others:
                cfg.TEACHER[other] = DEFAULTS["TEACHER"][other]


def set_value(cfg: CfgNode, key: str, value: object) -> None:
    """Set one key, ``A.B.C``, keeping the type of its default. Text is read as Python where the default is not text.

    Raises:
        InputError: no such key (the nearest is named), or a value of another type.
    """
    if key in FIXED:
        if _coerce(key, value, FIXED[key]) != FIXED[key]:
            raise InputError(f"{key}: expected {FIXED[key]!r}, the only choice here, got {value!r}")
        return
    node = cfg
    *parents, leaf = key.split(".")
    for name in parents:
        node = node.get(name) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or leaf not in node or isinstance(node[leaf], CfgNode):
        raise unknown("configuration key", key, dict(_flat(cfg)))
    node[leaf] = _coerce(key, value, node[leaf])


def _coerce(key: str, given: object, default: object) -> object:
    value = given
    if isinstance(given, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(given)
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float):
        with contextlib.suppress(OverflowError, TypeError):
            value = float(value) if isinstance(value, int) else value
        fits = isinstance(value, float) and math.isfinite(value)
    elif isinstance(default, (tuple, list)):
        fits = isinstance(value, (tuple, list))
        like = type(default[0]) if default else str  # what is empty by default, INPUT.TRANSFORMS, is names
        kinds = (int, float) if like is float else (like,)
        fits = fits and all(isinstance(v, kinds) and not isinstance(v, bool) and _in_range(v) for v in value)
        value = type(default)(map(like, value)) if fits else value
    elif isinstance(default, str):
        fits = isinstance(value, (str, int, float))
        value = str(value)
    else:
        fits = isinstance(value, type(default)) and _in_range(value)
    if not fits:
        raise InputError(f"{key}: expected {_kind(default)} (default {default!r}), got {given!r}")
    return value


def _in_range(value: object) -> bool:
    """Whether text, or a number that arithmetic takes."""
    return isinstance(value, str) or abs(value) < 2**63


def _kind(default: object) -> str:
    kinds = {bool: "True or False", int: "an integer", float: "a number", str: "text", tuple: "a list", list: "a list"}
    return kinds[type(default)]


def _flat(node: dict, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in node.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
    return rows


def flat(cfg: CfgNode) -> dict[str, object]:
    """``{"OPTIM.LR": 0.002, ...}`` of a whole configuration, tuples as lists (as YAML and JSON read them back)."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in _flat(cfg)}


def differences(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """What two flat configurations disagree on, as far as it changes a result: ``["OPTIM.LR: 0.002, now 0.01"]``.

    A key that an earlier version did not have stood at its default.
    """
    old = {**flat(get_cfg_default()), **old}
    keys = [k for k in sorted(old.keys() | new.keys()) if k not in NOT_IN_THE_RESULT and k not in RETIRED]
    return [f"{k}: {old.get(k)!r}, now {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]


def to_yaml(cfg: CfgNode) -> str:
    def plain(node: CfgNode) -> dict:
        return {k: plain(v) if isinstance(v, CfgNode) else list(v) if isinstance(v, tuple) else v for k, v in node.items()}

    return yaml.safe_dump(plain(cfg), sort_keys=False)


def from_yaml(path: str | Path) -> dict[str, object]:
    """The flat configuration of a run's ``config.yaml``.

    Raises:
        InputError: no YAML file of keys and values, or an empty one.
    """
    if not (loaded := _read_yaml(path)):
        raise InputError(f"config file {str(path)!r}: expected the configuration of a run, got an empty file")
    return dict(_flat(loaded))


def of_run(folder: str | Path, trainer: str = "") -> tuple[CfgNode, type]:
    """The configuration that a run's folder records, and the class of its trainer.

    ``trainer``: the run's, where it is not of ours (package.module:Class): that file does not name what is imported.

    Raises:
        InputError: no configuration, an unknown trainer, a key or a value that this version does not know.
    """
    path = Path(folder) / "config.yaml"
    recorded = str(from_yaml(path).get("TRAINER.NAME", ""))
    if trainer and trainer.removesuffix(registry.SUFFIX) != recorded.removesuffix(registry.SUFFIX):
        raise InputError(f"--trainer {trainer!r}: expected the run's own, {recorded!r} (in {str(path)!r})")
    cls, *_ = registry.find_trainer(trainer) if trainer else registry.find_named_by_file(recorded, str(path), "--trainer")
    cfg = get_cfg_default(cls)
    merge_file(cfg, path)
    return cfg, cls


def _read_yaml(path: str | Path) -> dict[str, object]:
    """The keys and values of a YAML file, as they are nested in it; an empty file has none."""
    loaded = read_yaml(path, "config file")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"config file {str(path)!r}: expected keys and values, got {type(loaded).__name__}")
    return loaded
