"""Give every command malformed files and arguments, and see that each is one line, and that nothing is written or run.

    python tools/campaign/malformed.py [--inputs 1800] [--seed 0] [--kinds pictures splits …] [--json FILE]

Commands run in this process, in a small world of their own (world.py). Right is exit status 2 with one line, and nothing
written, deleted, started or fetched; or an honest success, which writes below its output alone. A sweep and a check may also
end with status 1, and name what failed. Wrong is anything else: a traceback, a warning, a second line, two minutes without an
end. Exit status 0: nothing is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from inputs import KINDS
from trial import Trial, Watch, bounded_memory, elsewhere


def campaign(trial: Trial, inputs: int, seed: int, kinds: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run that many inputs; figures by kind, and what is wrong."""
    figures: dict[str, Counter[str]] = {}
    wrong: list[dict[str, Any]] = []
    whole = sum(share for kind, (_, share) in KINDS.items() if kind in kinds)
    for kind, (make, share) in KINDS.items():
        if kind not in kinds:
            continue
        figures[kind] = Counter()
        for number in range(-(-inputs * share // whole)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case = make(random.Random(f"{seed} {kind} {number}"), trial.root)
            outcome = trial.run(case)
            state = {0: "successes", 1: "failures named", 2: "refused"}.get(outcome.status, "other")
            figures[kind][state] += 1
            if outcome.wrong:
                figures[kind]["wrong"] += 1
                argv = [word if len(word) < 80 else f"{word[:70]}…" for word in case.argv]
                wrong.append(
                    {"kind": kind, "number": number, "argv": argv, "wrong": outcome.wrong, "error": outcome.error[-600:]}
                )
                say(f"WRONG {kind} {number}: {'; '.join(outcome.wrong)}\n  {' '.join(argv)!r}\n  {outcome.error[-300:]!r}")
    return {"figures": figures, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, elsewhere(Path(folder)), bounded_memory():
        trial = Trial(Path(folder), Watch())
        found = campaign(trial, args.inputs, args.seed, args.kinds, lambda line: print(line, flush=True))
    print(f"{'':26s}{'inputs':>8s}{'refused':>9s}{'successes':>11s}{'failures named':>16s}{'wrong':>7s}")
    rows = {**found["figures"], "together": sum(found["figures"].values(), Counter())}
    for kind, counted in rows.items():
        inputs = sum(n for state, n in counted.items() if state != "wrong")
        cells = [counted[state] for state in ("refused", "successes", "failures named", "wrong")]
        print(f"{kind:26s}{inputs:8d}{cells[0]:9d}{cells[1]:11d}{cells[2]:16d}{cells[3]:7d}")
    print(f"{time.perf_counter() - start:.0f} s, seed {args.seed}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
