"""Trainers whose process is killed, or never ends: for tests of who runs them. Imported by name in other processes."""

from __future__ import annotations

import os
import signal
import time

from torch import Tensor

from plpp_reg.trainers.coop import CoOp

DONE = 1  # epochs before it happens: there is a checkpoint to go on from


class DiesOnce(CoOp):
    """Killed once in the run of seed 1, as the out-of-memory killer does it."""

    deaths = 1

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.cfg.SEED == 1 and self.epoch == DONE:
            died = self.output_dir / "died"
            already = died.stat().st_size if died.is_file() else 0
            if already < self.deaths:
                died.write_text("x" * (already + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_losses(batch)


class AlwaysDies(DiesOnce):
    """Killed as often as it is tried."""

    deaths = 1000


class NeverEnds(CoOp):
    """Says who it is, and hangs in its second epoch."""

    def compute_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.epoch == DONE:
            (self.output_dir / "pid").write_text(str(os.getpid()))
            time.sleep(600)
        return super().compute_losses(batch)
