"""A trained prompt on one's own images and class names: no data set, no Dassl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.data import DataSplit
from plpp_reg.data.augmentation import build_transform
from plpp_reg.engine import checkpoint, config
from plpp_reg.engine.evaluation import Classifier
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.io.files import write_tensors
from plpp_reg.io.pictures import ENDINGS, is_picture, open_picture

SUFFIX = ".safetensors"


class Prediction(NamedTuple):
    """One image: its class names with their probabilities (they sum to 1), the likeliest first.

    Names that several classes share have the class's number behind them: "missile (class 657)".
    """

    image: str
    probabilities: dict[str, float]


def load_run(
    folder: str | Path,
    classes: Sequence[str] = (),
    epoch: int | None = None,
    clip_model: nn.Module | None = None,
    trainer: str = "",
) -> Trainer:
    """The trainer of a run's folder, ready to predict: its prompts around ``classes``, or around those it was trained on.

    Args:
        folder: what ``--output-dir`` named.
        classes: class names; none: the run's own.
        epoch: which checkpoint; None: the best on validation if there is one, else the newest.
        clip_model: the run's backbone, if it is loaded already.
        trainer: of a run whose trainer is not one of ours, package.module:Class, which is imported.

    Raises:
        InputError: not a run's folder, empty class names or one given twice, or prompts that belong to their classes.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"run {str(folder)!r}: expected a run's folder with its config.yaml")
    _check_names(classes)
    cfg, cls = config.of_run(folder, trainer)
    cfg.MODEL.INIT_WEIGHTS = ""
    cfg.TRAINER.PLPP.ENABLED = False  # of no effect on a prediction
    if not (folder / cls.model_name).is_dir():
        raise InputError(
            f"run {str(folder)!r}: expected a run that has learned prompts, {cfg.TRAINER.NAME} has no checkpoint in it"
        )
    path = checkpoint.find(folder, cls.model_name, epoch)
    trained_on = (checkpoint.load(path).get("plpp_reg") or {}).get("classnames")
    if not classes and not trained_on:
        raise InputError(f"run {str(folder)!r}: its checkpoint does not say its class names: give them with --classes")
    if classes:
        cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    data = DataSplit([], [], [], list(classes or trained_on))
    loaded = Trainer(cls, cfg, data=data, clip_model=clip_model, log=RunLog(quiet=True))
    loaded.saving.load_weights(path)
    return loaded


def _check_names(classes: Sequence[str]) -> None:
    """The text tower sees neither capitals nor which kind of space it was: such names would share one class's probability."""
    if len(classes) == 1:
        raise InputError(f"--classes: expected two names or more, with spaces between them, got {classes[0]!r} alone")
    seen: dict[str, str] = {}
    for name in classes:
        read = " ".join(name.replace("_", " ").lower().split())
        if not read:
            raise InputError(f"--classes: expected names, got {name!r}")
        if read in seen:
            raise InputError(f"--classes: expected different names, got {seen[read]!r} and {name!r}")
        seen[read] = name


def _told_apart(classnames: Sequence[str]) -> list[str]:
    """Data sets may have a name twice (open_clip's names of ImageNet do)."""
    count = Counter(classnames)
    return [f"{name} (class {i})" if count[name] > 1 else name for i, name in enumerate(classnames)]


def find_images(places: Sequence[str | Path]) -> list[Path]:
    """Files as they are named, and the pictures in folders, sorted."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if is_picture(p))
            if not inside:
                raise InputError(f"folder {str(place)!r}: expected pictures ({' '.join(ENDINGS)}), got none")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise InputError(f"image {str(place)!r}: no such file or folder")
    return found


@torch.no_grad()
def predict(trainer: Trainer, images: Sequence[str | Path], unreadable: list[InputError] | None = None) -> Iterator[Prediction]:
    """Class probabilities of each image, in batches of DATALOADER.TEST.BATCH_SIZE.

    Args:
        trainer: of :func:`load_run`.
        images: files.
        unreadable: takes the errors of pictures that cannot be read, and the others go on; None: the first one is raised.

    Raises:
        InputError: a picture cannot be read, and ``unreadable`` is None.
    """
    names = _told_apart(trainer.data.classnames)
    transform, size = build_transform(trainer.cfg, train=False), trainer.cfg.DATALOADER.TEST.BATCH_SIZE
    with trainer.computing():
        classifier = Classifier(trainer.method)
    for i in range(0, len(images), size):
        pixels = {}
        for path in images[i : i + size]:
            try:
                pixels[path] = transform(open_picture(path))
            except InputError as e:
                if unreadable is None:
                    raise
                unreadable.append(e)
        if not pixels:
            continue
        batch = {"img": torch.stack(list(pixels.values())).to(trainer.device)}
        with trainer.computing():
            rows = classifier(batch).softmax(-1).tolist()
        for path, row in zip(pixels, rows, strict=True):
            ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
            yield Prediction(str(path), dict(ranked))


@torch.no_grad()
def export(trainer: Trainer, path: str | Path) -> str:
    """Write everything that is needed of a trained prompt into one safetensors file.

    Tensors: ``class_features`` (C, embed_dim), normalised, ``logit_scale`` (the factor of cosines), and what was learned
    under its checkpoint's names. Metadata (JSON): ``classnames``, ``backbone``, ``trainer``, ``input`` (size, mean and
    standard deviation of its images), and ``left_out``: why there are no ``class_features``, where their cosines with the
    frozen tower's features would not be what the method computes.

    Returns:
        ``left_out``, empty if nothing is.

    Raises:
        InputError: ``path`` has not the suffix .safetensors, or cannot be written to.
    """
    path = Path(path)
    if path.suffix != SUFFIX or path.is_dir():  # of a run's own files none has it
        raise InputError(f"file {str(path)!r}: expected the name of a file that ends in {SUFFIX}")
    tensors: dict[str, Tensor] = dict(trainer.method.saved.state_dict())
    tensors["logit_scale"] = trainer.clip_model.logit_scale.exp().float()
    left_out = trainer.method.not_exported
    if not left_out:
        with trainer.computing():
            tensors["class_features"] = trainer.method.encode_classes().features.float()
    cfg = trainer.cfg
    described: dict[str, Any] = {
        "classnames": [name.replace("_", " ") for name in trainer.data.classnames],
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "trainer": cfg.TRAINER.NAME,
        "input": {
            "size": list(cfg.INPUT.SIZE),
            "interpolation": cfg.INPUT.INTERPOLATION,
            "mean": list(cfg.INPUT.PIXEL_MEAN),
            "std": list(cfg.INPUT.PIXEL_STD),
        },
        "left_out": left_out,
    }
    try:
        write_tensors(path, tensors, {name: json.dumps(value) for name, value in described.items()})
    except OSError as e:
        raise InputError(f"file {str(path)!r}: expected a place to write to, got {e}") from e
    return left_out
