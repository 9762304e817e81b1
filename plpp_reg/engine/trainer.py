"""PromptTrainer: the sum, the step, precision, PLPP, logging, checkpoints and resume, written once for all methods."""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.text import TextOutput, TextTower
from plpp_reg.datasets import DataSplit, load_dataset
from plpp_reg.engine import checkpoint
from plpp_reg.engine.data import build_loader
from plpp_reg.engine.evaluation import Classification
from plpp_reg.engine.files import write_atomically
from plpp_reg.engine.log import Clock, Meters, RunLog
from plpp_reg.engine.optim import build_lr_schedule, build_optimizer
from plpp_reg.errors import InputError
from plpp_reg.regularizer import Components, PerplexityRegularizer, settings_defaults
from plpp_reg.words import candidate_ids


class NonFiniteLoss(RuntimeError):
    """Training stopped before a non-finite loss could reach the weights."""


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

    config_node: ClassVar[str] = ""
    config_defaults: ClassVar[dict[str, object]] = {}
    model_name: ClassVar[str] = "prompt_learner"  # the folder of its checkpoints
    learns_text_context: ClassVar[bool] = False

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

    # ---- what a method uses --------------------------------------------------------------------------------------

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, embed_dim), normalised; the image tower is frozen."""
        with torch.no_grad():
            return self.normalize(self.clip_model.encode_image(images))

    def class_features(self) -> Tensor:
        """(C, embed_dim), normalised, by one text pass; PLPP reads its context states afterwards."""
        self.text = self.prompts(self.tower, need_hidden=self._plpp_acts)
        return self.normalize(self.text.features)

    def context(self) -> Tensor:
        """The vectors that PLPP acts on, (M, D) or (P, M, D)."""
        return self.prompts.ctx

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """(B, E), (C, E) -> (B, C): scaled cosines."""
        with torch.autocast(self.device.type, enabled=False):
            return self.clip_model.logit_scale.exp() * image_features @ class_features.t()

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Mean cross-entropy in float32; notes the batch accuracy for the log."""
        self.metrics["acc"] = 100 * (logits.argmax(1) == label).float().mean().item()
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
        self.device = torch.device("cuda" if cfg.USE_CUDA and torch.cuda.is_available() else "cpu")
        self.precision = self._precision(self.method_cfg.get("PREC", "fp32"))
        self.data = data or load_dataset(
            cfg.DATASET.NAME, cfg.DATASET.ROOT, cfg.DATASET.NUM_SHOTS, cfg.SEED, cfg.DATASET.SUBSAMPLE_CLASSES
        )
        self.log(
            f"Data set {cfg.DATASET.NAME}: {len(self.data.classnames)} classes, {len(self.data.train):,} images for training, "
            f"{len(self.data.val):,} for choosing, {len(self.data.test):,} for testing"
        )
        if clip_model is None:
            self.log(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME}, {self.precision} on {self.device})")
            clip_model = load_clip(cfg.MODEL.BACKBONE.NAME, self.precision, self.device)
        self.clip_model = clip_model.to(self.device)
        resolution = clip_model.visual.input_resolution
        if tuple(cfg.INPUT.SIZE) != (resolution, resolution):
            raise InputError(
                f"INPUT.SIZE: expected {(resolution, resolution)} for backbone {cfg.MODEL.BACKBONE.NAME!r}, "
                f"got {tuple(cfg.INPUT.SIZE)}"
            )
        self.tower = TextTower(clip_model)
        self.metrics: dict[str, float] = {}
        self.text: TextOutput | None = None
        self.regularizer: PerplexityRegularizer | None = None
        random.seed(cfg.SEED)  # whatever was drawn before, the run starts the same
        np.random.seed(cfg.SEED)
        torch.manual_seed(cfg.SEED)
        self.prompts = self.build(clip_model, self.data.classnames)
        if cfg.TRAINER.PLPP.ENABLED:
            self.regularizer = self._regularizer()
        self.optimizer = self.schedule = None
        self.scaler = torch.amp.GradScaler(enabled=self.precision == "amp" and self.device.type == "cuda")
        if self.trained():
            if cfg.MODEL.INIT_WEIGHTS:
                self.load_weights(Path(cfg.MODEL.INIT_WEIGHTS))
            self.optimizer = build_optimizer(self.trained(), cfg.OPTIM)
            self.schedule = build_lr_schedule(self.optimizer, cfg.OPTIM)
        self.epoch = 0  # epochs that are done
        self.history: list[dict[str, float]] = []
        self.loss_names: list[str] = []
        self.seconds = 0.0
        self.best_val: float | None = None
        self.output_dir: Path | None = None
        self._loaders: dict[str, Any] = {}

    def _precision(self, asked: str) -> str:
        if asked in ("fp32", "bf16") or self.device.type == "cuda":
            return asked
        if asked == "fp16":
            self.log("PREC fp16 needs a GPU: computing in fp32 on this CPU")
            return "fp32"
        if asked == "amp":
            self.log("PREC amp on this CPU is autocast to bfloat16, without loss scaling")
        return asked

    def _regularizer(self) -> PerplexityRegularizer:
        node = self.cfg.TRAINER.PLPP
        settings = {name: node[name.upper()] for name in settings_defaults()}
        try:
            return PerplexityRegularizer(
                self.clip_model.token_embedding.weight, candidates=candidate_ids(self.clip_model), **settings
            )
        except InputError as e:
            raise InputError(f"TRAINER.PLPP: {e}") from e

    def loader(self, split: str) -> Any:
        if split not in self._loaders:
            self._loaders[split] = build_loader(
                self.cfg, getattr(self.data, split), split == "train", self.device.type == "cuda"
            )
        return self._loaders[split]

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self.device, non_blocking=True) for name, t in batch.items()}

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Autocast where PREC is amp; nothing otherwise, the weights' own dtype rules then."""
        if self.precision != "amp":
            yield
            return
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=dtype):
            yield

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
            if not all(p.isfinite().all() for p in self.trained()):  # a finite loss can have a gradient that is not
                raise NonFiniteLoss(
                    f"the trained parameters are not finite after epoch {self.epoch + 1}: training stopped, {self._last_good()}"
                )
            self.schedule.step()
            self.epoch += 1
            self.history.append(means)
            epochs.set_postfix({name: f"{value:.3f}" for name, value in means.items() if name != "lr"})
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                self._keep_best()
            self.seconds += time.perf_counter() - start
            if after_epoch is not None:
                after_epoch(self)
            self._save_epoch()
        self.log("Finish training")

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training images; the means of what was logged, and the learning rate."""
        loader = self.loader("train")
        loader.batch_sampler.epoch = self.epoch
        meters, data_clock, batch_clock = Meters(), Clock(), Clock()
        for index, batch in enumerate(loader):
            data_clock.tick()
            meters.update(self.step(self._on_device(batch), index))
            batch_clock.tick()
            self._log_batch(index, len(loader), meters, data_clock, batch_clock)
            data_clock.start = batch_clock.start
        return {**meters.means(), "lr": self.learning_rate}

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self, batch: dict[str, Tensor], index: int = 0) -> dict[str, float]:
        """One update; every loss by its name, their sum as ``loss``, and the metrics."""
        self.metrics = {}
        with self._computing():
            losses = self.compute_losses(batch)
            losses.update(self._plpp_losses(with_perplexity=index + 1 == len(self.loader("train"))))
        loss = sum(losses.values())
        values = {"loss": loss.item(), **self.metrics, **{name: value.item() for name, value in losses.items()}}
        self.loss_names = ["loss", *losses]
        for name in losses:
            if not math.isfinite(values[name]):
                raise NonFiniteLoss(
                    f"loss {name!r} is {values[name]} in epoch {self.epoch + 1}, batch {index + 1}: training stopped, "
                    f"{self._last_good()}"
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    @property
    def _plpp_acts(self) -> bool:
        return self.regularizer is not None and self.regularizer.active

    def _plpp_losses(self, with_perplexity: bool) -> dict[str, Tensor]:
        """PLPP's weighted terms from the text pass that the method has just made; with weights 0, none: off is exactly off.

        The perplexity is logged wherever it is at hand; where it costs a pass over the vocabulary, once an epoch.
        """
        if not self._plpp_acts:
            return {}
        parts = self.regularizer.components(self.context(), self.text.hidden, with_perplexity)
        if math.isfinite(perplexity := parts.perplexity.item()):
            self.metrics["perplexity"] = perplexity
        return self.regularizer.terms(parts)

    def _log_batch(self, index: int, batches: int, meters: Meters, data_clock: Clock, batch_clock: Clock) -> None:
        cfg, step = self.cfg, self.epoch * batches + index
        for name, value in meters.means().items():
            self.log.scalar(f"train/{name}", value, step)
        self.log.scalar("train/lr", self.learning_rate, step)
        if (index + 1) % cfg.TRAIN.PRINT_FREQ == 0 or batches < cfg.TRAIN.PRINT_FREQ:
            left = batches - index - 1 + (cfg.OPTIM.MAX_EPOCH - self.epoch - 1) * batches
            eta = datetime.timedelta(seconds=int(batch_clock.mean * left))
            line = (
                f"epoch [{self.epoch + 1}/{cfg.OPTIM.MAX_EPOCH}] batch [{index + 1}/{batches}] "
                f"time {batch_clock.value:.3f} ({batch_clock.mean:.3f}) data {data_clock.value:.3f} ({data_clock.mean:.3f}) "
                f"{meters} lr {self.learning_rate:.4e} eta {eta}"
            )
            self.log.file_only(line) if self.log.interactive else self.log(line)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test(self, split: str = "test") -> dict[str, float]:
        """Accuracy, error and macro-F1 on a split; the classes are encoded once, not once a batch."""
        self.log(f"Evaluate on the *{split}* set")
        evaluator = Classification(len(self.data.classnames))
        with self._computing():
            self.prepare_inference()
            for batch in self.log.progress(self.loader(split), split):
                batch = self._on_device(batch)
                evaluator.process(self.inference(batch["img"]), batch["label"])
        for line in evaluator.report():
            self.log(line)
        if self.cfg.TEST.PER_CLASS_RESULT:
            for line in evaluator.per_class_report(self.data.classnames):
                self.log(line)
        if self.cfg.TEST.COMPUTE_CMAT and self.output_dir:
            write_atomically(self.output_dir / "cmat.pt", lambda path: torch.save(evaluator.confusion_shares(), path))
        result = evaluator.evaluate()
        for name, value in result.items():
            self.log.scalar(f"{split}/{name}", value, self.epoch)
        return result

    def prepare_inference(self) -> None:
        """What is the same for every test batch of one model state."""
        self._test_features = self.class_features()

    def inference(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        return self.logits(self.image_features(images), self._test_features)

    @torch.no_grad()
    def measure_prompts(self) -> Components | None:
        """PLPP's figures of the prompts as they are, whether or not it is part of the training; None without context."""
        if not self.learns_text_context:
            return None
        regularizer = self.regularizer or self._regularizer()
        hidden = self.prompts(self.tower).hidden
        return regularizer.components(self.context(), hidden)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def model_folder(self) -> Path:
        return self.output_dir / self.model_name

    def _checkpoint(self, val_result: float | None = None) -> dict[str, Any]:
        return {
            "state_dict": self.prompts.state_dict(),
            "epoch": self.epoch,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "val_result": val_result,
            "plpp_reg": {
                "streams": checkpoint.random_streams(),
                "scaler": self.scaler.state_dict(),
                "history": self.history,
                "loss_names": self.loss_names,
                "same": self._same,
                "seconds": self.seconds,
                "best_val": self.best_val,
            },
        }

    @functools.cached_property
    def _same(self) -> dict[str, str]:
        """What must not change between a run and its resumption, beside the configuration."""
        return {"files": self.data.sha256(), "precision": self.precision, "device": self.device.type}

    def _save_epoch(self) -> None:
        if self.output_dir is None:
            return
        previous = checkpoint.newest(self.model_folder)
        path = checkpoint.save(self.model_folder, self._checkpoint())
        frequency = self.cfg.TRAIN.CHECKPOINT_FREQ
        if previous is not None and previous != path:
            epoch = int(previous.name.rsplit("-", 1)[1])
            if not (frequency > 0 and epoch % frequency == 0):
                previous.unlink()
        if self.epoch == self.cfg.OPTIM.MAX_EPOCH or (frequency > 0 and self.epoch % frequency == 0):
            self.log(f"Checkpoint saved to {path}")

    def _keep_best(self) -> None:
        if not self.data.val:
            raise InputError("TEST.FINAL_MODEL: expected 'last_step' for a data set without validation images, got 'best_val'")
        accuracy = self.test("val")["accuracy"]
        if self.best_val is None or accuracy > self.best_val:
            self.best_val = accuracy
            if self.output_dir is not None:
                checkpoint.save(self.model_folder, self._checkpoint(accuracy), best=True)

    def _last_good(self) -> str:
        last = checkpoint.newest(self.model_folder) if self.output_dir else None
        return f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"

    def resume(self, folder: str | Path) -> bool:
        """Go on where the newest checkpoint in a run's folder stopped, to the bit; False if there is none."""
        path = checkpoint.newest(Path(folder) / self.model_name)
        if path is None or self.optimizer is None:
            return False
        content = checkpoint.load(path)
        extra = content.get("plpp_reg")
        if extra is None:
            raise InputError(f"--resume: {str(path)!r} is not of plpp-reg: it can be evaluated (--eval-only), not resumed")
        checkpoint.load_weights(self.prompts, content["state_dict"], path)
        before = extra.get("same") if isinstance(extra, dict) else None
        if isinstance(before, dict) and before != self._same:
            changed = [f"{k}: {before.get(k)}, now {v}" for k, v in self._same.items() if before.get(k) != v]
            raise InputError(f"checkpoint {str(path)!r}: expected a run on the same terms ({'; '.join(changed)})")
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["scheduler"])
            self.scaler.load_state_dict(extra["scaler"])
            self.epoch, self.history = content["epoch"], list(extra["history"])
            self.seconds, self.best_val = extra["seconds"], extra["best_val"]
            self.loss_names = list(extra["loss_names"])
            if not (isinstance(self.epoch, int) and len(self.history) == self.epoch <= self.cfg.OPTIM.MAX_EPOCH):
                raise ValueError(f"epoch {self.epoch!r}")
            checkpoint.restore_random_streams(extra["streams"])
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
            raise InputError(f"checkpoint {str(path)!r}: expected the whole state of this run, refused ({e!r})") from e
        self.log(f"Resumed from {path} (epoch {self.epoch})")
        return True

    def load_model(self, folder: str | Path, epoch: int | None = None) -> None:
        """Weights alone, from a run's folder, ours or upstream's."""
        if self.prompts is None:
            raise InputError(f"--model-dir: {self.cfg.TRAINER.NAME} learns nothing, so there is nothing to load")
        self.load_weights(checkpoint.find(folder, self.model_name, epoch))

    def load_weights(self, path: Path) -> None:
        content = checkpoint.load(path)
        checkpoint.load_weights(self.prompts, content["state_dict"], path)
        self.log(f'Loading weights to {self.model_name} from "{path}" (epoch = {content["epoch"]})')
