"""The chosen setting on other methods and other tests than base to new: cross-dataset, domains.

    python tools/study_methods.py --work build/study --rows benchmarks/results/study-methods.jsonl   # runs what is missing
    python tools/study_methods.py --rows benchmarks/results/study-methods.jsonl --docs docs    # the tables of docs/study.md

`plpp run` of the shipped protocols on the embedded default, 16 shots, each method as its recipe has it, with and without PLPP
as tools/study/rule.py chose it for CoOp: nothing is chosen here. CoOp has 16 vectors and 40 epochs, as in the study; CoOp with
fewer epochs is the control. A row is one run: accuracy on what it learned from (source, base), and on each other test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plpp_reg.results.frontier import Point, difference, gap_at_equal_base
from plpp_reg.results.record import read_result, summary

from study.rows import between

CHOSEN = "TRAINER.PLPP.WEIGHT 0 TRAINER.PLPP.INVERSE_WEIGHT 0.3 TRAINER.PLPP.TOP_K 1000".split()
EPOCHS = (10, 20, 30)
TESTS = {"cross_dataset": "other classes", "domain_generalization": "changed pictures"}
PROMPTS = ["CoOp", "KgCoOp"]  # on those
OTHERS = ["ProGrad", "MaPLe", "PromptSRC", "CoCoOp", "KgCoOp", "CoOp_KDPL"]  # base to new; CoOp's is the study itself
FEW, MANY = range(201, 211), range(201, 221)
START, END = "<!-- other methods -->", "<!-- end of other methods -->"


class Sweep(NamedTuple):
    """One `plpp run`; ``name`` is that of its folder."""

    name: str
    protocol: str
    methods: Sequence[str]
    settings: Sequence[str]
    seeds: Sequence[int]


def with_plpp(methods: Sequence[str]) -> list[str]:
    return [name for method in methods for name in (method, f"{method}_PLPP")]


def sweeps() -> list[Sweep]:
    return [
        *(sweep for protocol in TESTS for sweep in transfers(protocol, FEW)),
        Sweep("chosen", "base_to_new", with_plpp(OTHERS), CHOSEN, FEW),
        *transfers("cross_dataset", MANY),
    ]


def transfers(protocol: str, seeds: Sequence[int]) -> list[Sweep]:
    controls = [Sweep(f"epochs {e}", protocol, ["CoOp"], ["OPTIM.MAX_EPOCH", str(e)], seeds) for e in EPOCHS]
    return [Sweep("chosen", protocol, with_plpp(PROMPTS), ["OPTIM.MAX_EPOCH", "40", *CHOSEN], seeds), *controls]


def folder_of(work: Path, name: str) -> Path:
    return work / name.replace(" ", "")


def run(sweep: Sweep, work: Path) -> None:
    """What is there is not run again."""
    command = [sys.executable, "-m", "plpp_reg", "run", sweep.protocol, "--methods", *sweep.methods]
    command += ["--output", str(folder_of(work, sweep.name))]
    subprocess.run([*command, "--seeds", *map(str, sweep.seeds), "--set", *sweep.settings], check=True)


def collect(work: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a finished run."""
    rows = []
    for name in names:
        for protocol in (*TESTS, "base_to_new"):
            for file in sorted((folder_of(work, name) / protocol).rglob("result.json")):
                found, of = read_result(file.parent), {"sweep": name, "protocol": protocol}
                tests = {test: round(record["metrics"]["accuracy"], 3) for test, record in found["tests"].items()}
                source = round(found["metrics"]["accuracy"], 3)
                zero_shot = {test: _zero_shot(record) for test, record in {"source": found, **found["tests"]}.items()}
                row = {**of, "method": found["trainer"], "seed": found["seed"], "source": source, "tests": tests}
                rows.append({**row, "zero_shot": zero_shot})
    return rows


def _zero_shot(record: dict[str, Any]) -> float:
    """Of the same images, with the hand-written prompt."""
    return round(record["evaluation"]["zero_shot"]["metrics"]["accuracy"], 3)


