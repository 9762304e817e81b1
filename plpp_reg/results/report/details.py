"""How good the prompts of one run are, and where they go wrong: a part of the page a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from plpp_reg.errors import InputError
from plpp_reg.results import evaluation, numbers
from plpp_reg.results.evaluation import Evaluation
from plpp_reg.results.report.grids import Cell, Grid, TableRow
from plpp_reg.results.report.mistakes import Gallery, Shown

WHOLE = 20  # classes of a confusion matrix that is shown whole; of more, those with the most mistakes
MOST_PAIRS = 20  # confusions listed by name
SHADES = 9  # of a cell of the matrix, by the share of its class


class Matrix(NamedTuple):
    """``rows``: name, counts and shades (0 to :data:`SHADES`), the last column everything else; ``of``: all classes."""

    names: list[str]
    rows: list[tuple[str, list[tuple[int, int]]]]
    of: int


class Detail(NamedTuple):
    """What is known of one test of a run; ``why``: why nothing is."""

    test: str
    summary: Grid | None = None
    sentence: str = ""
    classes: Grid | None = None
    matrix: Matrix | None = None
    pairs: Grid | None = None
    mistakes: Sequence[Shown] = ()
    wrong: int = 0
    why: str = ""


def details_of(result: Mapping[str, Any], test: str, label: str, gallery: Gallery) -> list[Detail]:
    """A run's own test, named ``test``, and its further ones; nothing of a run that was made before they were recorded."""
    tests = {test: result, **result.get("tests", {})}
    found = [_detail(name, each, label, gallery) for name, each in tests.items()]
    return [detail for detail in found if detail is not None]


def _detail(test: str, tested: Mapping[str, Any], label: str, gallery: Gallery) -> Detail | None:
    try:
        found = evaluation.read(tested)
    except InputError as e:
        return Detail(test, why=str(e))
    if found is None:
        return None
    return Detail(
        test,
        _summary(label, found),
        evaluation.against_zero_shot(found) if found.difference is not None else "",
        _classes(found),
        _matrix(found),
        _pairs(found),
        gallery.show(found.mistakes),
        sum(count for *_, count in found.confusion),
    )


def _summary(label: str, found: Evaluation) -> Grid:
    head, *rows = evaluation.summary_rows(label, "", found)
    lines = [TableRow(name, "measured", [Cell(text) for text in cells]) for name, *cells in rows]
    return Grid(f"{found.images:,} pictures", head[1:], [("", lines)])


def _classes(found: Evaluation) -> Grid:
    columns = ["recall", "precision", "F1", "pictures"]
    each = zip(*(found.per_class[name] for name in ("recall", "precision", "f1")), strict=True)
    lines = [
        TableRow(name, "measured", [*(Cell(numbers.figure(v, 1)) for v in values), Cell(f"{support:.0f}")])
        for name, values, support in zip(found.classes, each, found.per_class["support"], strict=True)
    ]
    return Grid("Each class, percent", columns, [("", lines)])


def _counts(found: Evaluation) -> dict[int, dict[int, int]]:
    counts: dict[int, dict[int, int]] = {}
    for label, (recall, support) in enumerate(zip(found.per_class["recall"], found.per_class["support"], strict=True)):
        counts[label] = {label: round(recall * support / 100)}
    for truth, predicted, count in found.confusion:
        counts[truth][predicted] = count
    return counts


def _matrix(found: Evaluation) -> Matrix:
    counts = _counts(found)
    wrong = dict.fromkeys(counts, 0)
    for truth, predicted, count in found.confusion:
        wrong[truth] += count
        wrong[predicted] += count
    shown = sorted(sorted(counts, key=lambda label: -wrong[label])[:WHOLE])
    rows = []
    for truth in shown:
        total = sum(counts[truth].values())
        values = [counts[truth].get(predicted, 0) for predicted in shown]
        values += [total - sum(values)] if len(shown) < len(counts) else []
        rows.append((found.classes[truth], [(v, _shade(v, total)) for v in values]))
    names = [found.classes[label] for label in shown] + (["all others"] if len(shown) < len(counts) else [])
    return Matrix(names, rows, len(counts))


def _shade(count: int, total: int) -> int:
    return min(SHADES, -(-SHADES * count // total)) if count > 0 and total > 0 else 0


def _pairs(found: Evaluation) -> Grid | None:
    worst = sorted(found.confusion, key=lambda pair: -pair[2])[:MOST_PAIRS]
    if not worst:
        return None
    lines = [
        TableRow(
            f"{found.classes[truth]}, called {found.classes[predicted]}",
            "measured",
            [Cell(str(count)), Cell(_share(count, found.per_class["support"][truth]))],
        )
        for truth, predicted, count in worst
    ]
    return Grid("The most frequent confusions", ["pictures", "% of the class"], [("", lines)])


def _share(count: int, support: float) -> str:
    return numbers.figure(100 * count / support, 1) if support else ""
