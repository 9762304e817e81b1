"""How long a sweep still takes: learned from the runs that are done, as far as those that are left look like them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from plpp_reg.experiments.jobs import Job
from plpp_reg.loss import SUFFIX
from plpp_reg.results.numbers import duration


class Kind(NamedTuple):
    """Runs of one kind differ in their seed alone."""

    method: str
    variant: str
    dataset: str
    shots: int

    @classmethod
    def of(cls, job: Job) -> Kind:
        return cls(*(job.note[name] for name in cls._fields))

    @property
    def plain(self) -> str:
        return self.method.removesuffix(SUFFIX)

    @property
    def cell(self) -> tuple[str, int]:
        return self.dataset, self.shots


class Remaining:
    """Of a sweep's jobs, what is left and what each kind of run took.

    Args:
        jobs: what is to be run.
        at_once: how many run at a time; 0: it is seen from what they took together.
    """

    def __init__(self, jobs: Iterable[Job], at_once: int = 0) -> None:
        self.at_once, self.spent = at_once, 0.0
        self.left = Counter(Kind.of(job) for job in jobs)
        self._took: dict[Kind, list[float]] = {}

    def add(self, job: Job, seconds: float | None) -> None:
        """One that is done; ``seconds``: None where it was not run here."""
        kind = Kind.of(job)
        self.left[kind] -= 1
        if seconds is not None:
            self.spent += seconds
            self._took.setdefault(kind, []).append(seconds)

    def words(self, elapsed: float) -> str:
        """``about 4.6 min left``; ``at least`` where some are like none that is done; empty where nothing is known."""
        took: dict[str, dict[tuple[str, int], float]] = {}  # plain method -> cell -> mean seconds
        for kind, each in self._took.items():
            took.setdefault(kind.plain, {}).setdefault(kind.cell, _usual(each))
        estimates = [(number, self._estimate(kind, took)) for kind, number in self.left.items() if number > 0]
        known = [number * seconds for number, seconds in estimates if seconds is not None]
        if not known:
            return ""
        at_once = self.at_once or max(1.0, self.spent / elapsed)
        return f"{'about' if len(known) == len(estimates) else 'at least'} {duration(sum(known) / at_once)} left"

    def _estimate(self, kind: Kind, took: dict[str, dict[tuple[str, int], float]]) -> float | None:
        """Seconds of a run: of its own kind; of its method with PLPP or without; else of its method on other data or shots,
        as much longer as other methods took on these. None where its method is unknown."""
        if kind in self._took:
            return _usual(self._took[kind])
        own = took.get(kind.plain, {})
        if not own or kind.cell in own:
            return own.get(kind.cell)
        others = [cells for plain, cells in took.items() if plain != kind.plain and kind.cell in cells and cells.keys() & own]
        here = sum(cells[kind.cell] for cells in others)
        there = sum(fmean(cells[cell] for cell in cells.keys() & own) for cells in others)
        return fmean(own.values()) * (here / there if there else 1.0)


def _usual(each: Sequence[float]) -> float:
    """The mean less the first, which may have computed image features that the others found."""
    return fmean(each[1:] or each)
