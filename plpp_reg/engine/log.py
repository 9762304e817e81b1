"""What a run says: plain lines on the terminal and in log.txt, a progress bar where somebody watches, tensorboard."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from plpp_reg.errors import InputError
from plpp_reg.io.files import naming
from plpp_reg.io.terminal import discard_output, say


class RunLog:
    """Lines go to standard output and, once :meth:`open` has named it, to a file; earlier lines are not lost."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.interactive = not quiet and sys.stdout is not None and sys.stdout.isatty()
        self._early: list[str] | None = []
        self._path: Path | None = None
        self._events = Path()
        self._writer: Any = None

    def open(self, folder: str | Path) -> None:
        """Log into ``folder``/log.txt from here on (appending: a resumed run goes on in its file), and to tensorboard/.

        Raises:
            InputError: log.txt is a link, which would be written through.
            OSError: it cannot be written, or tensorboard/ cannot; the error names which.
        """
        path = Path(folder) / "log.txt"
        if path.is_symlink():
            raise InputError(f"{str(path)!r}: expected a file to add lines to, got a symbolic link to {os.readlink(path)!r}")
        self._path, self._events = path, Path(folder) / "tensorboard"
        with naming(self._events):
            self._events.mkdir(exist_ok=True)
        early, self._early = self._early or [], None
        self._append("".join(line + "\n" for line in early))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self("tensorboard is not installed: no event files (pip install tensorboard)")
            return
        with naming(self._events):
            self._writer = SummaryWriter(log_dir=str(self._events))

    def __call__(self, line: str) -> None:
        if not self.quiet:
            heard = self._write_above_bar(line) if self.interactive else say(line)
            self.quiet, self.interactive = not heard, self.interactive and heard
        self.file_only(line)

    @staticmethod
    def _write_above_bar(line: str) -> bool:
        try:
            tqdm.write(line)
        except OSError:
            discard_output()
            return False
        return True

    def file_only(self, line: str) -> None:
        if self._early is not None:
            self._early.append(line)
        else:
            self._append(line + "\n")

    def _append(self, text: str) -> None:
        if self._path is not None:
            with naming(self._path), open(self._path, "a", encoding="utf-8", opener=_no_link) as file:
                file.write(text)

    def progress(self, items: Iterable, what: str, initial: int = 0, total: int | None = None) -> tqdm:
        """A bar in a terminal, nothing elsewhere."""
        return tqdm(items, desc=what, initial=initial, total=total, disable=not self.interactive, leave=False)

    def scalar(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None:
            with naming(self._events):
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with naming(self._events):
                writer.close()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class Meters:
    """Latest value and running mean of named figures, shown as Dassl shows them: ``loss 1.2000 (1.3000) acc ...``."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, values: dict[str, float]) -> None:
        self.last = values
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def __str__(self) -> str:
        means = self.means()
        return " ".join(f"{name} {value:.4f} ({means[name]:.4f})" for name, value in self.last.items())


class Clock:
    """Seconds since the last tick, and their mean."""

    def __init__(self) -> None:
        self.start, self.value, self.total, self.count = time.perf_counter(), 0.0, 0.0, 0

    def tick(self) -> None:
        now = time.perf_counter()
        self.value, self.start = now - self.start, now
        self.total += self.value
        self.count += 1

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


class BatchOf(NamedTuple):
    """Where a run stands: counted from 0."""

    epoch: int
    epochs: int
    batch: int
    batches: int


def batch_line(at: BatchOf, batch_clock: Clock, data_clock: Clock, meters: Meters, lr: float) -> str:
    """A batch as Dassl logs it, with the time that is left."""
    left = at.batches - at.batch - 1 + (at.epochs - at.epoch - 1) * at.batches
    eta = datetime.timedelta(seconds=int(batch_clock.mean * left))
    return (
        f"epoch [{at.epoch + 1}/{at.epochs}] batch [{at.batch + 1}/{at.batches}] "
        f"time {batch_clock.value:.3f} ({batch_clock.mean:.3f}) data {data_clock.value:.3f} ({data_clock.mean:.3f}) "
        f"{meters} lr {lr:.4e} eta {eta}"
    )
