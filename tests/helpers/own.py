"""Data of one's own, made of noise: pictures in folders, and what plpp data check says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plpp_reg.commands import cli
from plpp_reg.data import load_dataset


def noise(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def folder_of(root: Path, counts: dict[str, int], first: int = 0) -> str:
    """Different pictures, ``{"cat": 4, "train/dog": 2}``."""
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            noise(root / name / f"{i:02d}.png", first + 1000 * k + i)
    return f"folder:{root}"


def sizes(name: str) -> tuple[int, int, int]:
    data = load_dataset(name)
    return len(data.train), len(data.val), len(data.test)


def checked(name: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["data", "check", ".", "--datasets", name])
    return status, capsys.readouterr().out


def split_file(root: Path, rows: list[list[object]], test: list[list[object]] = ()) -> str:
    folder = root / "dtd"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts = {"train": rows, "val": [], "test": list(test)}
    (folder / "split_zhou_DescribableTextures.json").write_text(json.dumps(parts))
    return "DescribableTextures"
