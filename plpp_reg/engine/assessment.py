"""How good the prompts are, for a run's record: the test, zero-shot CLIP on the same images, and where it goes wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from plpp_reg.data import template
from plpp_reg.data.contents import content_sha256
from plpp_reg.engine.evaluation import Classification
from plpp_reg.engine.trainer import Trainer
from plpp_reg.io.files import write_atomically, write_text
from plpp_reg.results import confusion
from plpp_reg.results.evaluation import MOST_MISTAKES, paired_over_images, wilson

CONFUSION = "confusion"  # .csv and .png in the run's folder

NOTHING: dict[str, Any] = {"metrics": {}, "evaluation": None}  # of what was not tested


def assess(trainer: Trainer, split: str) -> dict[str, Any]:
    """``metrics`` and ``evaluation`` of the prompts as they are (:mod:`plpp_reg.results.evaluation` says what is in it)."""
    found = trainer.classify(split)
    images = len(found.label)
    evaluation: dict[str, Any] = {
        "images": images,
        "interval": wilson(int(found.correct.sum()), images),
        "zero_shot": None,
        "difference": None,
        "classes": list(trainer.data.classnames),
        "per_class": found.per_class(),
        "confusion": found.confusions(),
        "mistakes": _mistakes(trainer, split, found),
    }
    if trainer.method.learns:
        templates = [template(trainer.cfg.DATASET.NAME, trainer.cfg.DATASET.TEMPLATE)]
        plain = trainer.classify_zero_shot(templates, split)
        interval = wilson(int(plain.correct.sum()), images)
        evaluation["zero_shot"] = {"templates": templates, "metrics": plain.evaluate(), "interval": interval}
        gained, lost = (int((a & ~b).sum()) for a, b in ((found.correct, plain.correct), (plain.correct, found.correct)))
        evaluation["difference"] = paired_over_images(gained, lost, images)
    if trainer.cfg.TEST.COMPUTE_CMAT and trainer.saving.output_dir:
        write_confusion(trainer, found, trainer.saving.output_dir)
    return {"metrics": found.evaluate(), "evaluation": evaluation}


def _mistakes(trainer: Trainer, split: str, found: Classification) -> list[dict[str, Any]]:
    images = getattr(trainer.data, split)
    return [
        {
            "image": images[index].name,
            "path": os.path.abspath(images[index].impath),
            "sha256": content_sha256(images[index].impath),
            "label": label,
            "predicted": predicted,
            "probability": probability,
            "probability_of_label": of_label,
        }
        for index, label, predicted, probability, of_label in found.mistakes(MOST_MISTAKES)
    ]


def write_confusion(trainer: Trainer, found: Classification, folder: Path) -> None:
    """``confusion.csv`` and, with matplotlib, ``confusion.png``: how many images of each class were called what."""
    counts, names = found.confusion.tolist(), list(trainer.data.classnames)
    write_text(folder / f"{CONFUSION}.csv", confusion.to_csv(counts, names))
    try:
        png = confusion.picture(counts, names, f"{trainer.cfg.TRAINER.NAME} on {trainer.cfg.DATASET.NAME}")
    except ImportError:
        trainer.log(f"matplotlib is not installed: no {CONFUSION}.png beside {CONFUSION}.csv")
    else:
        write_atomically(folder / f"{CONFUSION}.png", lambda path: path.write_bytes(png))
