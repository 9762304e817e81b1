"""Trainer: the sum, the step, precision, PLPP, logging, checkpoints and resume, written once and for every method.

Nobody subclasses it, and it knows no method: what varies is said by a :class:`~plpp_reg.engine.method.Method`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.data import DataSplit
from plpp_reg.data.loaders import build_loader, load_data, part_of
from plpp_reg.engine.backbone import check_input, check_precision, computing, precision_on
from plpp_reg.engine.distributed import Ranks, current
from plpp_reg.engine.evaluation import Classification, evaluate
from plpp_reg.engine.features import FrozenFeatures
from plpp_reg.engine.frozen import FrozenEncoder
from plpp_reg.engine.log import BatchOf, Clock, Meters, RunLog, batch_line
from plpp_reg.engine.method import Backbone, Batch, Method
from plpp_reg.engine.optim import build_lr_schedule, build_optimizer
from plpp_reg.engine.plpp import ContextTerms, measured, readable, regularizer_for
from plpp_reg.engine.saving import Saving
from plpp_reg.engine.state import RunState
from plpp_reg.engine.taught import Known
from plpp_reg.engine.teacher import Teacher
from plpp_reg.engine.zero_shot import zero_shot_classes
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import Components, PerplexityRegularizer

AT_ONCE = 4096  # kept features that zero-shot CLIP classifies together


class NonFiniteLoss(RuntimeError):
    """Training stopped before a non-finite loss could reach the weights."""


class Trainer:
    """Trains one method on one data set.

    Args:
        method: its class.
        cfg: the whole configuration.
        data: images and class names; None: what ``cfg.DATASET`` names.
        clip_model: a frozen CLIP; None: what ``cfg.MODEL.BACKBONE`` names.
        log: where lines go; None: standard output.
        teacher: of a method that distils; None: what ``cfg.TEACHER`` names, which is read when it is needed.
        known: what a checkpoint keeps of the teacher.
    """

    def __init__(
        self,
        method: type[Method],
        cfg: CfgNode,
        data: DataSplit | None = None,
        clip_model: nn.Module | None = None,
        log: RunLog | None = None,
        teacher: Teacher | None = None,
        known: Known | None = None,
    ) -> None:
        start = time.perf_counter()
        self.cfg, self.log, self.state = cfg, log or RunLog(), RunState()
        config, precision_key = method.Config.read(cfg), method.Config.key("prec")
        self.ranks = current()
        cuda = cfg.USE_CUDA and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.precision = precision_on(self.device, precision_key, config.prec, self.log)
        data = data or load_data(cfg)
        self.log(
            f"Data set {cfg.DATASET.NAME}: {len(data.classnames)} classes, {len(data.train):,} images for training, "
            f"{len(data.val):,} for choosing, {len(data.test):,} for testing"
        )
        for remark in data.remarks:
            self.log(f"  {remark}")
        if clip_model is None:
            self.log(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME}, {self.precision} on {self.device})")
            clip_model = load_clip(cfg.MODEL.BACKBONE.NAME, self.precision, self.device)
        check_precision(clip_model, precision_key, self.precision)
        self.clip_model = clip_model.to(self.device)
        if method.splits_classes and self.ranks.size > (classes := len(data.classnames)):
            raise InputError(f"expected at most a process a class ({classes}), got {self.ranks.size} processes")
        check_input(cfg, clip_model)
        backbone = Backbone(clip_model, TextTower(clip_model, cfg.MODEL.TEXT_MEMORY_MIB), ImageTower(clip_model))
        random.seed(cfg.SEED)  # whatever was drawn before, the run starts the same
        np.random.seed(cfg.SEED)
        torch.manual_seed(cfg.SEED)
        self.teacher: Teacher | None = None
        if method.distils:
            at = self.precision, self.device, self.clip_model
            self.teacher = teacher or Teacher(cfg, data.classnames, *at, say=self.log, known=known)
        self.method = method(config, backbone, data.classnames, self.log, self.teacher)
        self.data = self.method.split(data)
        self.parameters = list(self.method.parameters())
        self.plpp = ContextTerms(cfg, clip_model) if cfg.TRAINER.PLPP.ENABLED else None
        self.scaler = torch.amp.GradScaler(enabled=self.precision == "amp" and self.device.type == "cuda")
        self.optimizer = self.schedule = None
        if method.learns:
            self.optimizer = build_optimizer(self.parameters, cfg.OPTIM)
            self.schedule = build_lr_schedule(self.optimizer, cfg.OPTIM)
        self.saving = Saving(
            self.method,
            self.optimizer,
            self.schedule,
            self.scaler,
            self.state,
            same=lambda: self._same,
            epochs=cfg.OPTIM.MAX_EPOCH,
            frequency=cfg.TRAIN.CHECKPOINT_FREQ,
            other_classes=cfg.DATASET.SUBSAMPLE_CLASSES == "new",
            say=self.log,
        )
        if method.learns and cfg.MODEL.INIT_WEIGHTS:
            self.saving.load_weights(Path(cfg.MODEL.INIT_WEIGHTS))
        self.pictures_sha256: dict[str, str] = {}  # of the parts of the data that a run reads: plpp_reg.data.contents
        self._loaders: dict[str, DataLoader[Any]] = {}
        self.state.add({"set-up": time.perf_counter() - start})

    @functools.cached_property
    def _same(self) -> dict[str, Any]:
        same = {"files": self.data.sha256(), "precision": self.precision, "device": self.device.type}
        if self.teacher is not None:
            same["teacher"] = self.teacher.label
        learned_from = {part: sha256 for part, sha256 in self.pictures_sha256.items() if part in ("train", "val")}
        return {**same, "pictures": learned_from} if learned_from else same

    @property
    def regularizer(self) -> PerplexityRegularizer | None:
        """PLPP's, where it is asked for."""
        return self.plpp.regularizers[0] if self.plpp else None

    # ---- what the method sees ------------------------------------------------------------------------------------

    def loader(self, split: str) -> DataLoader[Any]:
        """Of one part of the data, made once.

        Raises:
            InputError: that part has no images.
        """
        if split not in self._loaders:
            items, pixels = part_of(self.cfg, self.data, split), self.method.inputs.pixels
            self._loaders[split] = build_loader(
                self.cfg, items, split == "train", self.device.type == "cuda", pixels, self.ranks
            )
        return self._loaders[split]

    @functools.cached_property
    def frozen_features(self) -> dict[str, FrozenFeatures]:
        """By their names in a batch: those that are computed ahead."""
        return {name: self._features_of(encoder) for name, encoder in self.method.inputs.of("train").items()}

    def _features_of(self, encoder: FrozenEncoder) -> FrozenFeatures:
        return FrozenFeatures(
            encoder, self.cfg, self.data, self.precision, self.device, self.ranks, self.log.progress, self.state.phase
        )

    def batches(self, split: str) -> Iterator[Batch]:
        """A split's batches of this epoch, on the device, with what the method sees of each image."""
        loader = self.loader(split)
        loader.batch_sampler.epoch = self.state.epoch
        unlabelled = split == "train" and not self.method.inputs.labels
        ahead = {name: self.frozen_features[name].of(split, self.state.epoch) for name in self.method.inputs.of(split)}
        for batch in loader:
            if unlabelled:
                del batch["label"]
            batch.update({name: features[batch["index"]] for name, features in ahead.items()})
            yield {name: t.to(self.device, non_blocking=True) for name, t in batch.items()}

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Autocast where PREC is amp; nothing otherwise, the weights' own dtype rules then."""
        return computing(self.device, self.precision)

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, output_dir: str | Path | None = None, after_epoch: Callable[[Trainer], None] | None = None) -> None:
        """All epochs that are left. With ``output_dir``, a checkpoint after each epoch: older ones that CHECKPOINT_FREQ does
        not ask for are removed once the next is whole. ``after_epoch`` may add figures to ``state.history[-1]``; they are kept.

        Raises:
            NonFiniteLoss: a loss is inf or nan; the last good checkpoint is kept.
        """
        self.saving.output_dir = Path(output_dir) if output_dir else None
        if self.optimizer is None:
            self.log("Nothing to train")
            return
        state, before = self.state, self.state.epoch
        epochs = self.log.progress(range(before, self.cfg.OPTIM.MAX_EPOCH), "epochs", before, self.cfg.OPTIM.MAX_EPOCH)
        for _ in epochs:
            start = time.perf_counter()
            with state.phase("training"):
                means = self.train_epoch()
            # a finite loss can have a gradient that is not
            if not torch.stack([p.isfinite().all() for p in self.parameters]).all():
                raise NonFiniteLoss(
                    f"the trained parameters are not finite after epoch {state.epoch + 1}: training stopped, "
                    f"{self.saving.last_good()}"
                )
            self.schedule.step()
            state.epoch += 1
            state.history.append(means)
            self.method.end_epoch(state.epoch)
            epochs.set_postfix({name: f"{value:.3f}" for name, value in means.items() if name != "lr"})
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                self._keep_best()
            state.seconds += time.perf_counter() - start
            if after_epoch is not None:
                after_epoch(self)
            self.saving.save_epoch()
        self.log("Finish training")

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training images; the means of what was logged, and the learning rate."""
        batches = len(self.loader("train"))
        meters, data_clock, batch_clock = Meters(), Clock(), Clock()
        for index, batch in enumerate(self.log.progress(self.batches("train"), f"epoch {self.state.epoch + 1}", total=batches)):
            data_clock.tick()
            meters.update(self.step(batch, index, with_perplexity=index + 1 == batches))
            batch_clock.tick()
            self._log_batch(index, batches, meters, data_clock, batch_clock)
            data_clock.start = batch_clock.start
        return {**meters.means(), "lr": self.learning_rate}

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self, batch: Batch, index: int = 0, with_perplexity: bool = False) -> dict[str, float]:
        """One update; every loss by its name, their sum as ``loss``, and the metrics.

        The host waits for the device once, where all of them come over (a gradient scaler waits for its own verdict).
        """
        with self.computing():
            losses, logs = self.losses(batch, with_perplexity)
        values = self.ranks.mean_values({**self.method.metrics, **losses, **{f"log {name}": log for name, log in logs.items()}})
        values |= readable({name: values.pop(f"log {name}") for name in logs})
        values = {"loss": sum(values[name] for name in losses), **values}
        self.state.loss_names = ["loss", *losses]
        for name in losses:
            if not math.isfinite(values[name]):
                raise NonFiniteLoss(
                    f"loss {name!r} is {values[name]} in epoch {self.state.epoch + 1}, batch {index + 1}: training stopped, "
                    f"{self.saving.last_good()}"
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(losses)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def losses(self, batch: Batch, with_perplexity: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every weighted loss by its name, PLPP's among them, and the logarithms of the perplexities.

        The perplexity is logged wherever it is at hand; where it costs a pass over the vocabulary, ``with_perplexity`` asks.
        """
        self.method.metrics = {}
        images = self.method.image_features(batch) if self.method.classes_depend_on_image else None
        classes = self.method.encode_classes(images, with_states=self.plpp_acts)
        losses = dict(self.method.losses(batch, classes))
        if not self.plpp_acts:
            return losses, {}
        terms, logs = self.plpp(classes.contexts, with_perplexity)
        return {**losses, **terms}, logs

    def backward(self, losses: dict[str, Tensor]) -> None:
        """The method's gradients of one step, averaged over the ranks."""
        apart: dict[str, list[Tensor]] = {}
        for name in self.method.apart:
            apart[name] = list(torch.autograd.grad(self.scaler.scale(losses[name]), self.parameters, retain_graph=True))
            self.ranks.average(apart[name])
        self.scaler.scale(sum(loss for name, loss in losses.items() if name not in apart)).backward()
        self.ranks.average(p.grad for p in self.parameters)
        gradients = self.method.gradients([p.grad for p in self.parameters], apart)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    @property
    def plpp_acts(self) -> bool:
        return self.plpp is not None and self.plpp.active

    def _log_batch(self, index: int, batches: int, meters: Meters, data_clock: Clock, batch_clock: Clock) -> None:
        epoch = self.state.epoch
        for name, value in meters.means().items():
            self.log.scalar(f"train/{name}", value, epoch * batches + index)
        self.log.scalar("train/lr", self.learning_rate, epoch * batches + index)
        frequency = self.cfg.TRAIN.PRINT_FREQ
        if (index + 1) % frequency == 0 or batches < frequency:
            where = BatchOf(epoch, self.cfg.OPTIM.MAX_EPOCH, index, batches)
            line = batch_line(where, batch_clock, data_clock, meters, self.learning_rate)
            self.log.file_only(line) if self.log.interactive else self.log(line)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def test(self, split: str = "test") -> dict[str, float]:
        """Accuracy, error, macro-F1 and calibration error on a split, in percent."""
        return self.classify(split).evaluate()

    def classify(self, split: str = "test") -> Classification:
        """What is predicted for the images of a split; the classes are encoded once, not once a batch."""
        self.log(f"Evaluate on the *{split}* set")
        with self.state.phase("testing"):
            batches = self.log.progress(self.batches(split), split, total=len(self.loader(split)))
            found = evaluate(self.method, batches, self.ranks, self.computing)
        for line in found.report() + (found.per_class_report(self.data.classnames) if self.cfg.TEST.PER_CLASS_RESULT else []):
            self.log(line)
        for name, value in found.evaluate().items():
            self.log.scalar(f"{split}/{name}", value, self.state.epoch)
        return found

    @torch.no_grad()
    def classify_zero_shot(self, templates: Sequence[str], split: str = "test") -> Classification:
        """What CLIP itself predicts for the images of a split, whose names stand in ``templates``.

        Of the frozen tower's features: where the test had them no image is read for it, else they are kept for the next run.
        """
        ours = next((name for name, encoder in self.method.inputs.of(split).items() if encoder is self.method.frozen), None)
        features = self.frozen_features[ours] if ours else self._features_of(self.method.frozen)
        with self.state.phase("testing"):
            names = self.data.classnames
            found = Classification(len(names))
            with self.computing():
                ranks = self.ranks if self.ranks.size <= len(names) else Ranks()
                mine = zero_shot_classes(self.method.clip.text, templates, ranks.share(names))
                classes = ranks.gather_rows(mine, len(names))
            labels = torch.tensor([datum.label for datum in getattr(self.data, split)])
            for rows, label in zip(features.of(split).split(AT_ONCE), labels.split(AT_ONCE), strict=True):
                found.process(self.method.cosines(rows.to(self.device), classes), label)
        return found

    def measure_prompts(self) -> Components | None:
        """PLPP's figures of the prompts as they are, whether or not it is part of the training; None without context."""
        if not self.method.learns_text_context:
            return None
        return measured(self.regularizer or regularizer_for(self.cfg, self.clip_model), self.method.contexts())

    def _keep_best(self) -> None:
        accuracy = self.state.history[-1]["val_accuracy"] = self.test("val")["accuracy"]
        if self.state.best_val is None or accuracy > self.state.best_val:
            self.state.best_val = accuracy
            self.saving.save_best(accuracy)
