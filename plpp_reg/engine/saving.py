"""What is kept of a run in its folder, and how it goes on from there to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from plpp_reg.engine import checkpoint
from plpp_reg.engine.method import Method
from plpp_reg.engine.state import RunState
from plpp_reg.errors import InputError


@dataclass
class Saving:
    """The checkpoints of one method in training.

    ``same``: what must not change between a run and its resumption, beside the configuration. ``epochs`` and ``frequency``:
    OPTIM.MAX_EPOCH and TRAIN.CHECKPOINT_FREQ. ``other_classes``: whether the classes are known to be others than those trained
    on, whatever a checkpoint says. ``output_dir``: the run's folder; None: nothing is written. ``taught_by``: who taught what
    was loaded to predict with.
    """

    method: Method
    optimizer: torch.optim.Optimizer | None
    schedule: LRScheduler | None
    scaler: torch.amp.GradScaler
    state: RunState
    same: Callable[[], dict[str, Any]]
    epochs: int
    frequency: int
    other_classes: bool
    say: Callable[[str], object]
    output_dir: Path | None = None
    taught_by: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return self.output_dir / self.method.model_name

    def content(self, val_result: float | None = None) -> dict[str, Any]:
        """Dassl's and CoOp's keys, and below ``plpp_reg`` what exact resume needs beside them."""
        return {
            "state_dict": self.method.saved.state_dict(),
            "epoch": self.state.epoch,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "val_result": val_result,
            "plpp_reg": {
                **self.state.content(),
                "scaler": self.scaler.state_dict(),
                "same": self.same(),
                "classnames": list(self.method.classnames),
                **self._of_the_teacher(),
                "method": self.method.method_state(),
            },
        }

    def _of_the_teacher(self) -> dict[str, Any]:
        """Who it was, and what predictions read of it."""
        if not self.method.distils:
            return {}
        teacher = self.method.teacher
        if not self.method.predicts_by_teacher:
            return {"teacher": teacher.identity}
        heard = teacher.heard()
        return {"teacher": teacher.identity, "said": {"class_features": heard.class_features, "scale": heard.scale}}

    def save_epoch(self) -> None:
        """A checkpoint of the epoch that is done; the one before goes unless CHECKPOINT_FREQ asks for it."""
        if self.output_dir is None:
            return
        previous = checkpoint.newest(self.folder)
        path = checkpoint.save(self.folder, self.content())
        frequency = self.frequency
        if previous is not None and previous != path:
            epoch = int(previous.name.rsplit("-", 1)[1])
            if not (frequency > 0 and epoch % frequency == 0):
                previous.unlink()
        if self.state.epoch == self.epochs or (frequency > 0 and self.state.epoch % frequency == 0):
            self.say(f"Checkpoint saved to {path}")

    def save_best(self, accuracy: float) -> None:
        """The copy that is best on the validation images so far."""
        if self.output_dir is not None:
            checkpoint.save(self.folder, self.content(accuracy), best=True)

    def last_good(self) -> str:
        last = checkpoint.newest(self.folder) if self.output_dir else None
        return f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"

    def resume(self, folder: str | Path) -> bool:
        """Go on where the newest checkpoint in a run's folder stopped, to the bit; False if there is none."""
        path = checkpoint.newest(Path(folder) / self.method.model_name)
        if path is None or self.optimizer is None:
            return False
        content = checkpoint.load(path)
        extra = content.get("plpp_reg")
        if extra is None:
            raise InputError(f"--resume: {str(path)!r} is not of plpp-reg: it can be evaluated (--eval-only), not resumed")
        checkpoint.load_weights(self.method.saved, content["state_dict"], path)
        before, now = extra.get("same") if isinstance(extra, dict) else None, self.same()
        changed = []
        if isinstance(before, dict):
            changed = [f"{k}: {before.get(k)}, now {v}" for k, v in now.items() if before.get(k, v) != v]
            if "pictures" in now and "pictures" not in before:
                self.say(f"{path.name} was made before the content of images was recorded: their names alone are compared")
        if changed:
            raise InputError(f"checkpoint {str(path)!r}: expected a run on the same terms ({'; '.join(changed)})")
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["scheduler"])
            self.scaler.load_state_dict(extra["scaler"])
            self.method.load_method_state(extra["method"])
            self.state.load(extra, content["epoch"], self.epochs)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
            raise InputError(f"checkpoint {str(path)!r}: expected the whole state of this run, refused ({e!r})") from e
        self.say(f"Resumed from {path} (epoch {self.state.epoch})")
        return True

    def load_model(self, folder: str | Path, epoch: int | None = None) -> Path:
        """Weights to predict with, from a run's folder, ours or upstream's; the file that they came from."""
        if not self.method.learns:
            raise InputError(f"--model-dir: {type(self.method).__name__} learns nothing, so there is nothing to load")
        path = checkpoint.find(folder, self.method.model_name, epoch)
        self.take_to_predict(checkpoint.load(path), path)
        return path

    def take_to_predict(self, content: dict[str, Any], path: Path) -> None:
        """Weights to predict with, of a checkpoint that was read from ``path``; they stay with their teacher.

        Raises:
            InputError: they do not fit, belong to other classes, or their predictions would read another teacher.
        """
        self.take_weights(content, path)
        extra = content.get("plpp_reg") or {}
        self.taught_by = extra.get("teacher")
        if self.method.predicts_by_teacher:
            self.method.teacher.check_same(self.taught_by)

    def load_weights(self, path: Path) -> None:
        """Weights alone, from a checkpoint's file, to start from; as :meth:`take_weights`."""
        self.take_weights(checkpoint.load(path), path)

    def take_weights(self, content: dict[str, Any], path: Path) -> None:
        """Weights alone, of a checkpoint that was read from ``path``.

        Raises:
            InputError: they do not fit, or belong to other classes.
        """
        extra = content.get("plpp_reg")
        self.check_classes(extra.get("classnames") if isinstance(extra, dict) else None)
        method = self.method
        lacking = checkpoint.load_weights(method.saved, content["state_dict"], path, method.not_loaded, method.optional)
        self.say(f'Loading weights to {method.model_name} from "{path}" (epoch = {content["epoch"]})')
        if lacking:
            self.say(f"Not in there, and as before training: {', '.join(lacking)}")

    def check_classes(self, trained_on: list[str] | None) -> None:
        """Whether weights that were trained on other classes (None: unknown ones) may be loaded.

        Raises:
            InputError: what was learned belongs to its classes.
        """
        others = self.other_classes or trained_on not in (None, self.method.classnames)
        if others and (reason := self.method.bound_to_classes):
            raise InputError(reason)
