"""What to know beside a table's figures: what differs inside an average, what is not compared, what is not counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from plpp_reg.results.job import shots_text
from plpp_reg.results.tables.records import ZERO_SHOT, Record
from plpp_reg.results.tables.rows import TRANSDUCTIVE, Row, title_of
from plpp_reg.results.tables.series import AVERAGE, H
from plpp_reg.results.tables.settings import Kinds, Name, differing, written

MOST = 3  # data sets that a note names, of those with one value


def below_zero_shot(rows: Sequence[Row], form: str, columns: Sequence[str]) -> list[str]:
    """Which methods stay below zero-shot CLIP, on which data, by the figure that counts: H, the average over targets, each
    number of shots."""
    notes = []
    counting = [c for c in columns if c in (H, AVERAGE)] or ([] if form != "shots" else columns)
    for group in dict.fromkeys(row.group for row in rows):
        there = [row for row in rows if row.group == group and row.kind == "measured"]
        plain = next((row for row in there if row.name.method == ZERO_SHOT), None)
        for column in counting if plain is not None and len(there) > 1 else []:
            bound = plain.cells.get(column)
            low = [row for row in there if row is not plain and bound and column in row.cells]
            low = [row for row in low if row.cells[column].value < bound.value]
            if low:
                what = shots_text(int(column)) if form == "shots" else column
                said = ", ".join(f"{row.label} {row.cells[column].value:.2f}" for row in low)
                notes.append(f"Below zero-shot CLIP on {group} ({what}, {bound.value:.2f}): {said}.")
    return notes


def varying(kinds: Kinds) -> list[str]:
    """Settings that a method's recipe, or somebody's hand, changes between data sets or shots."""
    rows: dict[str, list[str]] = {}
    for label, cells in kinds.items():
        said = []
        for key in differing(list({id(settings): settings for settings in cells.values()}.values())):
            values: dict[str, list[tuple[str, int]]] = {}
            for cell, settings in cells.items():
                values.setdefault(written(settings, key), []).append(cell)
            said.append(f"{key} " + ", ".join(f"{value} ({_cells(there, cells)})" for value, there in values.items()))
        if said:
            rows.setdefault("; ".join(said), []).append(label)
    return [f"Not the same for all of {', '.join(map(str, labels))}: {said}." for said, labels in rows.items()]


def _cells(some: Sequence[tuple[str, int]], of: Iterable[tuple[str, int]]) -> str:
    """``DTD, EuroSAT and 8 more``; the shots where they alone differ, both where both do."""
    several_datasets, several_shots = (len({cell[i] for cell in of}) > 1 for i in (0, 1))
    several_datasets |= not several_shots  # of one cell, its data set
    names = [
        " ".join([*([title_of(dataset)] if several_datasets else []), *([shots_text(shots)] if several_shots else [])])
        for dataset, shots in some
    ]
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def unnamed(kinds: Kinds, records: Iterable[Record]) -> list[str]:
    """What the row of a method's plain name was made with, where rows beside it are named for that."""
    rows: dict[str, set[str]] = {}
    for record in records:
        rows.setdefault(record.method, set()).add(record.row)
    notes = []
    for method, labels in rows.items():
        if method not in kinds:  # every one of its rows is named for its settings
            continue
        usual = kinds[method]
        others = [
            (kinds[label][cell], usual[cell]) for label in sorted(labels, key=str) for cell in kinds[label] if cell in usual
        ]
        keys = dict.fromkeys(key for both in others for key in sorted(differing(both)))
        several = differing(list(usual.values()))  # a note of their own says these
        said = [f"{key}={written(next(iter(usual.values())), key)}" for key in keys if key not in several]
        if said:
            notes.append(f"{method} has {', '.join(said)} where its row does not name another.")
    return notes


def uncompared(apart: Mapping[tuple[str, str], Sequence[tuple[str, int]]], kinds: Kinds) -> list[str]:
    """Rows with PLPP for which no plain run has their settings, and where."""
    cells = {cell for there in kinds.values() for cell in there}
    return [f"{treated} ({_cells(there, cells)}) has no difference from {why}." for (treated, why), there in apart.items()]


def lacking(row: str, title: str, datasets: Sequence[str]) -> str:
    """Why a row has no average."""
    names = [title_of(dataset) for dataset in datasets]
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    why = f"it lacks {', '.join(names[:MOST])}{more}" if names else "it has no seed on all of them"
    return f"{row} is not in {title}: {why}."


def transductive(rows: Sequence[Row], form: str) -> list[str]:
    """What a reader must know of methods that have seen, without labels, what others are only tested on."""
    seen = {
        "halves": "the images and the names of the new classes",
        "targets": "images and the names of the data sets that they are tested on",
    }
    if form not in seen or not any(row.mark == TRANSDUCTIVE for row in rows):
        return []
    return [
        f"Rows marked {TRANSDUCTIVE} were trained on {seen[form]}, without labels: they are not comparable with the others."
    ]


def doubled(records: Iterable[Record]) -> list[str]:
    """Runs of one row and seed in several folders, with other figures: the table has the last."""
    found: dict[tuple[str, tuple[str, int], int, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.row, record.cell, record.note["seed"], record.target), []).append(record)
    notes = []
    for (row, cell, seed, _), (*others, last) in found.items():
        if any(other.accuracies != last.accuracies for other in others):
            where = f"{_cell(cell)}, seed {seed}"
            times = "twice" if len(others) == 1 else f"{len(others) + 1} times"
            places = ", ".join(str(other.place) for other in others)
            do = "does" if len(others) == 1 else "do"
            notes.append(f"{row} ({where}) is there {times}, with other figures: {last.place} counts, {places} {do} not.")
    return notes


def other_pictures(records: Iterable[Record], pairs: Iterable[tuple[Name, Name]]) -> list[str]:
    """Runs of a row whose tests saw other pictures than each other's, and pairs that saw other ones with the same seed."""
    found: dict[tuple[Name, tuple[str, int], str], dict[int, Record]] = {}
    for record in records:
        found.setdefault((record.row, record.cell, record.target), {})[record.note["seed"]] = record
    notes = []
    for (row, cell, _), by_seed in found.items():
        for test in dict.fromkeys(name for record in by_seed.values() for name in record.seen if name != "training"):
            kinds: dict[str, list[int]] = {}
            for seed, record in sorted(by_seed.items()):
                if record.seen.get(test):
                    kinds.setdefault(record.seen[test], []).append(seed)
            if len(kinds) > 1:
                each = " / ".join(", ".join(map(str, seeds)) for seeds in kinds.values())
                notes.append(f"Runs of {row} ({_cell(cell)}) were tested ({test}) on different pictures: seeds {each}.")
    for treated, plain in pairs:
        for (row, cell, target), by_seed in found.items():
            others = found.get((plain, cell, target), {}) if row == treated else {}
            for seed, record in sorted(by_seed.items()):
                other = others[seed].seen if seed in others else {}
                names = [name for name, sha256 in record.seen.items() if sha256 and other.get(name) and other[name] != sha256]
                if names:
                    notes.append(
                        f"{treated} and {plain} ({_cell(cell)}, seed {seed}) saw different pictures: {', '.join(names)}."
                    )
    return notes


def _cell(cell: tuple[str, int]) -> str:
    dataset, shots = cell
    return ", ".join([title_of(dataset), *([shots_text(shots)] if shots else [])])
