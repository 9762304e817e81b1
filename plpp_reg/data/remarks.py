"""What is said of one's own data beside its numbers: pictures in two places, files that are not used, paths of Windows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from plpp_reg.data.sampling import PARTS, DataSplit, Datum

SHOWN = 3  # of several names


def some(names: Sequence[str], one: str, several: str = "") -> str:
    """How many, and the first of them.

    >>> some(["cat", "dog"], "class", "classes")
    "2 classes ('cat', 'dog')"
    """
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    what = one if len(names) == 1 else several or f"{one}s"
    return f"{len(names):,} {what} ({', '.join(map(repr, names[:SHOWN]))}{more})"


def counted_endings(names: Iterable[str]) -> str:
    """Files by their endings.

    >>> counted_endings(["a.HEIC", "b.heic", "notes.txt"])
    '3 files (.heic 2, .txt 1)'
    """
    count = Counter(Path(name).suffix.lower() or "no ending" for name in names)
    kinds = ", ".join(f"{ending} {n:,}" for ending, n in count.most_common(SHOWN))
    return f"{count.total():,} file{'s' * (count.total() != 1)} ({kinds}{', …' * (len(count) > SHOWN)})"


def as_here(name: str, folder: str | Path) -> str:
    """A picture's path with slashes where it was written with Windows' backslashes, and no file is called just so."""
    if "\\" not in name or (os.sep != "\\" and os.path.lexists(os.path.join(folder, name))):
        return name
    return name.replace("\\", "/")


def slashes(given: Sequence[str], read: Sequence[str]) -> list[str]:
    """That some paths were read with slashes; nothing where none was."""
    turned = [a for a, b in zip(given, read, strict=True) if a != b]
    return [f"backslashes read as slashes: {some(turned, 'path')}"] if turned else []


def path_of(datum: Datum) -> str:
    return os.path.normpath(datum.impath)


def doubles(data: DataSplit, key: Callable[[Datum], Hashable] = path_of) -> list[str]:
    """Pictures that are one by ``key``, their path or their content, and stand in two classes, in two parts or twice."""
    first: dict[Hashable, tuple[str, Datum]] = {}
    classes: list[str] = []
    parts: dict[tuple[str, str], list[str]] = {}
    twice: list[str] = []
    for part in PARTS:
        for datum in getattr(data, part):
            before, other = first.setdefault(key(datum), (part, datum))
            if other is datum:
                continue
            name = datum.name if datum.name == other.name else f"{other.name} = {datum.name}"
            if datum.label != other.label:
                classes.append(f"{name}: {other.classname}, {datum.classname}")
            if part != before:
                parts.setdefault((before, part), []).append(name)
            elif datum.label == other.label:
                twice.append(name)
    said = [f"in two classes: {some(classes, 'picture')}"] if classes else []
    said += [f"both for {a} and for {b}: {some(names, 'picture')}" for (a, b), names in parts.items()]
    return said + ([f"twice in one class: {some(twice, 'picture')}"] if twice else [])