class Rows(NamedTuple):
    rows: Sequence[dict[str, Any]]

    def seeds(self, sweep: str, protocol: str, *methods: str) -> list[int]:
        """Those that all of them have."""
        keys = [(sweep, protocol, method) for method in methods]
        each = [{r["seed"] for r in self.rows if (r["sweep"], r["protocol"], r["method"]) == key} for key in keys]
        return sorted(set.intersection(*each))

    def zero_shot(self, protocol: str) -> dict[str, float]:
        """The same in every run of a protocol."""
        return dict(next(r["zero_shot"] for r in self.rows if r["protocol"] == protocol))

    def point(self, sweep: str, protocol: str, method: str, seeds: Sequence[int], strength: float = 0) -> Point:
        """Base is the source, new the mean of the other tests."""
        found = {r["seed"]: r for r in self.rows if (r["sweep"], r["protocol"], r["method"]) == (sweep, protocol, method)}
        return Point(
            strength, [found[s]["source"] for s in seeds], [statistics.fmean(found[s]["tests"].values()) for s in seeds]
        )


def transfer(rows: Rows, protocol: str) -> str:
    """Markdown: CoOp, its epochs and PLPP; KgCoOp and PLPP."""
    lines = [f"| {protocol} | seeds | source | {TESTS[protocol]} |", "|---|---|---|---|"]
    each = [rows.seeds(f"epochs {e}", protocol, "CoOp") for e in EPOCHS]
    seeds = sorted(set(rows.seeds("chosen", protocol, "CoOp", "CoOp_PLPP")).intersection(*each))
    plain, treated = (rows.point("chosen", protocol, m, seeds, 40) for m in ("CoOp", "CoOp_PLPP"))
    curve = [rows.point(f"epochs {e}", protocol, "CoOp", seeds, e) for e in EPOCHS]
    named = rows.zero_shot(protocol)
    lines.append(f"| zero-shot | | {named.pop('source'):.1f} | {statistics.fmean(named.values()):.1f} |")
    lines.append(_means("CoOp, 40 epochs", plain))
    lines += [_differences(f"the same with {e} epochs", point, plain) for e, point in zip(EPOCHS, curve, strict=True)]
    lines.append(_differences("CoOp_PLPP", treated, plain))
    gap = gap_at_equal_base(treated, [*curve, plain]) or "not reached"
    lines.append(f"| CoOp_PLPP above the epochs' curve at equal source accuracy | {len(seeds)} | | {gap} |")
    seeds = rows.seeds("chosen", protocol, "KgCoOp", "KgCoOp_PLPP")
    plain, treated = (rows.point("chosen", protocol, m, seeds) for m in ("KgCoOp", "KgCoOp_PLPP"))
    return "\n".join([*lines, _means("KgCoOp", plain), _differences("KgCoOp_PLPP", treated, plain)])


def _means(name: str, point: Point) -> str:
    return f"| {name} | {len(point.base)} | {summary(point.base).mean:.1f} | {summary(point.new).mean:.1f} |"


def _differences(name: str, point: Point, plain: Point) -> str:
    return f"| {name} | {len(point.base)} | {' | '.join(str(difference(point, plain, figure)) for figure in ('base', 'new'))} |"


def base_to_new(rows: Rows) -> str:
    """Markdown: every method, and what PLPP does to it."""
    lines = ["| base to new | seeds | base | new | H | with PLPP: base | new | H |", "|---|---|---|---|---|---|---|---|"]
    found = {method: rows.seeds("chosen", "base_to_new", method, f"{method}_PLPP") for method in OTHERS}
    for method, seeds in found.items():
        if not seeds:
            continue
        plain, treated = (rows.point("chosen", "base_to_new", m, seeds) for m in (method, f"{method}_PLPP"))
        cells = [f"{summary(values).mean:.1f}" for values in (plain.base, plain.new, plain.h)]
        cells += [str(difference(treated, plain, figure)) for figure in ("base", "new", "h")]
        lines.append(f"| {method} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(path: Path) -> str:
    """All tables of a file of rows."""
    rows = Rows([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    return "\n\n".join([*(transfer(rows, protocol) for protocol in TESTS), base_to_new(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, of all finished runs in --work")
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="the runs; what is there is not run again")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the tables into DIR/study.md; run nothing")
    args = parser.parse_args()
    if args.docs:
        return between(args.docs / "study.md", START, END, page(args.rows))
    for sweep in sweeps():
        run(sweep, args.work)
        found = collect(args.work, list(dict.fromkeys(s.name for s in sweeps())))
        args.rows.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in found), encoding="utf-8")


if __name__ == "__main__":
    main()
