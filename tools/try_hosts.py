"""Run foreign Dassl checkouts, unedited, with and without PLPP, on random weights and a small image folder (docs/hosts.md).

    python tools/try_hosts.py --hosts FOLDER --work FOLDER [--only CoOp MaPLe …]

FOLDER of --hosts holds the checkouts by their repositories' names: Dassl.pytorch, CoOp, multimodal-prompt-learning, PromptSRC, KgCoOp.
Nothing is written there. In --work: weights, images in Caltech101's layout, the runs, and ``report.json``.

Each run is ``python -m plpp_reg.dassl train.py …`` in the checkout, behind a few lines (``--inside``) that do what a user's machine
has and this one has not: they name the checksum of the random weights as that of ViT-B/16, and, only where a host asks for a GPU
by ``.cuda()``, make that a no-operation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

CLASSES = ["accordion", "cougar_body", "face", "grand_piano", "leopard", "wild_cat"]
WEIGHTS = "ViT-B-16.pt"


class Case(NamedTuple):
    """One trainer of one checkout."""

    checkout: str
    config: str
    model: str  # the folder of its checkpoints
    precision: str
    opts: tuple[str, ...] = ()
    no_cuda: bool = False  # .cuda() is written into it
    dassl: str = "Dassl.pytorch"
    metric_key: str = "prompt_learner.ctx"


MULTIMODAL = "multimodal-prompt-learning"
CASES = {
    "CoOp": Case("CoOp", "CoOp/vit_b16_ep50", "prompt_learner", "TRAINER.COOP.PREC"),
    "CoCoOp": Case("CoOp", "CoCoOp/vit_b16_c4_ep10_batch1", "prompt_learner", "TRAINER.COCOOP.PREC", ("2",)),
    "MaPLe": Case(MULTIMODAL, "MaPLe/vit_b16_c2_ep5_batch4_2ctx", "MultiModalPromptLearner", "TRAINER.MAPLE.PREC"),
    "IVLP": Case(MULTIMODAL, "IVLP/vit_b16_c2_ep5_batch4_2+2ctx", "VLPromptLearner", "TRAINER.IVLP.PREC"),
    "PromptSRC": Case("PromptSRC", "PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx", "VLPromptLearner", "TRAINER.PROMPTSRC.PREC"),
    "KgCoOp": Case("KgCoOp/KgCoOp", "KgCoOp/vit_b16_ep100_ctxv1", "prompt_learner", "TRAINER.COOP.PREC"),
    "ProGrad": Case("KgCoOp/KgCoOp", "ProGrad/vit_b16_ep100_ctx", "prompt_learner", "TRAINER.COOP.PREC"),
}


def make_weights(path: Path) -> None:
    """A random CLIP with ViT-B/16's widths (hosts have 512 and 768 written in) and three layers, as a state_dict in float16."""
    import torch

    from plpp_reg.clip.load import openai_clip

    torch.manual_seed(0)
    model = openai_clip().model.CLIP(512, 32, 3, 768, 16, 77, 49408, 512, 8, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: t.half() for name, t in model.state_dict().items()}, path)


def make_images(root: Path) -> None:
    """caltech-101/101_ObjectCategories/<class>/image_<n>.jpg, and the split file."""
    from PIL import Image

    rng = random.Random(0)
    folder = root / "caltech-101"
    split: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(CLASSES):
        colour = [rng.randrange(40, 215) for _ in range(3)]
        (folder / "101_ObjectCategories" / name).mkdir(parents=True, exist_ok=True)
        for n in range(8):
            noise = bytes(min(255, max(0, int(c + rng.gauss(0, 40)))) for _ in range(40 * 36) for c in colour)
            file = f"{name}/image_{n:04d}.jpg"
            Image.frombytes("RGB", (40, 36), noise).save(folder / "101_ObjectCategories" / file)
            split["train" if n < 4 else "val" if n < 5 else "test"].append([file, label, name])
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(split))


def inside(weights: str, no_cuda: bool, arguments: list[str]) -> int:
    """In the checkout: the launcher, with the random weights' checksum as the expected one."""
    sys.path.insert(0, os.getcwd())
    import torch
    from clip import clip

    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    clip._MODELS["ViT-B/16"] = f"random/{digest}/{WEIGHTS}"
    if no_cuda:
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    from plpp_reg.dassl.__main__ import main

    return main(arguments)


class Bench:
    """Where things are, and how a host is run."""

    def __init__(self, hosts: Path, work: Path) -> None:
        self.hosts, self.work = hosts.resolve(), work.resolve()
        self.weights = self.work / "home" / ".cache" / "clip" / WEIGHTS
        if not self.weights.is_file():
            make_weights(self.weights)
            make_images(self.work / "data")

    def run(self, name: str, trainer: str, folder: str, *arguments: str, opts: tuple[str, ...] = (), **changed: Any) -> dict:
        case = CASES[name]._replace(**changed)
        checkout, out = self.hosts / case.checkout, self.work / "runs" / name / folder
        config = next((checkout / "configs" / "trainers").glob(f"{case.config}*.yaml"))
        command = ["train.py", "--root", str(self.work / "data"), "--seed", "1", "--trainer", trainer, *arguments]
        command += ["--dataset-config-file", "configs/datasets/caltech101.yaml"]
        command += ["--config-file", str(config.relative_to(checkout)), "--output-dir", str(out)]
        batch = case.opts[0] if case.opts else "4"
        opts = ("DATASET.NUM_SHOTS", "4", "OPTIM.MAX_EPOCH", "3", "TRAIN.CHECKPOINT_FREQ", "1", "DATALOADER.NUM_WORKERS", "0") + opts
        opts = ("INPUT.SIZE", "(32, 32)", "DATALOADER.TRAIN_X.BATCH_SIZE", batch, "TRAIN.PRINT_FREQ", "1", *opts)
        command += [*opts, case.precision, changed.get("prec", "fp32")] if "prec" not in changed else [*opts]
        dassl = [checkout, self.hosts / case.dassl]
        env = {**os.environ, "HOME": str(self.work / "home"), "PYTHONPATH": os.pathsep.join(map(str, dassl))}
        flags = ["--no-cuda"] if case.no_cuda else []
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--inside", str(self.weights), *flags, "--", *command],
            cwd=checkout, env=env, capture_output=True, text=True,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        (out / "terminal.txt").write_text(done.stdout + done.stderr)
        return {
            "command": " ".join(command),
            "status": done.returncode,
            "seconds": round(time.perf_counter() - start, 1),
            "error": done.stderr.strip().splitlines()[-1:] if done.returncode else [],
            "mended": re.findall(r"^plpp: mended.*", done.stdout, re.M),
            "accuracy": re.findall(r"accuracy: ([\d.]+)%", done.stdout),
            "lr": re.findall(r" lr (\S+)", done.stdout),
            "terms": re.findall(r"loss_ppl (\S+) \S+ loss_inverse_ppl (\S+) \S+ perplexity (\S+)", done.stdout),
            "folder": str(out),
        }


if __name__ == "__main__":
    if "--inside" in sys.argv:
        cut = sys.argv.index("--")
        sys.exit(inside(sys.argv[2], "--no-cuda" in sys.argv[:cut], sys.argv[cut + 1 :]))
