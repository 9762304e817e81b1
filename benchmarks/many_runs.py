"""How long tables of many recorded runs take: 11 data sets, 2 methods, base to new, as many seeds as it needs.

    python benchmarks/many_runs.py [--runs 10000]

The records are whole ones: a run's real result.json with other figures in it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from plpp_reg.engine import config
from plpp_reg.engine.run import resolve
from plpp_reg.experiments.jobs import Choice, plan
from plpp_reg.experiments.protocols import load_protocol
from plpp_reg.results import tables
from plpp_reg.results.record import versions

DATASETS = load_protocol("base_to_new", embedded=False).datasets


def write_records(place: Path, runs: int) -> int:
    """Records of ``runs`` runs below ``place``, or as few more as make every data set and method equal."""
    seeds = list(range(1, -(-runs // (2 * len(DATASETS))) + 1))
    choice = Choice(methods=["CoOp", "CoOp_PLPP"], datasets=DATASETS, seeds=seeds, root="data", recipe="few_shot_16")
    jobs = plan("base_to_new", choice, place)
    flat, software, rng = config.flat(resolve(jobs[0].arguments)[0]), versions(), random.Random(1)
    for job in jobs:
        accuracies = [rng.gauss(70, 3) for _ in range(2)]
        metrics = [{"accuracy": a, "error": 100 - a, "macro_f1": a - 1} for a in accuracies]
        result = {
            "trainer": job.note["method"],
            "dataset": job.note["dataset"],
            "metrics": metrics[0],
            "config": flat,
            "versions": software,
            "files_sha256": "0" * 64,
            "tests": {"new": {"dataset": job.note["dataset"], "metrics": metrics[1], "files_sha256": "0" * 64}},
            "protocol": job.note,
        }
        for folder in (job.folder / "prompt_learner", job.folder / "tensorboard"):
            folder.mkdir(parents=True)
        (job.folder / "job.json").write_text(json.dumps(job.note, indent=1))
        (job.folder / "result.json").write_text(json.dumps(result, indent=2))
    return len(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        runs = write_records(Path(place), args.runs)
        for form in tables.WRITERS:
            start = time.perf_counter()
            tables.tables_text(place, form)
            print(f"{runs:,} runs, {form}: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
