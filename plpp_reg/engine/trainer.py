"""PromptTrainer: the sum, the step, precision, PLPP, logging, checkpoints and resume, written once for all methods."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import PromptLearner, check_states
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.data import DataSplit
from plpp_reg.data.loaders import build_loader, load_data, part_of
from plpp_reg.engine.backbone import check_input, check_precision, computing, precision_on, regularizer_for
from plpp_reg.engine.distributed import current
from plpp_reg.engine.evaluation import evaluate
from plpp_reg.engine.features import FrozenFeatures
from plpp_reg.engine.log import BatchOf, Clock, Meters, RunLog, batch_line
from plpp_reg.engine.optim import build_lr_schedule, build_optimizer
from plpp_reg.engine.saving import Saving
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import Components, PerplexityRegularizer

MOST_LOG_PERPLEXITY = 700  # its exp is a float still


class NonFiniteLoss(RuntimeError):
    """Training stopped before a non-finite loss could reach the weights."""


def check_weight(key: str, value: float) -> None:
    """A factor of a loss.

    Raises:
        InputError: it is below 0.
    """
    if not value >= 0:
        raise InputError(f"{key}: expected a number >= 0, got {value}")


class PromptTrainer:
    """Trains one prompt learner on one data set.

    A method is a subclass that says what differs: ``config_node`` and ``config_defaults`` (its keys below TRAINER),
    :meth:`build`, :meth:`trained` and :meth:`compute_losses`. It never sums losses, never steps, never casts, never moves.

    Args:
        cfg: the whole configuration.
        data: images and class names; None: what ``cfg.DATASET`` names.
        clip_model: a frozen CLIP; None: what ``cfg.MODEL.BACKBONE`` names.
        log: where lines go; None: standard output.
    """

    #: its node below TRAINER
    config_node: ClassVar[str] = ""
    #: the node's keys and defaults
    config_defaults: ClassVar[dict[str, object]] = {}
    #: the folder of its checkpoints
    model_name: ClassVar[str] = "prompt_learner"
    #: whether PLPP has something to act on, and so whether there is an X_PLPP
    learns_text_context: ClassVar[bool] = False
    #: :meth:`class_features` does; False where each image has its own
    splits_classes: ClassVar[bool] = True
    #: batches have "img"; where all that a method reads of it is frozen, it need not
    sees_pixels: ClassVar[bool] = True
    #: batches have "features", computed ahead and kept for other runs; with pixels, those to train on alone
    sees_frozen_features: ClassVar[bool] = True
    #: beginnings of names that upstream's checkpoints hold beside what was learned
    not_loaded: ClassVar[tuple[str, ...]] = ()

    # ---- what a method gives -------------------------------------------------------------------------------------

    def build(self, clip_model: nn.Module, classnames: list[str]) -> nn.Module | None:
        """Make the module whose state_dict is the checkpoint; None where nothing is learned."""
        raise TypeError(f"{type(self).__name__} must define build()")

    def trained(self) -> list[nn.Parameter]:
        """Exactly what the optimizer updates."""
        return []

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named, weighted scalars; the base class adds PLPP's and sums."""
        raise TypeError(f"{type(self).__name__} learns nothing")

    def image_features(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, embed_dim), normalised; the frozen tower's where the method learns nothing of it."""
        return self.frozen_image_features(batch)

    @property
    def learner(self) -> PromptLearner:
        """Where the context vectors are, for a method that learns some."""
        return self.prompts

    def deep_context(self) -> Sequence[Tensor]:
        """For layers 1, 2, ... of the text tower: (M, D) rows that replace the context's."""
        return ()

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Gradients of the sum of the losses, for one step, averaged over the ranks."""
        self.scaler.scale(sum(losses.values())).backward()
        self.ranks.average(p.grad for p in self.trained())

    def end_epoch(self) -> None:
        """After the last step of an epoch, before it is measured and saved."""

    def method_state(self) -> dict[str, Any]:
        """What exact resume needs of a method beside its parameters; tensors and plain values."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` gave."""

    def check_classes(self, trained_on: list[str] | None) -> None:
        """Whether weights that were trained on other classes (None: unknown ones) may be loaded: prompts may.

        Raises:
            InputError: what was learned belongs to its classes.
        """

    # ---- what a method uses --------------------------------------------------------------------------------------

    def frozen_image_features(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, embed_dim), normalised, no gradient: CLIP's own, computed ahead ("features") or of the pixels ("img")."""
        return batch["features"] if "features" in batch else self.encode_frozen(batch["img"])

    @torch.no_grad()
    def encode_frozen(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, embed_dim), normalised."""
        return self.normalize(self.image_tower(images))

    def class_features(self) -> Tensor:
        """(C, embed_dim), normalised, by one text pass, of which PLPP reads the context states afterwards.

        Each rank computes its share of the classes.
        """
        ours = slice(self.ranks.rank, None, self.ranks.size)
        out = self.learner(self.tower, self.plpp_acts, self.deep_context(), ours)
        self.plpp_reads = out.context, out.hidden
        return self.ranks.gather_rows(self.normalize(out.features), len(self.data.classnames))

    def context(self) -> Tensor:
        """The learned context vectors, (M, D) or (C, M, D)."""
        return self.learner.ctx

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """(B, E), (C, E) -> (B, C): scaled cosines."""
        with torch.autocast(self.device.type, enabled=False):
            return self.clip_model.logit_scale.exp() * image_features @ class_features.t()

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Mean cross-entropy in float32; notes the batch accuracy for the log."""
        self.metrics["acc"] = 100 * (logits.argmax(1) == label).float().mean()
        return F.cross_entropy(logits.float(), label)

    @staticmethod
    def normalize(features: Tensor) -> Tensor:
        """Unit length, in float32: a cosine in half precision, times CLIP's scale of 100, moves in steps of a tenth."""
        features = features.float()
        return features / features.norm(dim=-1, keepdim=True)

    # ---- building ------------------------------------------------------------------------------------------------

    def __init__(
        self,
        cfg: CfgNode,
        data: DataSplit | None = None,
        clip_model: nn.Module | None = None,
        log: RunLog | None = None,
    ) -> None:
        self.cfg, self.log = cfg, log or RunLog()
        self.method_cfg = cfg.TRAINER[self.config_node] if self.config_node else CfgNode()
        self.ranks = current()
        cuda = cfg.USE_CUDA and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        precision_key = f"TRAINER.{self.config_node}.PREC"
        self.precision = precision_on(self.device, precision_key, self.method_cfg.get("PREC", "fp32"), self.log)
        self.data = data or load_data(cfg)
        self.log(
            f"Data set {cfg.DATASET.NAME}: {len(self.data.classnames)} classes, {len(self.data.train):,} images for training, "
            f"{len(self.data.val):,} for choosing, {len(self.data.test):,} for testing"
        )
        if clip_model is None:
            self.log(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME}, {self.precision} on {self.device})")
            clip_model = load_clip(cfg.MODEL.BACKBONE.NAME, self.precision, self.device)
        check_precision(clip_model, precision_key, self.precision)
        self.clip_model = clip_model.to(self.device)
        if self.splits_classes and self.ranks.size > (classes := len(self.data.classnames)):
            raise InputError(f"expected at most a process a class ({classes}), got {self.ranks.size} processes")
        check_input(cfg, clip_model)
        self.tower = TextTower(clip_model, cfg.MODEL.TEXT_MEMORY_MIB)
        self.image_tower = ImageTower(clip_model)
        self.metrics: dict[str, Tensor] = {}  # scalars that the log shows beside the losses
        self.plpp_reads: tuple[Tensor, Tensor | None] | None = None  # context and states of the last text pass
        self.regularizer: PerplexityRegularizer | None = None
        random.seed(cfg.SEED)  # whatever was drawn before, the run starts the same
        np.random.seed(cfg.SEED)
        torch.manual_seed(cfg.SEED)
        self.prompts = self.build(clip_model, self.data.classnames)
        if self.learns_text_context:
            self.learner.states = check_states("TRAINER.PLPP.STATES", cfg.TRAINER.PLPP.STATES)
        if cfg.TRAINER.PLPP.ENABLED:
            self.regularizer = regularizer_for(cfg, clip_model)
        self.saving = Saving(self)
        self.optimizer = self.schedule = None
        self.scaler = torch.amp.GradScaler(enabled=self.precision == "amp" and self.device.type == "cuda")
        if self.trained():
            if cfg.MODEL.INIT_WEIGHTS:
                self.saving.load_weights(Path(cfg.MODEL.INIT_WEIGHTS))
            self.optimizer = build_optimizer(self.trained(), cfg.OPTIM)
            self.schedule = build_lr_schedule(self.optimizer, cfg.OPTIM)
        self.epoch = 0  # epochs that are done
        self.history: list[dict[str, float]] = []
        self.loss_names: list[str] = []
        self.seconds = 0.0
        self.best_val: float | None = None
        self.output_dir: Path | None = None
        self.pictures_sha256: dict[str, str] = {}  # of the parts of the data that a run reads: plpp_reg.data.contents
        self.frozen_features = FrozenFeatures(self)
        self.test_features: Tensor | None = None
        self._loaders: dict[str, Any] = {}

    def loader(self, split: str) -> Any:
        """Of one part of the data, made once.

        Raises:
            InputError: that part has no images.
        """
        if split not in self._loaders:
            items = part_of(self.cfg, self.data, split)
            self._loaders[split] = build_loader(
                self.cfg, items, split == "train", self.device.type == "cuda", self.sees_pixels, self.ranks
            )
        return self._loaders[split]

    def features_ahead(self, split: str) -> bool:
        """Whether a split's batches have "features": a method that sees pixels too learns by them, and tests without them."""
        return self.sees_frozen_features and (split == "train" or not self.sees_pixels)

    def batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """A split's batches of this epoch, on the device, with what the method sees of each image."""
        loader = self.loader(split)
        loader.batch_sampler.epoch = self.epoch
        features = self.frozen_features.of(split, self.epoch) if self.features_ahead(split) else None
        for batch in loader:
            if features is not None:
                batch["features"] = features[batch["index"]]
            yield {name: t.to(self.device, non_blocking=True) for name, t in batch.items()}

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Autocast where PREC is amp; nothing otherwise, the weights' own dtype rules then."""
        return computing(self.device, self.precision)

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, output_dir: str | Path | None = None, after_epoch: Callable[[PromptTrainer], None] | None = None) -> None:
        """All epochs that are left. With ``output_dir``, a checkpoint after each epoch: older ones that CHECKPOINT_FREQ does
        not ask for are removed once the next is whole. ``after_epoch`` may add figures to ``history[-1]``; they are kept.

        Raises:
            NonFiniteLoss: a loss is inf or nan; the last good checkpoint is kept.
        """
        self.output_dir = Path(output_dir) if output_dir else None
        if self.optimizer is None:
            self.log("Nothing to train")
            return
        before = self.epoch
        epochs = self.log.progress(range(before, self.cfg.OPTIM.MAX_EPOCH), "epochs", before, self.cfg.OPTIM.MAX_EPOCH)
        for _ in epochs:
            start = time.perf_counter()
            means = self.train_epoch()
            # a finite loss can have a gradient that is not
            if not torch.stack([p.isfinite().all() for p in self.trained()]).all():
                raise NonFiniteLoss(
                    f"the trained parameters are not finite after epoch {self.epoch + 1}: training stopped, "
                    f"{self.saving.last_good()}"
                )
            self.schedule.step()
            self.epoch += 1
            self.history.append(means)
            self.end_epoch()
            epochs.set_postfix({name: f"{value:.3f}" for name, value in means.items() if name != "lr"})
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                self._keep_best()
            self.seconds += time.perf_counter() - start
            if after_epoch is not None:
                after_epoch(self)
            self.saving.save_epoch()
        self.log("Finish training")

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training images; the means of what was logged, and the learning rate."""
        batches = len(self.loader("train"))
        meters, data_clock, batch_clock = Meters(), Clock(), Clock()
        for index, batch in enumerate(self.batches("train")):
            data_clock.tick()
            meters.update(self.step(batch, index, with_perplexity=index + 1 == batches))
            batch_clock.tick()
            self._log_batch(index, batches, meters, data_clock, batch_clock)
            data_clock.start = batch_clock.start
        return {**meters.means(), "lr": self.learning_rate}

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self, batch: dict[str, Tensor], index: int = 0, with_perplexity: bool = False) -> dict[str, float]:
        """One update; every loss by its name, their sum as ``loss``, and the metrics.

        The host waits for the device once, where all of them come over (a gradient scaler waits for its own verdict).
        """
        self.metrics = {}
        with self.computing():
            losses = self.compute_losses(batch)
            losses.update(self._plpp_losses(with_perplexity))
        values = self.ranks.mean_values({**self.metrics, **losses})
        if values.get("log_perplexity", math.inf) < MOST_LOG_PERPLEXITY:
            values["perplexity"] = math.exp(values["log_perplexity"])
        values.pop("log_perplexity", None)
        values = {"loss": sum(values[name] for name in losses), **values}
        self.loss_names = ["loss", *losses]
        for name in losses:
            if not math.isfinite(values[name]):
                raise NonFiniteLoss(
                    f"loss {name!r} is {values[name]} in epoch {self.epoch + 1}, batch {index + 1}: training stopped, "
                    f"{self.saving.last_good()}"
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(losses)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    @property
    def plpp_acts(self) -> bool:
        return self.regularizer is not None and self.regularizer.active

    def _plpp_losses(self, with_perplexity: bool) -> dict[str, Tensor]:
        """PLPP's weighted terms from the text pass that the method has just made; with weights 0, none: off is exactly off.

        The perplexity is logged wherever it is at hand; where it costs a pass over the vocabulary, once an epoch.
        """
        if not self.plpp_acts:
            return {}
        reads, self.plpp_reads = self.plpp_reads, None  # or the states would be kept until the next step's
        terms, perplexity = self.regularizer.weighted(*reads, with_perplexity)
        share = self._share_of_prompts()
        if perplexity is not None:  # the same on every rank
            self.metrics["log_perplexity"] = share * perplexity.log()
        return terms if share == 1 else {name: share * term for name, term in terms.items()}

    def _share_of_prompts(self) -> float:
        """Of a mean over prompts, one a class, that are split by rank: this rank's number over the ranks' mean number."""
        a_class = self.splits_classes and (self.learner.class_specific or self.learner.position != "end")
        if not a_class or self.ranks.size == 1:
            return 1.0
        return len(self.ranks.share(self.data.classnames)) * self.ranks.size / len(self.data.classnames)

    def _log_batch(self, index: int, batches: int, meters: Meters, data_clock: Clock, batch_clock: Clock) -> None:
        step = self.epoch * batches + index
        for name, value in meters.means().items():
            self.log.scalar(f"train/{name}", value, step)
        self.log.scalar("train/lr", self.learning_rate, step)
        frequency = self.cfg.TRAIN.PRINT_FREQ
        if (index + 1) % frequency == 0 or batches < frequency:
            where = BatchOf(self.epoch, self.cfg.OPTIM.MAX_EPOCH, index, batches)
            line = batch_line(where, batch_clock, data_clock, meters, self.learning_rate)
            self.log.file_only(line) if self.log.interactive else self.log(line)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test(self, split: str = "test") -> dict[str, float]:
        """Accuracy, error and macro-F1 on a split; the classes are encoded once, not once a batch."""
        return evaluate(self, split)

    def prepare_inference(self) -> None:
        """What is the same for every test batch of one model state."""
        self.test_features = self.class_features()

    def inference(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, C) of a batch's images."""
        return self.logits(self.image_features(batch), self.test_features)

    @torch.no_grad()
    def context_states(self) -> tuple[Tensor, Tensor]:
        """The context vectors v, (M, D) or (C, M, D), as they are, and the states before them, h (1 or P, M, D)."""
        return self.context(), self.learner(self.tower, deep=self.deep_context()).hidden

    @torch.no_grad()
    def measure_prompts(self) -> Components | None:
        """PLPP's figures of the prompts as they are, whether or not it is part of the training; None without context."""
        if not self.learns_text_context:
            return None
        regularizer = self.regularizer or regularizer_for(self.cfg, self.clip_model)
        return regularizer.components(*self.context_states())

    def _keep_best(self) -> None:
        accuracy = self.test("val")["accuracy"]
        if self.best_val is None or accuracy > self.best_val:
            self.best_val = accuracy
            self.saving.save_best(accuracy)
