"""Objects in other people's checkpoints as inert data: Dassl saves schedules, and in them their optimizers, as objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


class Inert:
    """Takes the place of an object in a file: its attributes are read, its code is not there."""

    def __init__(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def objects_as_data(names: Iterable[str]) -> Iterator[None]:
    """While it is open, ``torch.load`` under ``weights_only`` reads objects of these classes as their attributes alone.

    ``names``: whole ones, ``torch.optim.sgd.SGD``; anything else is up to torch's own allow-list.
    """
    stubs = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
    plain_dict = (lambda factory: {}, "collections.defaultdict")
    with torch.serialization.safe_globals([*stubs, plain_dict, dict]):
        yield
