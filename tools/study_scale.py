"""Does a weight of PLPP carry over to other text towers, or rather a share of the gradient?

    python tools/study_scale.py --rows benchmarks/results/study-scale.jsonl --towers build/widths   # runs what is missing
    python tools/study_scale.py --rows benchmarks/results/study-scale.jsonl --docs docs    # the tables of docs/study.md

The towers are the embedded model's, the same function with vectors half and twice as long (tools/plpp_share.py), and towers of
other widths behind the same image tower: DIR/64.safetensors and so on, each the second stage of the embedded model's training,
shortened (`tools/train_embedded.py --keep-image-tower --text-steps 700 --text-width 64 --out build/widths/64.safetensors`).
On each, CoOp with the inverted loss alone, k 1,000, at five weights, on the validation part, paired with CoOp without it.

The share of a weight is that of its gradient on the context beside the cross-entropy's, after a quarter of plain CoOp's epochs.
The rule, written before any of it was run: a weight by share is offered if, in both cases, H at the best common share is
above H at the best common weight, mean over the towers, paired over the seeds, by more than the 95% interval.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from plpp_reg.clip.embedded import embedded_state_dict, trained_token_ids
from plpp_reg.clip.load import load_clip
from plpp_reg.results.frontier import difference
from plpp_reg.results.record import paired, summary

from plpp_share import rescaled, shares
from study.bench import Bench
from study.rows import Rows, between
from study.settings import FINE, PLAIN, A, B, Case, Setting, plpp

WEIGHTS = [0.03, 0.1, 0.3, 1.0, 3.0]
SETTINGS = [plpp("inverse, k 1000:", weight, 1000) for weight in WEIGHTS]
CASES = (B, A)
SCALES = (0.5, 1.0, 2.0)
WIDTHS = (64, 128, 256)
START, END = "<!-- other towers -->", "<!-- end of other towers -->"
STEPS = 21  # of the search for the best common weight or share


class Tower(NamedTuple):
    name: str
    scale: float
    load: Callable[[], nn.Module]


def towers(folder: Path) -> list[Tower]:
    """Those that are there: ``folder`` may lack some of the widths, or all."""
    files = [(width, folder / f"{width}.safetensors") for width in WIDTHS]
    return [
        *(Tower(f"embedded, vectors times {scale:g}", scale, lambda s=scale: rescaled(load_clip(), s)) for scale in SCALES),
        *(Tower(f"width {w}, trained shortly", 1.0, lambda f=file: of_file(f)) for w, file in files if file.is_file()),
    ]


def of_file(file: Path) -> nn.Module:
    """A model in the embedded file's format, of any width of the text tower."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(embedded_state_dict(file), Path(folder) / "model.pt")
        model = load_clip(str(Path(folder) / "model.pt"))
    model.trained_token_ids = trained_token_ids(file)
    return model


class Shared(Bench):
    """A bench that also says the share of the inverted loss at weight 1, on plain CoOp's way."""

    def run(self, setting: Setting, case: Case, split: str, seeds: Sequence[int]) -> dict[str, Any]:
        row = super().run(setting, case, split, seeds)
        if setting.name == PLAIN.name:
            unit = self.started(plpp("inverse, k 1000:", 1, 1000), case, self.images(split), seeds)
            (share,) = shares(unit, self.contexts[0]).values()
            row["share"] = round(share, 4)
        return row


def curve(rows: Rows, case: Case, at: Sequence[float]) -> list[list[float]]:
    """For each of the weights ``at``, every seed's difference in H to plain CoOp.

    Between two measured weights it is on a straight line over the weight's logarithm.
    """
    plain = rows.point(PLAIN, case, "val", FINE).h
    measured = [[h - p for h, p in zip(rows.point(s, case, "val", FINE).h, plain, strict=True)] for s in SETTINGS]
    found = []
    for weight in at:
        i = min(bisect.bisect_right(WEIGHTS, weight), len(WEIGHTS) - 1) - 1
        t = math.log(weight / WEIGHTS[i]) / math.log(WEIGHTS[i + 1] / WEIGHTS[i])
        found.append([(1 - t) * a + t * b for a, b in zip(measured[i], measured[i + 1], strict=True)])
    return found


