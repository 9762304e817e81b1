"""The file of rows, and what it says of a setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plpp_reg.experiments.parallel_seeds import HALVES
from plpp_reg.results.frontier import Point

from study.settings import Case, Setting


class Rows:
    """The file of rows, and what it says of a setting; of a file that has several text towers, of one of them."""

    def __init__(self, path: Path, tower: str | None = None) -> None:
        self.path, self.tower = path, tower
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        self.rows = [row for row in rows if row.get("tower") == tower]

    def add(self, row: dict[str, Any]) -> None:
        row = row if self.tower is None else {"tower": self.tower, **row}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")

    def of(self, name: str, case: Case, split: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if (r["name"], r["n_ctx"], r["shots"], r["split"]) == (name, *case, split)]

    def seeds(self, name: str, case: Case, split: str) -> list[int]:
        return sorted(seed for r in self.of(name, case, split) for seed in r["seeds"])

    def figures(self, name: str, case: Case, split: str, figure: str, seeds: Sequence[int], quarter: int = 4) -> list[float]:
        """Accuracies in percent, or perplexities, by seed."""
        found = {}
        for r in self.of(name, case, split):
            scale = 100 / r["images"][figure] if figure in HALVES else 1
            values = r["quarters"][quarter - 1][figure]
            found |= {seed: scale * value for seed, value in zip(r["seeds"], values, strict=True)}
        return [found[seed] for seed in seeds]

    def point(self, setting: Setting, case: Case, split: str, seeds: Sequence[int], quarter: int = 4) -> Point:
        base, new = (self.figures(setting.name, case, split, half, seeds, quarter) for half in HALVES)
        return Point(setting.strength, base, new)


def between(page: Path, start: str, end: str, text: str) -> None:
    """Put ``text`` between two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
