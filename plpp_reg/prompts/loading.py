"""What was learned, ready to be used: out of a run's folder, out of the folder of a test, out of a checkpoint of upstream's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import encode
from plpp_reg.data import DataSplit
from plpp_reg.data.names import check_names
from plpp_reg.engine import checkpoint, config, registry
from plpp_reg.engine.arguments import shipped_config
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Method
from plpp_reg.engine.taught import known_of
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.prompts import contexts
from plpp_reg.prompts.inspect import find_checkpoint
from plpp_reg.results.record import read_if_whole
from plpp_reg.trainers.vpt import VPT

USUAL_WORDS = "a photo of a"  # what upstream's deep methods begin with, of which the last may stay words


def load_run(
    folder: str | Path,
    classes: Sequence[str] = (),
    epoch: int | None = None,
    clip_model: nn.Module | None = None,
    trainer: str = "",
    backbone: str = "",
    position: str = "end",
    device: str = "",
    precision: str = "",
) -> Trainer:
    """The trainer of a run, ready to predict: its prompts around ``classes``, or around those that it was trained on.

    Args:
        folder: what ``--output-dir`` named, of a training or of a test (``--eval-only``); or a checkpoint or a folder of one,
            ours or upstream's.
        classes: class names; none: the run's own.
        epoch: which checkpoint; None: the best on validation if there is one, else the newest.
        clip_model: the run's backbone, if it is loaded already.
        trainer: of a run whose trainer is not one of ours, package.module:Class, which is imported.
        backbone: the CLIP that the prompts were trained on; a run of ours knows it.
        position: where the class name stands; upstream's checkpoints of CoOp do not say.
        device: "cpu", "cuda", "cuda:1"; empty: what the run's configuration says.
        precision: "fp32" and the like; empty: the run's.

    Raises:
        InputError: nothing to load, empty class names or two that CLIP reads as one, or prompts that belong to their classes.
    """
    place = Path(folder)
    if classes:
        check_classes(classes)
    run = place.parent.parent if place.is_file() else place
    if (run / "config.yaml").is_file():
        cfg, cls = config.of_run(run, trainer)
        path, own_names = _of_ours(run, cfg, cls, place if place.is_file() else None, epoch)
        content = None if path is None else checkpoint.load(path)
        own_names = own_names or _trained_on(content)
        cfg.MODEL.BACKBONE.NAME = backbone or cfg.MODEL.BACKBONE.NAME
    else:
        path = _upstreams_file(place, epoch)
        content = checkpoint.load(path)
        cfg, cls, clip_model, own_names = _of_upstream(content, path, backbone, position, clip_model, trainer)
    if not classes and not own_names:
        raise InputError(f"{str(folder)!r}: does not say its class names: give them with --classes")
    cfg.MODEL.INIT_WEIGHTS = ""
    cfg.TRAINER.PLPP.ENABLED = False  # of no effect on a prediction
    if classes:
        cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    if precision:
        config.set_value(cfg, cls.Config.key("prec"), precision)
    _choose_device(cfg, device)
    known = known_of(content) if cls.predicts_by_teacher and content is not None else None
    data = DataSplit([], [], [], list(classes or own_names))
    loaded = Trainer(cls, cfg, data, clip_model, RunLog(quiet=True), known=known)
    if content is not None:
        loaded.saving.take_to_predict(content, path)
    return loaded


def check_classes(classes: Sequence[str]) -> None:
    """
    Raises:
        InputError: ``--classes`` are not two names or more that CLIP tells apart.
    """
    if len(classes) == 1:
        raise InputError(f"--classes: expected two names or more, with spaces between them, got {classes[0]!r} alone")
    check_names(classes, "--classes")


def _choose_device(cfg: CfgNode, device: str) -> None:
    kind, _, number = device.partition(":")
    if not device:
        return
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise InputError(f"--device: expected cpu, cuda or cuda:<number>, got {device!r}")
    cfg.USE_CUDA = kind == "cuda"
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(number or 0) >= count:
            raise InputError(f"--device {device}: expected one of {count} GPUs that torch sees here; --device cpu needs none")
        torch.cuda.set_device(int(number or 0))


# ---- ours --------------------------------------------------------------------------------------------------------------


def _of_ours(run: Path, cfg: CfgNode, cls: type[Method], file: Path | None, epoch: int | None) -> tuple[Path | None, list[str]]:
    """The checkpoint that is meant, None for a method that learns nothing, and the class names that the run's record has."""
    tested = (read_if_whole(run) or {}).get("tested")
    tested = tested if isinstance(tested, dict) else {}
    names = tested.get("classnames")
    names = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    if not cls.learns:
        return None, names
    if file is not None:
        return file, []
    if (run / cls.model_name).is_dir():
        return checkpoint.find(run, cls.model_name, epoch), []
    path = tested.get("checkpoint")
    if not isinstance(path, str):
        raise InputError(
            f"run {str(run)!r}: expected a run that has learned prompts, {cfg.TRAINER.NAME} has no checkpoint in it"
        )
    if epoch is not None:
        raise InputError(f"--load-epoch: expected none with {str(run)!r}, a test of {path!r}")
    if not Path(path).is_file():
        raise InputError(f"run {str(run)!r}: it tested {path!r}, which is not there any more: name the run that was trained")
    return Path(path), names


