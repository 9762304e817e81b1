"""Where PLPP helps, against the right controls, and which defaults follow: one command, which goes on where it was stopped.

    python tools/study_plpp.py --rows benchmarks/results/study.jsonl            # validation, then the confirmation
    python tools/study_plpp.py --rows benchmarks/results/study.jsonl --docs docs    # the tables of docs/study.md, the figure

CoOp on the base half of the embedded default, evaluated on both halves, every setting over the same seeds, which are trained
together (plpp_reg/experiments/parallel_seeds.py). A row is one setting of one case over some seeds: how many images were named
rightly, after each quarter of the training. tools/study/rule.py has the rule, written before the confirmation was run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from study.bench import Bench
from study.figure import draw
from study.rows import Rows, between
from study.rule import confirm, validate
from study.tables import END, START, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines; what is there is not run again")
    parser.add_argument("--stage", choices=("val", "test", "all"), default="all", help="choose, confirm, or both")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write them into DIR/study.md, and the figure; run nothing")
    args = parser.parse_args()
    rows = Rows(args.rows)
    if args.docs:
        between(args.docs / "study.md", START, END, tables(rows))
        draw(rows, args.docs / "images" / "frontier.png")
    if args.tables:
        print(tables(rows))
    if args.docs or args.tables:
        return
    bench = Bench(rows)
    if args.stage in ("val", "all"):
        validate(bench)
    if args.stage in ("test", "all"):
        confirm(bench)


if __name__ == "__main__":
    main()
