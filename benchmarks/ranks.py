"""A step over several processes beside the same step in one: images split by rank, the classes' text by rank and gathered.

    python benchmarks/ranks.py --threads 1 --json ranks.json      # ViT-B/16's sizes, 1000 classes, fp32, random weights; gloo
    python benchmarks/ranks.py --quick --json ranks.json          # small towers: shows that it runs

Every process has ``--threads`` threads, so that two processes have twice the cores of one: what is measured is what is left
of that. The steps are of one batch, whose images the ranks share; losses that are not one process's within 1e-5 end it. Seconds
are the wall's: waiting for the others costs no CPU time, so ``--cpu-time`` is refused.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import arguments, seconds, write_rows
from methods import FULL, QUICK, Size, give_image_features, make_batch, make_trainer

CASES = {"coop": ("CoOp", 32), "coop-plpp": ("CoOp_PLPP", 32), "maple": ("MaPLe", 4)}
PROCESSES = 2
SAME = 1e-5  # of losses, relative


def steps(rank: int, processes: int, case: str, size: Size, threads: int, folder: str) -> None:
    """In a process of its own: steps of this rank's share; the first one writes seconds a step and the losses."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    name, images = CASES[case]
    trainer, batch = make_trainer(name, size), make_batch(size, images)
    if trainer.method.inputs.of("train"):
        give_image_features(trainer, size, batch)
    share = {key: values[rank::processes] for key, values in batch.items()}
    trainer.optimizer.param_groups[0]["lr"] = trainer.cfg.OPTIM.LR  # not the warm-up epoch's
    losses = [trainer.step(share)]
    times = []
    for _ in range(size.repeats):
        dist.barrier()
        times.append(seconds(lambda: losses.append(trainer.step(share))))
    if rank == 0:
        Path(folder, "measured.json").write_text(json.dumps({"times": times, "losses": losses}))
    dist.destroy_process_group()


def with_processes(processes: int, *args: Any) -> tuple[float, list[dict[str, float]]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(steps, (processes, *args, folder), nprocs=processes)
        measured = json.loads(Path(folder, "measured.json").read_text())
    return statistics.median(measured["times"]), measured["losses"]


def measure(case: str, size: Size, threads: int) -> dict[str, Any]:
    (one, losses_of_one), (several, losses) = (with_processes(n, case, size, threads) for n in (1, PROCESSES))
    differ = max(
        abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(losses, losses_of_one, strict=True) for name in b if b[name]
    )
    return {
        "case": case,
        "classes": size.classes,
        "processes": PROCESSES,
        "seconds": several,
        "reference_seconds": one,
        "speedup": one / several,
        "loss_rel_diff": differ,
    }


def main() -> None:
    args = arguments(__doc__, CASES)
    if args.cpu_time:
        raise SystemExit("--cpu-time: expected wall time, got it: waiting for another process costs no CPU time")
    size = QUICK if args.quick else FULL._replace(classes=1000, repeats=3)
    size = size._replace(repeats=args.repeats or size.repeats)
    rows = []
    for case in args.cases:
        rows.append(row := measure(case, size, args.threads))
        print(
            f"{case:12s}{row['classes']:5d} classes  {row['reference_seconds']:7.3f} s -> {row['seconds']:7.3f} s  "
            f"{row['speedup']:.2f}x with {PROCESSES} processes, losses differ by {row['loss_rel_diff']:.0e}",
            flush=True,
        )
        if not row["loss_rel_diff"] <= SAME:
            raise SystemExit(f"{case}: expected the losses of one process within {SAME}, got {row['loss_rel_diff']:.0e}")
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