def _trained_on(content: dict[str, Any] | None) -> list[str]:
    return ((content or {}).get("plpp_reg") or {}).get("classnames") or []


# ---- upstream's --------------------------------------------------------------------------------------------------------


def _upstreams_file(place: Path, epoch: int | None) -> Path:
    try:
        return find_checkpoint(place, epoch)
    except InputError as e:
        raise InputError(f"run {str(place)!r}: expected a run's folder with its config.yaml, or a checkpoint; {e}") from e


def _of_upstream(
    content: dict[str, Any], path: Path, backbone: str, position: str, clip_model: nn.Module | None, trainer: str
) -> tuple[CfgNode, type[Method], nn.Module, list[str]]:
    """A configuration for what a checkpoint's tensors are, and the class names whose tokens it holds."""
    name = method_of(content, path)
    if name == "PromptKD":
        raise InputError(
            f"checkpoint {str(path)!r}: expected prompts that predict by themselves, got a student of PromptKD, whose class "
            "features are its teacher's: plpp train --trainer PromptKD --eval-only --model-dir FOLDER, with TEACHER, tests it, "
            "and the folder of that test is taken here"
        )
    cls, plain, _ = registry.find_trainer(trainer or name)
    if not backbone and clip_model is None:
        raise InputError(f"--backbone: expected the CLIP that {str(path)!r} was trained on, such as ViT-B/16, got none")
    settings = registry.find_trainer(name)[0].settings_of(checkpoint.plain_tensors(content))
    cfg = config.get_cfg_default(cls)
    config.merge_file(cfg, shipped_config("trainers", "common", "clip.yaml"))
    clip_model = clip_model or load_clip(backbone)
    cfg.MODEL.BACKBONE.NAME, cfg.TRAINER.NAME = backbone, plain
    cfg.INPUT.SIZE = (clip_model.visual.input_resolution,) * 2
    if getattr(clip_model, "pixel_mean", None):
        cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD = list(clip_model.pixel_mean), list(clip_model.pixel_std)
    table, names = clip_model.token_embedding.weight, list[str]()
    if name != "VPT":  # which has no text context
        context, _ = contexts.context_of(content, path)
        if context.shape[-1] != table.shape[1]:
            got = f"{backbone or 'one'}, of width {table.shape[1]}"
            wanted = f"the CLIP that these prompts, of width {context.shape[-1]}, were trained on"
            raise InputError(f"--backbone: expected {wanted}, got {got}")
        if any(key.endswith("token_suffix") for key in content["state_dict"]):
            names = contexts.class_names(content, path, table)
        if name in ("MaPLe", "IVLP"):
            names, settings["ctx_init"] = _behind_the_context(names, context.shape[-2])
    if name in ("CoOp", "KgCoOp"):
        settings["class_token_position"] = position
    for key, value in {**settings, "prec": "fp32"}.items():
        config.set_value(cfg, f"TRAINER.{cls.Config.node}.{key.upper()}", value)
    return cfg, cls, clip_model, names


def _behind_the_context(names: list[str], n_ctx: int) -> tuple[list[str], str]:
    """Where a method learns the first of :data:`USUAL_WORDS` alone, the rest stands before each name: the names without it,
    and the words that the context began with; none where the rest is not there."""
    rest = encode(USUAL_WORDS)[n_ctx:]
    if not rest:
        return names, ""
    if not all(encode(name)[: len(rest)] == rest for name in names):
        return names, ""
    words = " ".join(USUAL_WORDS.split()[-len(rest) :])
    return [name.removeprefix(words).strip() for name in names], USUAL_WORDS


def method_of(content: dict[str, Any], path: Path) -> str:
    """The method that a checkpoint of upstream's is of, by its tensors. KgCoOp and ProGrad predict as CoOp does, PromptSRC as
    IVLP.

    Raises:
        InputError: none of ours.
    """
    state = checkpoint.plain_tensors(content)
    if not {"ctx", "prompt_learner.ctx"} & state.keys():
        if any(name.startswith("VPT_image_trans.") for name in state):
            return "PromptKD"
        if VPT.settings_of(state).get("n_ctx_vision"):
            return "VPT"
        raise InputError(f"checkpoint {str(path)!r}: expected what a prompt learner saved, got {', '.join(sorted(state)[:4])}")
    contexts.context_of(content, path)  # refuses what is no context
    if "ctx" in state:
        if "meta_net.linear2.weight" in state:
            return "CoCoOp"
        return "KgCoOp" if {"meta_net.linear1.weight", "bias_vectors"} & state.keys() else "CoOp"
    return "MaPLe" if "prompt_learner.proj.weight" in state else "IVLP"
