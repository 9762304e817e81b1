"""Temperature scaling (arXiv 1706.04599): one number that makes a prompt's probabilities as sure as they are right."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from plpp_reg.data import DataSplit
from plpp_reg.data.contents import contents_sha256
from plpp_reg.data.loaders import load_data
from plpp_reg.engine.evaluation import Classification, Classifier
from plpp_reg.engine.frozen import weights_sha256
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.io.files import read_json, write_text
from plpp_reg.results.numbers import figure
from plpp_reg.results.record import is_number

FILE = "calibration.json"  # in a run's folder: what was fitted, and of what
BOUNDS = (0.01, 100.0)  # of the temperature


class Part(NamedTuple):
    """Images of a part of the data, and their calibration error as it was and as it is, percent."""

    images: int
    before: float
    after: float


class Calibration(NamedTuple):
    """``temperature``: what logits are divided by; fitted on ``validation``, measured on ``test`` (None: there is none)."""

    temperature: float
    validation: Part
    test: Part | None

    def __str__(self) -> str:
        parts = {"validation": self.validation, "test": self.test}
        said = [
            f"{part.images:,} {name} pictures, {figure(part.before, 1)}% before, {figure(part.after, 1)}% after"
            for name, part in parts.items()
            if part is not None
        ]
        return f"temperature {self.temperature:.3f}, fitted on validation; calibration error on {'; on '.join(said)}"


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The temperature of the least cross-entropy of ``logits / temperature``: logits (N, C), label (N,).

    Raises:
        InputError: there is none within :data:`BOUNDS`: every image is classified right, say, by a margin.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), label).item()

    low, high = map(math.log, BOUNDS)
    right = (logits.argmax(1) == label).double().mean().item()
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    if right == 1 or min(found.x - low, high - found.x) < 1e-3:  # all right: the smaller the temperature, the smaller the loss
        raise InputError(
            f"--calibrated: expected validation pictures of which some are wrong and some right, to fit a temperature on, got "
            f"{len(label)}, {right:.0%} of them right"
        )
    return math.exp(found.x)


def calibrate(trained: Trainer, folder: str | Path) -> Calibration:
    """Of a run, by the validation images of its own data; what was fitted before is taken as long as nothing has changed.

    Args:
        trained: of :func:`plpp_reg.prompts.loading.load_run`, with the class names that it was trained on.
        folder: the run's, or a checkpoint in it; the result is kept in the run's folder.

    Raises:
        InputError: its data set is not there, or has no validation images, or other classes.
    """
    name = trained.cfg.DATASET.NAME
    if not name:
        raise InputError("--calibrated: expected a run of ours, which says its data set, got a checkpoint alone")
    of = {"weights": weights_sha256(trained.method.saved)}
    place = (Path(folder) if Path(folder).is_dir() else Path(folder).parent.parent) / FILE
    try:
        data = load_data(trained.cfg, trains=False)
        now = {**of, **{part: contents_sha256(getattr(data, part)) for part in ("val", "test")}}
    except InputError as e:
        if (kept := _kept(place, of)) is not None:
            return kept
        raise InputError(f"--calibrated: expected the data set {name!r}, to fit on its validation pictures: {e}") from e
    if list(data.classnames) != list(trained.data.classnames):
        raise InputError(f"--calibrated: expected the classes that the run was trained on in {name!r}, got others")
    if not data.val:
        raise InputError(f"--calibrated: expected validation pictures in data set {name!r}, to fit a temperature on, got none")
    if (kept := _kept(place, now)) is not None:
        return kept
    found = _fitted(trained, data)
    with contextlib.suppress(OSError):  # a folder that cannot be written to: it is fitted again next time
        write_text(place, json.dumps({"of": now, **found._asdict()}, indent=1) + "\n")
    return found


def _kept(place: Path, of: dict[str, str]) -> Calibration | None:
    """What was fitted before; None where it was for something else than ``of`` says."""
    try:
        told = read_json(place)
        if not all(told["of"].get(name) == sha256 for name, sha256 in of.items()) or not is_number(told["temperature"]):
            return None
        parts = [None if told[name] is None else Part(*told[name]) for name in ("validation", "test")]
        if not BOUNDS[0] <= told["temperature"] <= BOUNDS[1] or not all(map(is_number, [v for p in parts if p for v in p])):
            return None
        return Calibration(told["temperature"], *parts)
    except (InputError, KeyError, TypeError, AttributeError):
        return None


@torch.no_grad()
def _fitted(trained: Trainer, data: DataSplit) -> Calibration:
    known = trained.teacher.heard() if trained.method.predicts_by_teacher else None
    trainer = Trainer(type(trained.method), trained.cfg, data, trained.clip_model, RunLog(quiet=True), known=known)
    trainer.method.saved.load_state_dict(trained.method.saved.state_dict())
    rows = list(_logits(trainer, "val"))
    logits, label = (torch.cat(parts) for parts in zip(*rows, strict=True))
    temperature = fit_temperature(logits, label)
    validation = _measured(iter(rows), temperature, len(data.classnames))
    test = _measured(_logits(trainer, "test"), temperature, len(data.classnames)) if data.test else None
    return Calibration(temperature, validation, test)


def _logits(trainer: Trainer, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch: logits (B, C) float32, and labels."""
    with trainer.computing():
        classifier = Classifier(trainer.method)
        for batch in trainer.batches(split):
            yield classifier(batch).float().cpu(), batch["label"].cpu()


def _measured(rows: Iterator[tuple[Tensor, Tensor]], temperature: float, classes: int) -> Part:
    before, after = Classification(classes), Classification(classes)
    for logits, label in rows:
        before.process(logits, label)
        after.process(logits / temperature, label)
    errors = (found.evaluate()["calibration_error"] for found in (before, after))
    return Part(len(before.label), *errors)
