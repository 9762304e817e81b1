"""Where the time of ``plpp train`` from an empty cache goes: imports, pictures, image features, steps, and the rest.

    python benchmarks/cold_start.py --json cold.json            # the embedded default, as plpp train --trainer CoOp_PLPP
    python benchmarks/cold_start.py --quick --json cold.json    # two epochs of an image a class: shows that it runs

Seconds by the wall and of all CPUs. What is imported late, in another phase, counts as imports. Each round is a fresh
process with an empty cache; ``--warm`` adds one that finds the pictures and features of the last.
"""

from __future__ import annotations

import argparse
import builtins
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUICK = ["OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "1"]
PHASES = ("imports", "pictures", "features", "steps", "test", "rest")


class Phases:
    """Seconds of the wall and of the CPUs by phase; what a phase calls that is another phase is not counted twice."""

    def __init__(self, started: float) -> None:
        self.seconds = {phase: [0.0, 0.0] for phase in PHASES}
        self.current, self.since = "imports", (started, 0.0)  # the interpreter's own start too

    def switch(self, phase: str) -> str:
        """From here on it is ``phase``; what it was."""
        times = os.times()
        now = (time.time(), times.user + times.system + times.children_user + times.children_system)
        for k in range(2):
            self.seconds[self.current][k] += now[k] - self.since[k]
        before, self.current, self.since = self.current, phase, now
        return before

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        before = self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def note(self, owner: Any, name: str, phase: str) -> None:
        """``owner.name`` is ``phase`` from here on."""
        function: Callable[..., Any] = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self.current == phase or threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            with self.of(phase):
                return function(*args, **kwargs)

        setattr(owner, name, noted)


def run(started: float, argv: list[str]) -> dict[str, dict[str, float]]:
    """``plpp train`` in this process, whose start was at ``started``, as it is from the command line."""
    phases = Phases(started)
    from plpp_reg.commands import cli
    from plpp_reg.data import emoji
    from plpp_reg.engine import run as _  # noqa: F401  (what the command imports before it does anything)
    from plpp_reg.engine.features import FrozenFeatures
    from plpp_reg.engine.trainer import Trainer

    phases.switch("rest")
    phases.note(builtins, "__import__", "imports")
    phases.note(emoji, "rasterise", "pictures")
    phases.note(FrozenFeatures, "of", "features")
    phases.note(Trainer, "train", "steps")
    phases.note(Trainer, "classify", "test")
    status = cli.main(["train", *argv])
    phases.switch("rest")
    if status:
        sys.exit(status)
    return {phase: {"seconds": wall, "cpu_seconds": cpu} for phase, (wall, cpu) in phases.seconds.items()}


def fresh(cache: Path, opts: list[str]) -> dict[str, dict[str, float]]:
    """The same in a process of its own; the last line that it prints is what it found."""
    with tempfile.TemporaryDirectory() as output:
        argv = ["--trainer", "CoOp_PLPP", "--output-dir", str(Path(output) / "run"), *opts]
        command = [sys.executable, __file__, "--started", repr(time.time()), *argv]
        done = subprocess.run(command, env={**os.environ, "PLPP_REG_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two epochs of an image a class")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the rows go")
    parser.add_argument("--rounds", type=int, default=1, help="how often, each from an empty cache")
    parser.add_argument("--warm", action="store_true", help="each round once more with what the first run left")
    args = parser.parse_args()
    rows = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for case in ("cold", "warm")[: 1 + args.warm]:
                phases = fresh(Path(cache), QUICK if args.quick else [])
                total = {key: sum(phase[key] for phase in phases.values()) for key in ("seconds", "cpu_seconds")}
                rows.append({"case": case, **total, "phases": phases})
                print(f"{case}: {total['seconds']:.1f} s, {total['cpu_seconds']:.1f} s of CPU")
                for phase, took in phases.items():
                    print(f"  {phase:8} {took['seconds']:6.1f} s {took['cpu_seconds']:6.1f} s of CPU", flush=True)

    from common import write_rows  # loads torch: not before the processes that are measured

    write_rows(args.json, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--started"]:
        print(json.dumps(run(float(sys.argv[2]), sys.argv[3:])))
    else:
        main()
