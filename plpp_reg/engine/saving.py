"""What a trainer keeps in its run's folder, and how it goes on from there to the bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plpp_reg.engine import checkpoint
from plpp_reg.errors import InputError

if TYPE_CHECKING:
    from plpp_reg.engine.trainer import PromptTrainer


class Saving:
    """The checkpoints of one trainer."""

    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer = trainer

    @property
    def folder(self) -> Path:
        return self.trainer.output_dir / self.trainer.model_name

    def content(self, val_result: float | None = None) -> dict[str, Any]:
        """Dassl's and CoOp's keys, and below ``plpp_reg`` what exact resume needs beside them."""
        t = self.trainer
        return {
            "state_dict": t.prompts.state_dict(),
            "epoch": t.epoch,
            "optimizer": t.optimizer.state_dict(),
            "scheduler": t.schedule.state_dict(),
            "val_result": val_result,
            "plpp_reg": {
                "streams": checkpoint.random_streams(),
                "scaler": t.scaler.state_dict(),
                "history": t.history,
                "loss_names": t.loss_names,
                "same": self.same,
                "seconds": t.seconds,
                "best_val": t.best_val,
                "classnames": list(t.data.classnames),
                "method": t.method_state(),
            },
        }

    @functools.cached_property
    def same(self) -> dict[str, Any]:
        """What must not change between a run and its resumption, beside the configuration."""
        t = self.trainer
        same = {"files": t.data.sha256(), "precision": t.precision, "device": t.device.type}
        learned_from = {part: sha256 for part, sha256 in t.pictures_sha256.items() if part in ("train", "val")}
        return {**same, "pictures": learned_from} if learned_from else same

    def save_epoch(self) -> None:
        """A checkpoint of the epoch that is done; the one before goes unless CHECKPOINT_FREQ asks for it."""
        t = self.trainer
        if t.output_dir is None:
            return
        previous = checkpoint.newest(self.folder)
        path = checkpoint.save(self.folder, self.content())
        frequency = t.cfg.TRAIN.CHECKPOINT_FREQ
        if previous is not None and previous != path:
            epoch = int(previous.name.rsplit("-", 1)[1])
            if not (frequency > 0 and epoch % frequency == 0):
                previous.unlink()
        if t.epoch == t.cfg.OPTIM.MAX_EPOCH or (frequency > 0 and t.epoch % frequency == 0):
            t.log(f"Checkpoint saved to {path}")

    def save_best(self, accuracy: float) -> None:
        """The copy that is best on the validation images so far."""
        if self.trainer.output_dir is not None:
            checkpoint.save(self.folder, self.content(accuracy), best=True)

    def last_good(self) -> str:
        last = checkpoint.newest(self.folder) if self.trainer.output_dir else None
        return f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"

    def resume(self, folder: str | Path) -> bool:
        """Go on where the newest checkpoint in a run's folder stopped, to the bit; False if there is none."""
        t = self.trainer
        path = checkpoint.newest(Path(folder) / t.model_name)
        if path is None or t.optimizer is None:
            return False
        content = checkpoint.load(path)
        extra = content.get("plpp_reg")
        if extra is None:
            raise InputError(f"--resume: {str(path)!r} is not of plpp-reg: it can be evaluated (--eval-only), not resumed")
        checkpoint.load_weights(t.prompts, content["state_dict"], path)
        before = extra.get("same") if isinstance(extra, dict) else None
        changed = []
        if isinstance(before, dict):
            changed = [f"{k}: {before.get(k)}, now {v}" for k, v in self.same.items() if before.get(k, v) != v]
            if "pictures" in self.same and "pictures" not in before:
                t.log(f"{path.name} was made before the content of images was recorded: their names alone are compared")
        if changed:
            raise InputError(f"checkpoint {str(path)!r}: expected a run on the same terms ({'; '.join(changed)})")
        try:
            t.optimizer.load_state_dict(content["optimizer"])
            t.schedule.load_state_dict(content["scheduler"])
            t.scaler.load_state_dict(extra["scaler"])
            t.epoch, t.history = content["epoch"], list(extra["history"])
            t.seconds, t.best_val = extra["seconds"], extra["best_val"]
            t.loss_names = list(extra["loss_names"])
            if not (isinstance(t.epoch, int) and len(t.history) == t.epoch <= t.cfg.OPTIM.MAX_EPOCH):
                raise ValueError(f"epoch {t.epoch!r}")
            t.load_method_state(extra["method"])
            checkpoint.restore_random_streams(extra["streams"])
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
            raise InputError(f"checkpoint {str(path)!r}: expected the whole state of this run, refused ({e!r})") from e
        t.log(f"Resumed from {path} (epoch {t.epoch})")
        return True

    def load_model(self, folder: str | Path, epoch: int | None = None) -> None:
        """Weights alone, from a run's folder, ours or upstream's."""
        t = self.trainer
        if t.prompts is None:
            raise InputError(f"--model-dir: {t.cfg.TRAINER.NAME} learns nothing, so there is nothing to load")
        self.load_weights(checkpoint.find(folder, t.model_name, epoch))

    def load_weights(self, path: Path) -> None:
        t = self.trainer
        content = checkpoint.load(path)
        extra = content.get("plpp_reg")
        t.check_classes(extra.get("classnames") if isinstance(extra, dict) else None)
        checkpoint.load_weights(t.prompts, content["state_dict"], path, t.not_loaded)
        t.log(f'Loading weights to {t.model_name} from "{path}" (epoch = {content["epoch"]})')
