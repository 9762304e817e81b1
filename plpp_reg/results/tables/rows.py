"""What a table consists of: its rows, what they are called, and their order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from plpp_reg import trainers
from plpp_reg.data import full_name, paper_name
from plpp_reg.errors import InputError
from plpp_reg.results.tables.series import Figure
from plpp_reg.results.tables.settings import Name

PAPERS = ("ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101", "FGVCAircraft", "SUN397", "DTD")
PAPERS += ("EuroSAT", "UCF101")

TRANSDUCTIVE = "transductive"  # a mark


class Row(NamedTuple):
    """``kind``: measured, difference or published; ``n``: the number of seeds, "2-3" where columns differ.

    ``name``: whose figures they are, of the literature's the method's; ``against``: of a difference, what is subtracted;
    ``average``: over data sets; ``mark``: what a reader must not overlook, behind the label.
    """

    group: str
    label: str
    kind: str
    name: Name
    cells: Mapping[str, Figure]
    n: str = ""
    source: str = ""
    against: Name | None = None
    average: bool = False
    mark: str = ""


def marked(row: Row, form: str, of_targets: Collection[Name]) -> Row:
    """With its mark, where it has one: of two halves of the classes, and of students of each target, the literature's or those
    of the rows ``of_targets``."""
    seen = form == "halves" or (form == "targets" and (row.kind == "published" or row.name in of_targets))
    return row._replace(mark=TRANSDUCTIVE) if seen and row.name.plain in trainers.TRANSDUCTIVE else row


class Table(NamedTuple):
    """``notes``: what a reader must know beside the figures, a sentence each; ``legend``: what the figures are; ``source``:
    what a row's source is."""

    protocol: str
    backbone: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    legend: str = ""
    source: str = "reference"


def title_of(dataset: str) -> str:
    """The paper's name of a data set; of anything else (one's own, a column) its own."""
    try:
        return paper_name(full_name(dataset))
    except InputError:
        return dataset


def dataset_order(dataset: str, shots: int) -> tuple[int, str, int]:
    """What to sort by: the papers' order first."""
    title = title_of(dataset)
    known = (*PAPERS, "ImageNetV2", "ImageNet-Sketch", "ImageNet-A", "ImageNet-R")
    return (known.index(title) if title in known else len(known), title, shots)


def method_order(methods: Iterable[Name]) -> list[Name]:
    """Zero-shot first, then each method with its PLPP forms after it."""
    return sorted(methods, key=lambda m: (not m.method.startswith("Zeroshot"), m.plain, str(m)))
