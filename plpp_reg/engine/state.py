"""The state of a run: what changes while it trains and is no weight."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from plpp_reg.engine import checkpoint


@dataclass
class RunState:
    """How far a run is, and what it has measured on the way."""

    epoch: int = 0  # epochs that are done
    history: list[dict[str, float]] = field(default_factory=list)  # each epoch's means, and its learning rate
    loss_names: list[str] = field(default_factory=list)  # "loss", then its parts
    seconds: float = 0.0
    best_val: float | None = None
    phases: dict[str, float] = field(default_factory=dict)  # seconds of this process, by what it did
    _within: float = 0.0  # of them, those of the phases inside the one that is on

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Its seconds count as ``name``, less those of the phases inside it."""
        start, before, self._within = time.perf_counter(), self._within, 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.add({name: took - self._within})
            self._within = before + took

    def add(self, phases: Mapping[str, float]) -> None:
        """Seconds that were spent elsewhere for this run."""
        for name, seconds in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    def content(self) -> dict[str, Any]:
        """For a checkpoint, with every random stream as it is now; the epoch stands beside it, under upstream's key."""
        return {
            "streams": checkpoint.random_streams(),
            "history": self.history,
            "loss_names": self.loss_names,
            "seconds": self.seconds,
            "best_val": self.best_val,
        }

    def load(self, content: dict[str, Any], epoch: int, epochs: int) -> None:
        """Take back what :meth:`content` gave after ``epoch`` of ``epochs``, the random streams too.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is something else.
        """
        history = list(content["history"])
        if not (isinstance(epoch, int) and len(history) == epoch <= epochs):
            raise ValueError(f"epoch {epoch!r}")
        self.epoch, self.history, self.loss_names = epoch, history, list(content["loss_names"])
        self.seconds, self.best_val = content["seconds"], content["best_val"]
        checkpoint.restore_random_streams(content["streams"])
