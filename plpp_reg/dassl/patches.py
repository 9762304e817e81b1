"""What a new torch or numpy broke in Dassl, mended in memory. Each fault is tried out first: what works is left alone.

Dassl's files, and the host's, are never written.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from torch.optim import lr_scheduler as torch_schedulers

from plpp_reg.errors import InputError
from plpp_reg.io.safe_reading import objects_as_data


class Fault(NamedTuple):
    """``broken()`` tries it out; ``mend()`` mends it for this process; ``wrong`` and ``mended`` are the halves of a line."""

    name: str
    wrong: str
    mended: str
    broken: Callable[[], bool]
    mend: Callable[[], None]


def before_import() -> list[Fault]:
    """What must be mended before Dassl and the host are imported."""
    return [
        Fault(
            "amp names",
            "torch.cuda.amp.GradScaler and autocast are deprecated",
            "they are torch.amp's",
            _amp_names_are_deprecated,
            _mend_amp_names,
        ),
    ]


def faults() -> list[Fault]:
    """In the order in which they must be mended: one hides the next."""
    return [
        Fault(
            "scheduler signature",
            "Dassl's warm-up gives torch's schedulers an argument verbose that they no longer take",
            "it is dropped",
            _scheduler_signature_is_broken,
            _mend_scheduler_signature,
        ),
        Fault(
            "frozen learning rate",
            "after a resume Dassl's warm-up steps a copy of the optimizer, and the learning rate stands still",
            "it steps the real one",
            _learning_rate_freezes,
            _mend_frozen_learning_rate,
        ),
        Fault(
            "checkpoints under weights_only",
            "torch.load refuses Dassl's own checkpoints",
            "the schedulers and optimizers in them are read as data, not run",
            _checkpoints_are_refused,
            _mend_load_checkpoint,
        ),
        Fault(
            "numpy's old names",
            "Dassl's randaugment and autoaugment use np.int, which numpy no longer has",
            "it is int",
            _old_numpy_names_are_used,
            _mend_old_numpy_names,
        ),
    ]


def mend(found: list[Fault]) -> list[str]:
    """Mend what is broken among ``found``; one line for each."""
    lines = []
    for fault in found:
        if fault.broken():
            fault.mend()
            lines.append(f"plpp: mended in memory: {fault.wrong}: {fault.mended}")
    return lines


def report() -> list[str]:
    """What fails without :func:`mend`, for the doctor. (A later fault shows once an earlier one is mended.)"""
    lines = []
    for fault in faults():
        if fault.broken():
            fault.mend()
            lines.append(fault.wrong)
    return lines


# ---- torch.cuda.amp --------------------------------------------------------------------------------------------------


def _amp_names_are_deprecated() -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.amp.GradScaler(enabled=False)
            torch.cuda.amp.autocast(enabled=False)
        except AttributeError:
            return True
    return any(issubclass(w.category, (FutureWarning, DeprecationWarning)) for w in caught)


class _GradScaler(torch.amp.GradScaler):
    """``torch.cuda.amp.GradScaler`` as it was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("cuda", *args, **kwargs)


