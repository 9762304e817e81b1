"""Checkpoints with Dassl's and CoOp's file names and keys, and what exact resume needs beside them.

``<model name>/model.pth.tar-<epoch>`` holds ``state_dict, epoch, optimizer, scheduler, val_result`` as upstream's do, and
``plpp_reg``: every random stream, the gradient scaler, the history of losses, the seconds spent. ``checkpoint`` beside it names
the newest file. Loading never runs anything: ``weights_only=True`` always.
"""

from __future__ import annotations

import io
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plpp_reg.errors import InputError
from plpp_reg.io.files import write_atomically, write_text
from plpp_reg.io.safe_reading import objects_as_data, read_tensors
from plpp_reg.results.record import is_teacher

BEST = "model-best.pth.tar"
NEWEST = "checkpoint"
NUMBERED = re.compile(r"model\.pth\.tar-(\d+)")
FIXED_TOKENS = ("token_prefix", "token_suffix")  # upstream saves them; they belong to its class names, so they are not loaded
PROMPTS = ("VPT", "VPT_shallow")  # upstream keeps these among the frozen CLIP's names; what was learned is never left out

# Dassl's warm-up keeps the schedule that follows it, and that its optimizer, as objects in its state_dict.
SCHEDULES = ("CosineAnnealingLR", "StepLR", "MultiStepLR", "LambdaLR")
UPSTREAM_OBJECTS = (
    *(f"torch.optim.lr_scheduler.{name}" for name in SCHEDULES),
    "torch.optim.sgd.SGD",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
)


def random_streams() -> dict[str, Any]:
    """The state of every random stream, in types that a weights-only load accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "python": list(random.getstate()),
    }


def restore_random_streams(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def save(folder: str | Path, content: dict[str, Any], best: bool = False) -> Path:
    """Write one checkpoint whole, then point ``checkpoint`` at it (not for the best-on-validation copy)."""
    folder = Path(folder)
    path = folder / (BEST if best else f"model.pth.tar-{content['epoch']}")
    whole = io.BytesIO()  # torch's own writer says "unexpected pos" of a full disk, and keeps the system's error to itself
    torch.save(content, whole)
    # not getbuffer(): of a full disk's error its view is left to the collector, which ends the process (Python up to 3.12.1)
    write_atomically(path, lambda p: p.write_bytes(whole.getvalue()))
    if not best:
        write_text(folder / NEWEST, path.name + "\n")
    return path


def copy_best(source: str | Path, target: str | Path) -> None:
    """The best-on-validation copy of one model folder into another that has none."""
    theirs, ours = Path(source) / BEST, Path(target) / BEST
    if theirs.is_file() and not ours.exists():
        write_atomically(ours, lambda p: shutil.copyfile(theirs, p))


def newest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a model folder; None if there is none.

    Raises:
        InputError: ``checkpoint`` names a file that is gone.
    """
    pointer = Path(folder) / NEWEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    path = Path(folder) / name
    if not NUMBERED.fullmatch(name) or not path.is_file():
        raise InputError(f"{pointer}: expected the name of a checkpoint beside it, got {name!r}")
    return path


def remove_previous(folder: str | Path, frequency: int) -> None:
    """Remove the checkpoint of the epoch before the newest, unless ``frequency`` asks for it (0: it does not).

    A run that is killed between the two leaves it.
    """
    if (path := newest(folder)) is None:
        return
    epoch = int(path.name.rsplit("-", 1)[1]) - 1
    if not (frequency > 0 and epoch % frequency == 0):
        path.with_name(f"model.pth.tar-{epoch}").unlink(missing_ok=True)


