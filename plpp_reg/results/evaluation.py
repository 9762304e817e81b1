"""How good a run's prompts are: what its record says of a test beside Dassl's figures, and the table that a run ends with.

``result["evaluation"]`` (and that of each further test) holds:

``images``       how many were tested;
``interval``     95% interval of the accuracy (Wilson), percent;
``zero_shot``    of the same images and class names in a hand-crafted template: ``templates``, ``metrics``, ``interval``;
                 null where the method learns nothing;
``difference``   accuracy less that of zero-shot, paired over the images: ``mean`` and its 95% ``interval``, points;
``classes``      names by label; ``per_class`` lists of ``recall``, ``precision``, ``f1`` (percent) and ``support`` beside them;
``confusion``    [truth, prediction, images] of every mistake that was made;
``mistakes``     the surest wrong images: ``image``, ``path`` and ``sha256`` of its file, the labels of its class and of the
                 one ``predicted``, the probabilities of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from plpp_reg.errors import InputError
from plpp_reg.results import numbers
from plpp_reg.results.record import RESULT, is_figures, is_number, is_text

MOST_MISTAKES = 24  # wrong images that a record names
Z = 1.959963984540054  # normal quantile of 97.5%


def wilson(hits: int, images: int) -> list[float]:
    """95% interval of a share of ``images``, percent (Wilson 1927, without correction for continuity).

    >>> [round(bound, 1) for bound in wilson(8, 10)]
    [49.0, 94.3]
    """
    share, z2 = hits / images, Z * Z / images
    centre = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / images + z2 / (4 * images))
    return [100 * max(0.0, centre - half), 100 * min(1.0, centre + half)]


def paired_over_images(gained: int, lost: int, images: int) -> dict[str, Any]:
    """Difference of two classifiers' accuracies on the same images, points, and its 95% interval.

    The interval is Agresti and Min's (2005): the normal approximation with half an image more of each of the four kinds, so
    that it is none of width 0 where few images, or none, tell the two apart.

    Args:
        gained: images that the first alone has right.
        lost: images that the second alone has right.

    >>> [round(bound, 1) for bound in paired_over_images(gained=0, lost=0, images=10)["interval"]]
    [-16.3, 16.3]
    """
    more = images + 2
    mean = (gained - lost) / more
    half = Z * math.sqrt(max(0.0, (gained + lost + 1) / more - mean * mean) / more)
    bounds = [100 * max(-1.0, mean - half), 100 * min(1.0, mean + half)]
    return {"mean": 100 * (gained - lost) / images, "interval": bounds}


class Mistake(NamedTuple):
    """A wrong image: its name in the data set, where it was, the probabilities of the predicted class and of its own."""

    image: str
    path: str
    sha256: str
    truth: str
    predicted: str
    probability: float
    probability_of_truth: float


class ZeroShot(NamedTuple):
    """CLIP's own figures on the same images."""

    templates: list[str]
    metrics: Mapping[str, float]
    interval: Sequence[float]


class Evaluation(NamedTuple):
    """A test, as a record tells it; ``per_class``: name -> a figure a class."""

    metrics: Mapping[str, float]
    images: int
    interval: Sequence[float]
    zero_shot: ZeroShot | None
    difference: Mapping[str, Any] | None
    classes: list[str]
    per_class: Mapping[str, list[float]]
    confusion: list[tuple[int, int, int]]
    mistakes: list[Mistake]


def read(tested: Mapping[str, Any]) -> Evaluation | None:
    """Of a record, or of one of its further tests; None where it does not say: it was made before, or tested nothing.

    Raises:
        InputError: it says something else.
    """
    told = tested.get("evaluation")
    if told is None:
        return None
    try:
        found = _read(tested["metrics"], told)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        raise InputError(f"its {RESULT}: expected how good its prompts are, got something else") from e
    return found


def _read(metrics: Mapping[str, float], told: Mapping[str, Any]) -> Evaluation:
    classes = [_checked(is_text, name) for name in told["classes"]]
    per_class = {name: [_number(v) for v in told["per_class"][name]] for name in ("recall", "precision", "f1", "support")}
    if any(len(values) != len(classes) for values in per_class.values()):
        raise ValueError("a figure a class")
    confusion = [(_label(t, classes), _label(p, classes), int(_number(n))) for t, p, n in told["confusion"]]
    mistakes = [
        Mistake(
            _checked(is_text, m["image"]),
            _checked(is_text, m["path"]),
            _checked(is_text, m["sha256"]),
            classes[_label(m["label"], classes)],
            classes[_label(m["predicted"], classes)],
            _number(m["probability"]),
            _number(m["probability_of_label"]),
        )
        for m in told["mistakes"][:MOST_MISTAKES]
    ]
    zero_shot, difference = told["zero_shot"], told["difference"]
    if zero_shot is not None:
        templates = [_checked(is_text, text) for text in zero_shot["templates"]]
        zero_shot = ZeroShot(templates, _checked(is_figures, zero_shot["metrics"]), _interval(zero_shot["interval"]))
        zero_shot.metrics["accuracy"]
    if difference is not None:
        difference = {"mean": _number(difference["mean"]), "interval": _interval(difference["interval"])}
    images, interval = int(_number(told["images"])), _interval(told["interval"])
    return Evaluation(metrics, images, interval, zero_shot, difference, classes, per_class, confusion, mistakes)


def _checked(fits: Any, value: Any) -> Any:
    if not fits(value):
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    return _checked(is_number, value)


def _label(value: Any, classes: Sequence[str]) -> int:
    if not (isinstance(value, int) and 0 <= value < len(classes)):
        raise ValueError(value)
    return value


def _interval(bounds: Sequence[Any]) -> list[float]:
    low, high = map(_number, bounds)
    return [low, high]


# ---- telling it ------------------------------------------------------------------------------------------------------


def summary_rows(label: str, what: str, found: Evaluation) -> list[list[str]]:
    """Head and rows of the table: zero-shot where it is known, and the prompts, called ``label``."""
    rows = [[what, "accuracy (95% interval)", "macro-F1", "calibration error"]]
    if found.zero_shot is not None:
        rows.append([zero_shot_label(found.zero_shot), *_cells(found.zero_shot.metrics, found.zero_shot.interval)])
    return [*rows, [label, *_cells(found.metrics, found.interval)]]


def summary_lines(label: str, part: str, found: Evaluation) -> list[str]:
    """The table that a run ends with, and what it comes to."""
    what = f"{part}, {found.images:,} picture{'s' * (found.images != 1)}"
    lines = numbers.columns(summary_rows(label, what, found))
    if found.difference is not None:
        lines.append(against_zero_shot(found))
    return lines


def zero_shot_label(found: ZeroShot) -> str:
    """``zero-shot, "a photo of a {}."``"""
    return f'zero-shot, "{found.templates[0]}"' if len(found.templates) == 1 else f"zero-shot, {len(found.templates)} templates"


def against_zero_shot(found: Evaluation) -> str:
    """Whether training paid, in a sentence."""
    low, high = found.difference["interval"]
    said = f"{numbers.figure(found.difference['mean'], 1, signed=True)} points ({numbers.interval(low, high, signed=True)})"
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "not told from"
    return f"The trained prompt is {verdict} zero-shot: {said}, paired over the pictures."


def _cells(metrics: Mapping[str, float], bounds: Sequence[float]) -> list[str]:
    others = [metrics.get(name) for name in ("macro_f1", "calibration_error")]
    accuracy = f"{numbers.figure(metrics['accuracy'], 1)} ({numbers.interval(*bounds)})"
    return [accuracy, *("" if value is None else numbers.figure(value, 1) for value in others)]
