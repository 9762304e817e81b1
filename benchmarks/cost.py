"""What a training step costs, by method, classes and batch, beside what `plpp estimate` says it will cost.

    python benchmarks/cost.py --json cost.json               # ViT-B/16's sizes, fp32, random weights
    python benchmarks/cost.py --quick --json cost.json       # small towers: shows that it runs, not what it costs
    python benchmarks/cost.py --json cost.json --markdown    # the table of what is recorded there; nothing is run

A step is forward, backward and the optimizer's update, as in a run: features of the frozen image tower are given where the
method reads them, and so are PromptSRC's of its 60 templates, which it makes once a run. Seconds are medians after a first
step; the estimate is made just before, by the same clock. Peak memory is that of a first step in a fresh process over what was
resident before it, freed memory given back, and as the allocator holds it; the estimate's without the model.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plpp_reg.clip.architectures import without_weights
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.trainer import Trainer
from plpp_reg.estimate.estimate import estimate

import common
from common import arguments, seconds, write_rows
from memory import peak_mib
from methods import FULL, QUICK, Size, class_names, give_image_features, make_batch, make_trainer, run_arguments

GRID = {  # method: (classes, batch) …; with CoOp the batch hardly counts, for the image features are given
    "CoOp": [(10, 32), (100, 1), (100, 32), (1000, 32)],
    "CoCoOp": [(10, 1), (10, 32), (100, 1), (100, 4), (1000, 1)],
    "MaPLe": [(10, 4), (10, 32), (100, 1), (100, 4), (1000, 4)],
    "PromptSRC": [(10, 4), (100, 4), (1000, 4)],
}
LONG = 5.0  # seconds; what takes longer is timed twice, whatever is asked for
CASES = {
    f"{name}-{classes}-{images}": (name, classes, images)
    for method, sizes in GRID.items()
    for name in (method, f"{method}_PLPP")
    for classes, images in sizes
}


def batch_size(images: int) -> tuple[str, str]:
    return "DATALOADER.TRAIN_X.BATCH_SIZE", str(images)


def prepare(name: str, size: Size, images: int) -> Callable[[], dict[str, float]]:
    """Steps on one batch after another."""
    trainer = make_trainer(name, size, batch_size(images))
    trainer.optimizer.param_groups[0]["lr"] = trainer.cfg.OPTIM.LR  # not the warm-up epoch's
    if name.startswith("PromptSRC"):
        trainer.method.frozen_class_features = normalize(torch.randn(size.classes, size.model.embed_dim))
    batches = iter([give(trainer, size, images, seed) for seed in range(size.repeats + 1)])
    return lambda: trainer.step(next(batches))


def give(trainer: Trainer, size: Size, images: int, seed: int) -> dict[str, torch.Tensor]:
    batch = make_batch(size, images, seed)
    if trainer.method.inputs.of("train"):
        give_image_features(trainer, size, batch, seed)
    return batch


def measure(name: str, classes: int, images: int, size: Size) -> dict[str, Any]:
    size = size._replace(classes=classes)
    args, clip_model = run_arguments(name, size, batch_size(images)), without_weights(size.model)
    said = estimate(args, data=class_names(size), clip_model=clip_model, clock=common.CLOCK)
    step = prepare(name, size, images)
    step()
    times = [seconds(step)]
    times += [seconds(step) for _ in range(size.repeats - 1 if times[0] < LONG else min(1, size.repeats - 1))]
    del step
    took, peak = statistics.median(times), peak_mib(prepare, name, size, images, freed_returned=True)
    return {
        "method": name,
        "classes": classes,
        "batch": images,
        "seconds": took,
        "predicted_seconds": said.step.seconds,
        "seconds_ratio": said.step.seconds / took,
        "predicted_parts": {part: getattr(said, part).seconds for part in ("text", "image", "plpp")},
        "peak_mib": peak,
        "predicted_mib": said.step.mib,
        "mib_ratio": said.step.mib / peak if peak else None,
        "held_mib": peak_mib(prepare, name, size, images),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | classes | batch | a step | predicted | ratio | text, image, PLPP | peak, MiB | predicted | ratio | held |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        took, said, of = row["seconds"], row["predicted_seconds"], row["predicted_parts"]
        shares = ", ".join(f"{100 * of[part] / said:.0f}%" for part in ("text", "image", "plpp"))
        memory = "| | |"  # not Linux
        if row["peak_mib"]:
            held = row["held_mib"]
            memory = f"{row['peak_mib']:.0f} | {row['predicted_mib']:.0f} | {row['mib_ratio']:.2f} | {held:.0f}"
        lines.append(
            f"| {row['method']} | {row['classes']} | {row['batch']} | {took:.3g} s | {said:.3g} s | "
            f"{row['seconds_ratio']:.2f} | {shares} | {memory} |"
        )
    for what, key in (("seconds", "seconds_ratio"), ("peak memory", "mib_ratio")):
        ratios = [row[key] for row in rows if row[key]]
        if ratios:
            worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
            lines += ["", f"Predicted over measured, {what}: median {statistics.median(ratios):.2f}, worst {worst:.2f}."]
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, CASES, markdown="print the table of what FILE holds; run nothing")
    if args.markdown:
        print(markdown(json.loads(Path(args.json).read_text())["rows"]))
        return
    size = (QUICK if args.quick else FULL)._replace(repeats=args.repeats or (2 if args.quick else 3))
    rows = []
    for case in args.cases:
        rows.append(row := measure(*CASES[case], size))
        memory = f"{row['peak_mib']:6.0f} MiB {row['mib_ratio']:5.2f}" if row["peak_mib"] else ""
        print(f"{case:24s}{row['seconds']:8.3f} s, predicted over it {row['seconds_ratio']:5.2f}; {memory}", flush=True)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
