"""What to know beside a table's figures: what differs inside an average, what is not compared, what is not counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from plpp_reg.protocols import shots_text
from plpp_reg.tables.records import Record
from plpp_reg.tables.rows import title_of
from plpp_reg.tables.settings import Kinds, differing, written

MOST = 3  # data sets that a note names, of those with one value


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
    return [f"Not the same for all of {', '.join(labels)}: {said}." for said, labels in rows.items()]


def _cells(some: Sequence[tuple[str, int]], of: Iterable[tuple[str, int]]) -> str:
    """``DTD, EuroSAT and 8 more``; the shots where they alone differ, both where both do."""
    several_datasets, several_shots = (len({cell[i] for cell in of}) > 1 for i in (0, 1))
    names = [
        " ".join([*([title_of(dataset)] if several_datasets else []), *([shots_text(shots)] if several_shots else [])])
        for dataset, shots in some
    ]
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def uncompared(apart: Iterable[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Rows with PLPP for which no plain run has their settings, by the title of their group."""
    groups: dict[tuple[str, str], list[str]] = {}
    for title, rows in apart:
        for treated, why in rows.items():
            groups.setdefault((treated, why), []).append(title)
    return [f"{treated} ({', '.join(titles)}) has no difference from {why}." for (treated, why), titles in groups.items()]


def doubled(records: Iterable[Record]) -> list[str]:
    """Runs of one row and seed in two folders, with other figures: the table has the last."""
    last: dict[tuple[str, tuple[str, int], int], Record] = {}
    notes = []
    for record in records:
        key = (record.row, record.cell, record.note["seed"])
        before = last.setdefault(key, record)
        last[key] = record
        if before.accuracies != record.accuracies:
            where = f"{title_of(record.cell[0])}, {shots_text(record.cell[1])}, seed {key[2]}"
            notes.append(
                f"{record.row} ({where}) is there twice, with other figures: {record.place} counts, {before.place} does not."
            )
    return notes
