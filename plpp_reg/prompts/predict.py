"""A trained prompt on one's own images and class names: no data set, no Dassl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from plpp_reg.data.augmentation import build_transform
from plpp_reg.data.loaders import ahead
from plpp_reg.data.remarks import counted_endings, some
from plpp_reg.engine.evaluation import Classifier
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError, line_of
from plpp_reg.io.pictures import ENDINGS, files_below, open_picture


class Prediction(NamedTuple):
    """One image: its class names with their probabilities (they sum to 1), the likeliest first; or why it cannot be read.

    Names that several classes share have the class's number behind them: "missile (class 657)".
    """

    image: str
    probabilities: dict[str, float]
    error: str = ""


def class_titles(classnames: Sequence[str]) -> list[str]:
    """The names of the classes, told apart: data sets may have one twice (open_clip's names of ImageNet do)."""
    count = Counter(classnames)
    return [f"{name} (class {i})" if count[name] > 1 else name for i, name in enumerate(classnames)]


class Images(NamedTuple):
    """What is to be predicted, and a line for each folder in which something was passed over."""

    paths: list[Path]
    remarks: list[str]


def find_images(places: Sequence[str | Path]) -> Images:
    """Files as they are named, and the pictures in folders and below them, sorted.

    Raises:
        InputError: nothing is there, or a folder has no picture.
    """
    found = Images([], [])
    for place in map(Path, places):
        if place.is_dir():
            inside = files_below(place)
            others = [counted_endings(map(str, inside.others))] if inside.others else []
            others += [some(list(map(str, inside.links)), "link to a folder", "links to folders")] if inside.links else []
            if not inside.pictures:
                got = " and ".join(others) or "none"
                raise InputError(f"folder {str(place)!r}: expected pictures ({' '.join(ENDINGS)}), got {got}")
            found.paths.extend(inside.pictures)
            found.remarks.extend(f"not used in {str(place)!r}: {what}" for what in others)
        elif place.exists():
            found.paths.append(place)
        else:
            raise InputError(f"image {str(place)!r}: no such file or folder")
    return found


@torch.no_grad()
def predict(trainer: Trainer, images: Sequence[str | Path], threads: int = 1, temperature: float = 1.0) -> Iterator[Prediction]:
    """Class probabilities of each image, in their order, DATALOADER.TEST.BATCH_SIZE at a time.

    While one batch is classified, ``threads`` threads read the next; no more than these are in memory. An image that cannot be
    read is named by its prediction's ``error``.

    Args:
        trainer: of :func:`plpp_reg.prompts.loading.load_run`.
        images: files.
        threads: that read pictures.
        temperature: that logits are divided by (:mod:`plpp_reg.prompts.calibration` fits one).
    """
    names, size = class_titles(trainer.data.classnames), trainer.cfg.DATALOADER.TEST.BATCH_SIZE
    transform = build_transform(trainer.cfg, train=False)

    def pixels(path: str | Path) -> Tensor | InputError:
        try:
            return transform.pixels(open_picture(path))
        except InputError as e:
            return e

    with trainer.computing():
        classifier = Classifier(trainer.method)
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    for batch, read in zip(batches, ahead(pixels, batches, threads), strict=True):
        rows = iter(())
        if pictures := [picture for picture in read if isinstance(picture, Tensor)]:
            with trainer.computing():
                inputs = {"img": transform.normalized(torch.stack(pictures)).to(trainer.device)}
                rows = iter((classifier(inputs).float() / temperature).softmax(-1).tolist())
        for path, picture in zip(batch, read, strict=True):
            if isinstance(picture, InputError):
                yield Prediction(str(path), {}, (line_of(picture) or "").removeprefix(f"image {path}: "))
            else:
                ranked = sorted(zip(names, next(rows), strict=True), key=lambda pair: -pair[1])
                yield Prediction(str(path), dict(ranked))
