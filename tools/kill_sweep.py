"""Kill a sweep at random moments, start it again each time, and compare its tables with an undisturbed sweep's.

    python tools/kill_sweep.py [--kills 20] [--protocol base_to_new] [--seed 0] [-- MORE ARGUMENTS OF plpp run]

A kill is SIGKILL: nothing is tidied up. One moment in five is drawn over the start-up, the others over twice the share that a
kill has of the sweep's time after it: they fall into training, writing and testing, and the sweep moves on between them.
Exit status 0: Markdown, CSV and LaTeX are equal to the byte.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plpp_reg.results import tables

PLPP = [sys.executable, "-c", "import sys; from plpp_reg.commands.cli import main; sys.exit(main())"]


def command(protocol: str, output: Path, more: list[str]) -> list[str]:
    return [*PLPP, "run", protocol, "--output", str(output), *more]


def state(output: Path) -> str:
    """Where a killed sweep stood: finished runs, and runs with a checkpoint."""
    finished = len(list(output.rglob("result.json")))
    begun = len(list(output.rglob("prompt_learner/checkpoint")))
    return f"{finished} finished, {begun} with a checkpoint"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--protocol", default="base_to_new")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=None, help="folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=None, help="write what was done here")
    parser.add_argument("more", nargs="*", help="arguments of plpp run, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.output or Path(temporary)
        undisturbed, disturbed = place / "undisturbed", place / "disturbed"
        start = time.perf_counter()
        subprocess.run(command(args.protocol, undisturbed, args.more), check=True)
        whole = time.perf_counter() - start
        start = time.perf_counter()
        subprocess.run(command(args.protocol, undisturbed, args.more), check=True)  # all skipped
        start_up = time.perf_counter() - start
        share = max(0.0, whole - start_up) / args.kills
        runs = len(list(undisturbed.rglob("result.json")))
        rng, moments = random.Random(args.seed), []
        while True:
            process = subprocess.Popen(command(args.protocol, disturbed, args.more), stdout=subprocess.DEVNULL)
            begun = time.perf_counter()
            moment = rng.uniform(0, start_up) if rng.random() < 0.2 else start_up + rng.uniform(0, 2 * share)
            try:
                process.wait(timeout=moment if len(moments) < args.kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                moments.append(round(time.perf_counter() - begun, 2))
                print(f"kill {len(moments)} after {moments[-1]:.1f} s: {state(disturbed)}", flush=True)
                continue
            break
        if process.returncode:
            print(f"the sweep ended with status {process.returncode}")
            return 1
        equal = {}
        for form in tables.WRITERS:
            texts = []
            for output in (undisturbed, disturbed):
                texts.append(tables.tables_text(output, form))
            equal[form] = texts[0] == texts[1]
        words = [f"{form} {'equal' if same else 'DIFFERENT'}" for form, same in equal.items()]
        print(f"{runs} runs, {len(moments)} kills: {', '.join(words)}")
        if args.json:
            args.json.write_text(json.dumps({"runs": runs, "kills": moments, "equal": equal}, indent=1) + "\n")
        return 0 if all(equal.values()) and len(moments) == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
