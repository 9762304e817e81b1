"""What runs learned, as their records say: figures of each epoch, and context vectors as words.

Runs of version 0.1 recorded neither; a :class:`Reader` finds both in their checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from plpp_reg.errors import InputError
from plpp_reg.results.record import RESULT

if TYPE_CHECKING:
    from plpp_reg.results.tables.records import Found

NEAREST = 3  # words that are recorded of each context vector
Words = Sequence[Sequence[tuple[str, float]]]  # of each context vector the nearest words, with their cosines


class Prompts(NamedTuple):
    """The words nearest to each context vector and the prompts' perplexity, before and after the training.

    ``of_class``: where every class has a context of its own, the class whose vectors these are.
    """

    before: Words
    after: Words
    perplexity: tuple[float, float]
    of_class: str = ""


class Reader(Protocol):
    """Reads what a run learned out of its checkpoints."""

    def history(self, place: Path) -> list[dict[str, float]]: ...

    def read(self, place: Path) -> Prompts: ...


def no_reader() -> Reader:
    """For records that say it all.

    Raises:
        InputError: always; one that does not was asked for.
    """
    raise InputError("its record does not say: plpp report reads its checkpoint")


class Learned:
    """What each run learned; ``reader`` makes the one that reads older runs, if there is one."""

    def __init__(self, reader: Callable[[], Reader]) -> None:
        self._make, self._reader = reader, None

    def _older(self) -> Reader:
        if self._reader is None:
            self._reader = self._make()
        return self._reader

    def history(self, run: Found) -> list[dict[str, float]]:
        """The means of each epoch, by name; empty where nothing was trained.

        Raises:
            InputError: what is there cannot be read.
        """
        if "history" not in run.result:
            return self._older().history(run.place)
        try:
            return [{name: float(value) for name, value in epoch.items()} for epoch in run.result["history"]]
        except (AttributeError, TypeError, ValueError, OverflowError) as e:
            raise InputError(f"its {RESULT}: expected figures of each epoch, got something else") from e

    def prompts(self, run: Found) -> Prompts:
        """The prompts before and after training.

        Raises:
            InputError: it trained no text context, or what is there cannot be read.
        """
        if "learned" not in run.result:
            return self._older().read(run.place)
        learned = run.result["learned"]
        if learned is None:
            raise InputError("this run trained no text context")
        try:
            before, after = learned["before"], learned["after"]
            perplexity = float(before["perplexity"]), float(after["perplexity"])
            return Prompts(_words(before), _words(after), perplexity, str(learned["of_class"]))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
            raise InputError(f"its {RESULT}: expected the words of its prompts, got something else") from e


def _words(told: Mapping[str, Any]) -> Words:
    return [[(str(word), float(cosine)) for word, cosine in nearest] for nearest in told["nearest"]]
