"""Files of torch's, ours and other people's, read as inert data: nothing in them is run.

Dassl saves schedules, and in them their optimizers, as objects; OpenAI's weights are TorchScript archives.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

BOMB = 100  # times its own size: torch stores tensors as they are, and of an archive's sources no more than this is saved


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


def read_tensors(path: str | Path) -> Any:
    """What ``torch.save`` wrote: tensors and plain values, on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is cut short or damaged, or holds more than that; in our words, for torch's advise to run it.
    """
    if is_torchscript(path):
        raise ValueError("it is a TorchScript archive, which holds a program")
    check_zip(path)
    try:
        with warnings.catch_warnings():  # of the pickle's protocol: what cannot be read is refused below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # of a made-up file: anything
        first = (str(e).splitlines() or [type(e).__name__])[0]
        if isinstance(e, pickle.UnpicklingError) or "weights_only" in str(e):
            first = "it is cut short, or holds more than tensors and plain values"
        raise ValueError(first) from e


def read_torchscript(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive, on the CPU, by name.

    Raises:
        ValueError: damaged, or one of its methods would run while it is loaded.
    """
    _refuse_code(path)
    check_zip(path)
    with warnings.catch_warnings():  # torch.jit is deprecated, but that is what OpenAI's weights are in
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location="cpu").state_dict()


def is_torchscript(path: str | Path) -> bool:
    """Whether ``torch.jit.load`` would read a file; ``torch.load``, weights only, refuses those."""
    try:
        return zipfile.is_zipfile(path) and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # not an archive of torch's
        return False


def _refuse_code(path: str | Path) -> None:
    """Refuse an archive with the one method that runs while it is loaded.

    Asked of torch's own reader: it ignores the case of names, and where an archive is ambiguous Python's may see another one.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    names = reader.get_all_records()
    if len({name.casefold() for name in names}) < len(names):  # which of them is loaded is not said
        raise ValueError("an archive with two records of one name")
    for name in names:
        # .debug_pkl: where in its writer's sources the code stood; it is never run
        if not name.endswith(".debug_pkl") and b"__setstate__" in reader.get_record(name):
            raise ValueError("an archive that runs code when it is loaded")


def check_zip(path: str | Path) -> None:
    """torch does not compare the checksums of a file's records; a changed number would pass unseen.

    Raises:
        ValueError: a record is not what was written, or far more than the file holds.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            whole, size = sum(member.file_size for member in archive.infolist()), Path(path).stat().st_size
            if whole > BOMB * size:
                raise ValueError(f"{whole} bytes, compressed to {size}")
            if (record := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {record} is wrong")
    except (ValueError, OSError):
        raise
    except Exception as e:  # of each decompressor's own kind
        raise ValueError(str(e) or type(e).__name__) from e
