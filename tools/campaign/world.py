"""A small world for campaigns: pictures, a tiny random CLIP, a recipe, a protocol, a finished run, a sweep of two runs."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plpp_reg.clip.load import openai_clip
from plpp_reg.commands import cli

CLASSES = ("cat", "hot air balloon", "tea")
PICTURES = 6  # a class
SIZE = 32
RECIPE = f"""DATASET:
  NAME: folder:data
  NUM_SHOTS: 2
DATALOADER:
  TRAIN_X:
    BATCH_SIZE: 4
  TEST:
    BATCH_SIZE: 8
INPUT:
  SIZE: [{SIZE}, {SIZE}]
  TRANSFORMS: [random_flip, normalize]
OPTIM:
  MAX_EPOCH: 1
  LR: 0.002
FEATURES:
  MAX_GIB: 0.0
TRAINER:
  COOP:
    N_CTX: 2
    PREC: fp32
"""
PROTOCOL = """table: shots
methods: [CoOp]
datasets: ["folder:data"]
recipe: [recipe.yaml]
seeds: [1, 2]
shots: [2]
test: test
set:
  TRAINER.COOP.N_CTX: 2
tests:
  again: {DATASET.NAME: "folder:data"}
targets: []
where:
  - {datasets: ["folder:data"], shots: [2], set: {OPTIM.LR: 0.001}}
vary:
  TRAINER.PLPP.TOP_K: [3]
variants:
  hard: {TRAINER.PLPP.TOP_K: 1}
"""
TRAIN = ("train", "--trainer", "CoOp", "--config-file", "recipe.yaml", "--backbone", "tiny.pt")
RUN = ("run", "mine.yaml", "--backbone", "tiny.pt")
EUROSAT = ("AnnualCrop", "Forest")


def make(place: Path) -> None:
    """Everything, in ``place``, which is the current folder then."""
    place.mkdir(parents=True)
    os.chdir(place)
    rng = np.random.default_rng(0)
    rows = []
    for classname in CLASSES:
        folder = place / "data" / classname.replace(" ", "_")
        folder.mkdir(parents=True)
        for k in range(PICTURES):
            pixels = rng.integers(0, 255, (SIZE + k, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.png")
            rows.append({"path": f"data/{folder.name}/{k}.png", "class": classname, "split": "train" if k < 4 else "test"})
    with (place / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _split_file(place / "papers" / "eurosat", rng)
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "dataset.yaml").write_text("DATASET:\n  NAME: folder:data\n")
    (place / "mine.yaml").write_text(PROTOCOL)
    torch.manual_seed(0)
    model = openai_clip().model.CLIP(32, SIZE, 1, 64, 16, 77, 49408, 64, 1, 1)
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, place / "tiny.pt")
    assert cli.main([*TRAIN, "--output-dir", "run"]) == 0
    assert cli.main([*RUN, "--output", "sweep"]) == 0


def _split_file(folder: Path, rng: np.random.Generator) -> None:
    """Two classes of EuroSAT as CoOp lays it out."""
    parts: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(EUROSAT):
        (folder / "2750" / name).mkdir(parents=True)
        for k, part in enumerate(("train", "train", "val", "test")):
            Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / "2750" / name / f"{k}.jpg")
            parts[part].append([f"{name}/{k}.jpg", label, name])
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(parts))
