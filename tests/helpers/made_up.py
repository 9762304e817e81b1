"""A folder of made-up runs for the report's tests: the figures are drawn from a formula, nothing was trained."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from helpers.records import record

SHORT = (
    "imagenet",
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "oxford_flowers",
    "food101",
    "fgvc_aircraft",
    "sun397",
    "dtd",
)
SHORT += ("eurosat", "ucf101")
PLAIN = ("CoOp", "CoCoOp", "KgCoOp", "ProGrad", "MaPLe", "PromptSRC")
METHODS = tuple(name for plain in PLAIN for name in (plain, f"{plain}_PLPP"))


def made_up_sweep(
    place: Path,
    datasets: Sequence[str] = SHORT,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (1, 2, 3),
    epochs: int = 10,
    shots: Sequence[int] = (),
    backbone: str = "ViT-B/16",
) -> None:
    """base_to_new runs (few_shot where ``shots`` are given) with configurations, versions, losses and histories."""
    draw = random.Random(0)
    for d, dataset in enumerate(datasets):
        for m, method in enumerate(methods):
            for seed in seeds:
                for number in shots or (16,):
                    base, new = 60 + 3 * d + m / 2 + draw.gauss(0, 1), 50 + 2 * d + m + draw.gauss(0, 2)
                    figures = {"accuracy": base + number} if shots else {"base": base, "new": new}
                    name = "few_shot" if shots else "base_to_new"
                    folder = record(place, method, seed, figures, dataset, protocol=name, shots=number, backbone=backbone)
                    complete(folder, draw, epochs, plpp=method.endswith("_PLPP"))


def complete(folder: Path, draw: random.Random, epochs: int, plpp: bool) -> None:
    """What a run of the engine leaves beside its accuracies."""
    result = json.loads((folder / "result.json").read_text())
    seed = result["protocol"]["seed"]
    history = []
    for epoch in range(epochs):
        means = {"ce": 2 * 0.8**epoch + 0.2 * draw.random(), "acc": 50.0, "lr": 0.002}
        if plpp:
            means |= {"ppl": 0.3 * 0.9**epoch, "perplexity": 1e5 * 0.4**epoch + draw.random()}
        history.append({"loss": means["ce"] + means.get("ppl", 0.0), **means})
    config = {"SEED": seed, "OPTIM.LR": 0.002, "OPTIM.MAX_EPOCH": epochs, "OUTPUT_DIR": f"made up, {folder.as_posix()}"}
    result |= {"config": config, "losses": {"ce": history[-1]["ce"]} if history else {}, "seconds": 61.0 + seed}
    result["versions"] = {"python": "3.11.7", "torch": "2.15.0", "device": "cpu", "precision": "fp32"}
    (folder / "result.json").write_text(json.dumps(result))
    if history:
        model = folder / "prompt_learner"
        model.mkdir()
        torch.save({"state_dict": {}, "epoch": epochs, "plpp_reg": {"history": history}}, model / f"model.pth.tar-{epochs}")
        (model / "checkpoint").write_text(f"model.pth.tar-{epochs}\n")