class Common(NamedTuple):
    """The best value that all towers have in common, and what H it gives, mean over the towers, by seed."""

    value: float
    gains: list[float]


def best_common(rows: Sequence[Rows], case: Case, shares_of: Sequence[float]) -> Common:
    """Of ``value / share`` as each tower's weight; a share of 1 makes it the weight itself."""
    low, high = WEIGHTS[0] * max(shares_of), WEIGHTS[-1] * min(shares_of)
    values = [low * (high / low) ** (i / (STEPS - 1)) for i in range(STEPS)]
    by_tower = [curve(r, case, [value / share for value in values]) for r, share in zip(rows, shares_of, strict=True)]
    by_value = [[statistics.fmean(seeds) for seeds in zip(*found, strict=True)] for found in zip(*by_tower, strict=True)]
    return max(map(Common, values, by_value), key=lambda common: statistics.fmean(common.gains))


def verdict(rows: Sequence[Rows]) -> str:
    """What the rule says."""
    lines, above = [], []
    for case in CASES:
        shares_of = [r.of(PLAIN.name, case, "val")[0]["share"] for r in rows]
        weight, share = best_common(rows, case, [1.0] * len(rows)), best_common(rows, case, shares_of)
        gain = paired(share.gains, weight.gains)
        above.append(gain.mean > gain.half_width)
        lines.append(
            f"{case}: best common weight {weight.value:.2f}, H {summary(weight.gains).mean:+.1f}; best common share "
            f"{share.value:.2f}, H {summary(share.gains).mean:+.1f}; by share {gain}"
        )
    lines.append("a weight by share is offered" if all(above) else "a weight by share is not offered")
    return "\n".join(f"- {line}" for line in lines)


def table(rows: Sequence[Rows], case: Case) -> str:
    """Markdown: plain CoOp on each tower, and the differences in base accuracy and H at each weight."""
    lines = [
        f"{case}, validation part, {len(FINE)} seeds\n",
        f"| tower | base | new | H | share of weight 1 | {' | '.join(f'weight {w:g}: base, H' for w in WEIGHTS)} |",
        "|---|---|---|---|---|" + "---|" * len(WEIGHTS),
    ]
    for r in rows:
        plain = r.point(PLAIN, case, "val", FINE)
        cells = [f"{summary(values).mean:.1f}" for values in (plain.base, plain.new, plain.h)]
        cells.append(f"{r.of(PLAIN.name, case, 'val')[0]['share']:.2f}")
        points = [r.point(setting, case, "val", FINE) for setting in SETTINGS]
        cells += [f"{difference(point, plain, 'base').mean:+.1f}, {difference(point, plain)}" for point in points]
        lines.append(f"| {r.tower} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(path: Path) -> str:
    """All towers of the file that have every setting."""
    found = {json.loads(line)["tower"] for line in path.read_text(encoding="utf-8").splitlines()}
    names = sorted(found, key=lambda name: (name.split()[0], float(re.findall(r"[\d.]+", name)[0])))  # width 64 before 128
    rows = [r for r in (Rows(path, name) for name in names) if all(r.seeds(s.name, c, "val") for s in SETTINGS for c in CASES)]
    return "\n\n".join([*(table(rows, case) for case in CASES), verdict(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines; what is there is not run again")
    parser.add_argument("--towers", type=Path, default=Path("build/widths"), help="folder of the towers of other widths")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the tables into DIR/study.md; run nothing")
    args = parser.parse_args()
    if args.docs:
        return between(args.docs / "study.md", START, END, page(args.rows))
    for case in CASES:
        for tower in towers(args.towers):
            Shared(Rows(args.rows, tower.name), tower.load(), tower.scale).measure([PLAIN, *SETTINGS], (case,), "val", FINE)


if __name__ == "__main__":
    main()