def find(folder: str | Path, model_name: str, epoch: int | None) -> Path:
    """The file that ``--model-dir`` and ``--load-epoch`` mean; without an epoch the best on validation, else the newest."""
    inside = Path(folder) / model_name
    if not inside.is_dir():
        raise InputError(f"--model-dir {str(folder)!r}: expected a folder {model_name!r} in it, as a run writes it")
    if epoch is not None:
        path = inside / f"model.pth.tar-{epoch}"
        if not path.is_file():
            there = sorted(
                int(p.name.rsplit("-", 1)[1]) for p in inside.iterdir() if re.fullmatch(r"model\.pth\.tar-\d+", p.name)
            )
            nearest = min(there, key=lambda e: abs(e - epoch), default=None)
            hint = f"; the nearest there is {nearest}" if nearest is not None else ""
            raise InputError(f"--load-epoch {epoch}: no file {str(path)!r}{hint}")
        return path
    path = inside / BEST
    if path.is_file():
        return path
    last = newest(inside)
    if last is None:
        raise InputError(f"--model-dir {str(folder)!r}: no checkpoint in {str(inside)!r}; name one with --load-epoch")
    return last


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours or of upstream's, weights only.

    Raises:
        InputError: missing, cut short, not a checkpoint, or one that would run code.
    """
    try:
        with objects_as_data(UPSTREAM_OBJECTS):
            content = read_tensors(path)
    except (ValueError, OSError) as e:
        raise InputError(f"checkpoint {str(path)!r}: expected a whole file of tensors, refused ({e})") from e
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict) or "epoch" not in content:
        raise InputError(f"checkpoint {str(path)!r}: expected keys state_dict and epoch")
    if unnamed := [key for key in content["state_dict"] if not isinstance(key, str)]:
        raise InputError(f"checkpoint {str(path)!r}: expected names of tensors in its state_dict, got {unnamed[0]!r}")
    if (kind := _unusual_tensor(content)) is not None:
        raise InputError(f"checkpoint {str(path)!r}: expected tensors of plain numbers, got {kind}")
    if (wrong := _unlike_ours(content.get("plpp_reg"))) is not None:
        raise InputError(f"checkpoint {str(path)!r}: expected the state of a run of ours in plpp_reg, got another {wrong}")
    return content


def plain_tensors(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a checkpoint has learned, by name, without the ``module.`` that DataParallel puts before it."""
    state = content["state_dict"].items()
    return {name.removeprefix("module."): tensor for name, tensor in state if isinstance(tensor, torch.Tensor)}


def _unusual_tensor(content: object) -> str | None:
    """The kind of a tensor in there that torch's own loading takes and nothing else here does: sparse, say, or without data."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_meta or value.is_quantized):
            return "one without data" if value.is_meta else f"one of layout {value.layout}, type {value.dtype}"
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    return None


def _unlike_ours(extra: object) -> str | None:
    """Which of the keys beside the weights is not as :meth:`Saving.content` writes it; None where all are, or none is there."""

    def is_number(value: object) -> bool:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        )  # not NaN, nor an integer that is no float

    def are_names(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    if extra is None:
        return None
    if not isinstance(extra, dict):
        return type(extra).__name__
    history, names = extra.get("history", []), extra.get("loss_names", [])
    fits = {
        "loss_names": are_names(names),
        "classnames": are_names(extra.get("classnames", [])),
        "seconds": is_number(extra.get("seconds", 0.0)),
        "best_val": extra.get("best_val") is None or is_number(extra["best_val"]),
        "same": isinstance(extra.get("same", {}), dict),
        "teacher": is_teacher(extra.get("teacher")),
        "history": isinstance(history, list)
        and all(isinstance(row, dict) and all(map(is_number, row.values())) for row in history),
    }
    wrong = [key for key, right in fits.items() if not right]
    if not wrong and not all(row.keys() >= set(names) for row in history):
        wrong = ["history"]
    return wrong[0] if wrong else None


def load_weights(
    module: torch.nn.Module,
    state_dict: dict[str, torch.Tensor],
    path: str | Path,
    not_loaded: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> list[str]:
    """Copy a checkpoint's tensors into ``module``, ignoring upstream's fixed token vectors.

    ``not_loaded``: beginnings of further names that are ignored where ``module`` has no such tensor: the frozen CLIP, say,
    which some of upstream's methods save whole. ``optional``: beginnings of names that the file may lack; what ``module`` has
    there stays.

    Returns:
        The names that the file lacks.

    Raises:
        InputError: a name or a shape does not fit; nothing is changed then.
    """
    ours = module.state_dict()
    theirs = {name.removeprefix("module."): t for name, t in state_dict.items()}

    def counts(name: str) -> bool:
        leaf = name.rsplit(".", 1)[-1]
        return name in ours or leaf in PROMPTS or (leaf not in FIXED_TOKENS and not name.startswith(tuple(not_loaded)))

    theirs = {name: t for name, t in theirs.items() if counts(name)}
    for name, tensor in theirs.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"checkpoint {str(path)!r}: expected finite numbers in {name}, got something else")
    lacking = sorted(name for name in ours.keys() - theirs.keys() if name.startswith(tuple(optional)))
    if ours.keys() - set(lacking) != theirs.keys():
        raise InputError(f"checkpoint {str(path)!r}: expected {sorted(ours)}, got {sorted(theirs)}")
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            raise InputError(
                f"checkpoint {str(path)!r}: expected {name} of shape {tuple(ours[name].shape)}, got {tuple(tensor.shape)}"
            )
    module.load_state_dict(theirs, strict=not lacking)
    return lacking
