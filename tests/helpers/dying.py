"""Trainers whose process is killed, or never ends: for tests of who runs them. Imported by name in other processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from plpp_reg.engine.method import Batch, Classes, setting
from plpp_reg.trainers.coop import CoOp

DONE = 1  # epochs before it happens: there is a checkpoint to go on from


class KnowsItsEpoch(CoOp):
    """With the run's seed and folder at hand, too."""

    @dataclass(frozen=True)
    class Config(CoOp.Config):
        seed: int = setting(1, key="SEED")
        output_dir: str = setting("", key="OUTPUT_DIR")

    epoch = 0

    def end_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def method_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_method_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


class DiesOnce(KnowsItsEpoch):
    """Killed once in the run of seed 1, as the out-of-memory killer does it."""

    deaths = 1

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        if self.config.seed == 1 and self.epoch == DONE:
            died = Path(self.config.output_dir) / "died"
            already = died.stat().st_size if died.is_file() else 0
            if already < self.deaths:
                died.write_text("x" * (already + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(batch, classes)


class AlwaysDies(DiesOnce):
    """Killed as often as it is tried."""

    deaths = 1000


class NeverEnds(KnowsItsEpoch):
    """Says who it is, and hangs in its second epoch."""

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        if self.epoch == DONE:
            (Path(self.config.output_dir) / "pid").write_text(str(os.getpid()))
            time.sleep(600)
        return super().losses(batch, classes)
