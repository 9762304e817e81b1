"""What the kept image features and the classes that are encoded once save, each beside doing without, in one run.

    python benchmarks/features.py --json features.json            # ViT-B/16's sizes where they matter
    python benchmarks/features.py --quick --json features.json    # small: shows that it runs

``ablation-embedded``: ten CoOp_PLPP runs on the embedded default that differ in PLPP's weight; ``ablation-vit-b-16``: the same
on random images of 100 classes with a random ViT-B/16 (two images a class, two epochs). First with FEATURES.MAX_GIB 0, then
with an empty store, then with the full one; the trained prompts must be the same bits.
``evaluation``: a test over 1,000 images of 100 classes whose features are in the store, the classes encoded once, beside
encoding them every batch of 100 by all 77 positions, as upstream does, and by the tower of this package.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from plpp_reg.clip.load import load_clip
from plpp_reg.data import DataSplit, Datum
from plpp_reg.data.loaders import load_data
from plpp_reg.engine import features
from plpp_reg.engine.evaluation import Classification
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import Trainer

from common import SMALL, VIT_B_16, LiteralText, random_clip, seconds, write_rows
from names import short_names

WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def ablation(case: str, make: Callable[[float, float], Trainer], points: int) -> dict[str, Any]:
    """Seconds of all points: without the store, filling it, with it full."""
    times: dict[str, float] = {}
    prompts: dict[str, list[torch.Tensor]] = {}
    for name, max_gib in (("off", 0.0), ("cold", 10.0), ("warm", 10.0)):
        start = time.perf_counter()
        prompts[name] = []
        for weight in WEIGHTS[:points]:
            trainer = make(weight, max_gib)
            trainer.train()
            trainer.test()
            prompts[name].append(trainer.method.prompt_learner.ctx.detach().clone())
        times[name] = time.perf_counter() - start
    same = all(torch.equal(a, b) for name in ("cold", "warm") for a, b in zip(prompts["off"], prompts[name], strict=True))
    return {
        "case": f"ablation-{case}",
        "points": points,
        "reference_seconds": times["off"],
        "cold_seconds": times["cold"],
        "seconds": times["warm"],
        "speedup": times["off"] / times["warm"],
        "cold_speedup": times["off"] / times["cold"],
        "same_bits": same,
    }


def embedded(quick: bool) -> dict[str, Any]:
    model, data = load_clip(), load_data(resolve(RunArguments(trainer="CoOp_PLPP"))[0])  # drawn here, outside of what is timed

    def make(weight: float, max_gib: float) -> Trainer:
        opts = ["TRAINER.PLPP.WEIGHT", str(weight), "FEATURES.MAX_GIB", str(max_gib)]
        opts += ["OPTIM.MAX_EPOCH", "1"] if quick else []
        cfg, cls = resolve(RunArguments(trainer="CoOp_PLPP", opts=tuple(opts)))
        return Trainer(cls, cfg, data=data, clip_model=model, log=RunLog(quiet=True))

    return ablation("embedded", make, 2 if quick else 10)


def random_images(folder: Path, classes: int, images: int, side: int) -> DataSplit:
    rng = np.random.default_rng(0)
    names, parts = short_names(classes), {}
    for part in ("train", "test"):
        parts[part] = []
        for label in range(classes):
            for k in range(images):
                path = folder / part / f"{label}-{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
                parts[part].append(Datum(str(path), label, names[label], f"{part}/{path.name}"))
    return DataSplit(parts["train"], [], parts["test"], names)


def vit_b_16(quick: bool) -> dict[str, Any]:
    sizes = SMALL if quick else VIT_B_16
    model = random_clip(sizes)
    with tempfile.TemporaryDirectory() as folder:
        data = random_images(Path(folder), 10 if quick else 100, 1 if quick else 2, sizes.resolution)

        def make(weight: float, max_gib: float) -> Trainer:
            side = sizes.resolution
            opts = ("TRAINER.PLPP.WEIGHT", str(weight), "FEATURES.MAX_GIB", str(max_gib), "OPTIM.MAX_EPOCH", "2")
            opts += ("INPUT.SIZE", f"({side},{side})", "DATALOADER.NUM_WORKERS", "0", "DATASET.NAME", "random")
            cfg, cls = resolve(RunArguments(trainer="CoOp_PLPP", backbone="ViT-B/16", opts=opts))
            return Trainer(cls, cfg, data=data, clip_model=model, log=RunLog(quiet=True))

        return ablation("vit-b-16", make, 2 if quick else 10)


def agree(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    """Whether two tests give the same figures; confidence, a mean of probabilities, moves with the features' last bits."""
    close = math.isclose(ours["calibration_error"], theirs["calibration_error"], rel_tol=1e-3, abs_tol=1e-3)
    return close and all(theirs[key] == value for key, value in ours.items() if key != "calibration_error")