class _autocast(torch.amp.autocast):
    """``torch.cuda.amp.autocast`` as it was."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True) -> None:
        super().__init__("cuda", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


def _mend_amp_names() -> None:
    torch.cuda.amp.GradScaler, torch.cuda.amp.autocast = _GradScaler, _autocast


# ---- the warm-up scheduler -------------------------------------------------------------------------------------------


def _dassl_schedulers() -> list[type]:
    """The scheduler classes that Dassl itself writes, base classes first."""
    from dassl.optim import lr_scheduler

    own = [c for c in vars(lr_scheduler).values() if inspect.isclass(c) and c.__module__ == lr_scheduler.__name__]
    return sorted((c for c in own if issubclass(c, torch_schedulers.LRScheduler)), key=lambda c: len(c.__mro__))


def _warmup(epochs: int = 6) -> Any:
    """A warm-up scheduler as Dassl builds it, over a throw-away optimizer."""
    from dassl.optim import lr_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    successor = torch_schedulers.CosineAnnealingLR(optimizer, float(epochs))
    return lr_scheduler.ConstantWarmupScheduler(optimizer, successor, 1, 1e-5)


def _scheduler_signature_is_broken() -> bool:
    try:
        _warmup()
    except TypeError:
        return True
    return False


class _TakesVerbose(torch_schedulers._LRScheduler):
    def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int = -1, verbose: object = None) -> None:
        super().__init__(optimizer, last_epoch)


def _mend_scheduler_signature() -> None:
    for cls in _dassl_schedulers():
        cls.__bases__ = tuple(
            _TakesVerbose if b in (torch_schedulers._LRScheduler, torch_schedulers.LRScheduler) else b for b in cls.__bases__
        )


def _step(scheduler: Any) -> float:
    scheduler.optimizer.step()
    scheduler.step()
    return scheduler.optimizer.param_groups[0]["lr"]


def _learning_rate_freezes() -> bool:
    """Whether a scheduler that was saved (a copy of all it holds) and loaded goes another way than one that was not."""
    running, resumed = _warmup(), _warmup()
    for _ in range(3):
        _step(running)
    saved = copy.deepcopy({"optimizer": running.optimizer.state_dict(), "scheduler": running.state_dict()})
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    return any(_step(running) != _step(resumed) for _ in range(2))


def _mend_frozen_learning_rate() -> None:
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        own = {name: value for name, value in state_dict.items() if name != "successor"}
        torch_schedulers.LRScheduler.load_state_dict(self, own)
        if "successor" in state_dict:  # its numbers, not itself: it holds a copy of the optimizer
            theirs = vars(state_dict["successor"])
            self.successor.load_state_dict({name: value for name, value in theirs.items() if name != "optimizer"})

    for cls in _dassl_schedulers()[:1]:
        cls.load_state_dict = load_state_dict


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoints_are_refused() -> bool:
    from dassl.utils import torchtools

    scheduler = _warmup()
    _step(scheduler)
    content = {"state_dict": {}, "optimizer": scheduler.optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": 1}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pth.tar-1")
        torch.save(content, path)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                torchtools.load_checkpoint(path)
            except pickle.UnpicklingError:
                return True
    return False


def optimizers_and_schedulers() -> list[str]:
    """The whole names of torch's and Dassl's optimizer and scheduler classes, which a host's checkpoints may hold."""
    import dassl.optim

    classes = [c for m in (torch_schedulers, torch.optim) for c in vars(m).values() if inspect.isclass(c)]
    classes += [c for m in vars(dassl.optim).values() if inspect.ismodule(m) for c in vars(m).values() if inspect.isclass(c)]
    kinds = (torch.optim.Optimizer, torch_schedulers.LRScheduler)
    return sorted({f"{c.__module__}.{c.__qualname__}" for c in classes if issubclass(c, kinds)})


def _mend_load_checkpoint() -> None:
    from plpp_reg.dassl.registry import rebind

    from dassl.utils import torchtools

    original = torchtools.load_checkpoint

    def load_checkpoint(fpath: str) -> dict[str, Any]:
        try:
            with objects_as_data(optimizers_and_schedulers()):
                return original(fpath)
        except pickle.UnpicklingError as e:  # not torch's own words: they advise to run the file
            raise InputError(
                f"checkpoint {fpath!r}: cut short, or holds more than tensors, numbers and optimizers; refused"
            ) from e

    load_checkpoint.__doc__ = original.__doc__
    rebind(original, load_checkpoint)


# ---- augmentations ---------------------------------------------------------------------------------------------------


class _OldNumpy:
    """numpy, with the name that it had for int."""

    int = int

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


def _augmentations() -> list[Any]:
    modules = []
    for name in ("randaugment", "autoaugment"):
        with contextlib.suppress(ModuleNotFoundError):
            modules.append(importlib.import_module(f"dassl.data.transforms.{name}"))
    return modules


def _old_numpy_names_are_used() -> bool:
    for module in _augmentations():
        try:
            if hasattr(module, "SolarizeAdd"):
                module.SolarizeAdd(Image.new("RGB", (1, 1)))
            else:
                module.SubPolicy(0.5, "invert", 0, 0.5, "invert", 0)
        except AttributeError:
            return True
    return False


def _mend_old_numpy_names() -> None:
    for module in _augmentations():
        module.np = _OldNumpy()