@torch.no_grad()
def evaluation(quick: bool) -> dict[str, Any]:
    sizes = SMALL if quick else VIT_B_16
    classes, images, batch = (10, 100, 50) if quick else (100, 1000, 100)
    side = sizes.resolution
    opts = ("INPUT.SIZE", f"({side},{side})", "DATASET.NAME", "random", "DATALOADER.NUM_WORKERS", "0")
    opts += ("DATALOADER.TEST.BATCH_SIZE", str(batch))
    cfg, cls = resolve(RunArguments(trainer="CoOp", backbone="ViT-B/16", opts=opts))
    with tempfile.TemporaryDirectory() as folder:
        data = random_images(Path(folder), classes, images // classes, 8)  # whose pixels nobody reads: their features are known
        trainer = Trainer(cls, cfg, data=data, clip_model=random_clip(sizes), log=RunLog(quiet=True))
        known = F.normalize(torch.randn(images, sizes.embed_dim, generator=torch.Generator().manual_seed(0)), dim=1)
        label = torch.tensor([datum.label for datum in data.test])
        method = trainer.method
        frozen = trainer.frozen_features["features"]
        frozen.store.keep(frozen._described("test", 0), {"features": known})
        literal = LiteralText(trainer.clip_model, method.prompt_learner)

        def once() -> dict[str, float]:
            del trainer.frozen_features  # made anew, it has read nothing of the store yet
            return trainer.test()

        def every_batch(class_features: Callable[[], torch.Tensor]) -> dict[str, float]:
            evaluator = Classification(classes)
            for f, y in zip(known.split(batch), label.split(batch), strict=True):
                evaluator.process(method.cosines(f, class_features()), y)
            return evaluator.evaluate()

        def upstream() -> dict[str, float]:
            return every_batch(lambda: normalize(literal(method.prompt_learner.ctx)))

        def by_the_fast_tower() -> dict[str, float]:
            return every_batch(lambda: method.encode_classes().features)

        ways = (once, upstream, by_the_fast_tower)
        same = agree(once(), upstream()) and agree(once(), by_the_fast_tower())
        rounds = [[seconds(way) for way in ways] for _ in range(3)]
    ours, theirs, fast_every_batch = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "case": "evaluation",
        "images": images,
        "classes": classes,
        "seconds": ours,
        "reference_seconds": theirs,
        "speedup": theirs / ours,
        "fast_tower_every_batch_seconds": fast_every_batch,
        "same_figures": same,
    }


CASES = {"ablation-embedded": embedded, "ablation-vit-b-16": vit_b_16, "evaluation": evaluation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, few points")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the rows go")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in args.cases:
        with tempfile.TemporaryDirectory() as cache:
            features.cache_folder = lambda cache=cache: Path(cache)  # an empty store; the data set's pictures stay
            rows.append(CASES[case](args.quick))
        print(json.dumps(rows[-1]), flush=True)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
