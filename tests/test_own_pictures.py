"""Pictures of one's own: upright, of any scale, and the same files everywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from plpp_reg.data import Datum, load_dataset
from plpp_reg.data.augmentation import build_transform
from plpp_reg.data.loaders import ImageDataset, opener_of
from plpp_reg.engine.features import FrozenFeatures
from plpp_reg.errors import InputError
from plpp_reg.io.pictures import ENDINGS, TURNS, open_as_upstream, open_picture
from plpp_reg.prompts.predict import find_images

from helpers import engine as helpers
from helpers.own import checked, folder_of, noise


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_as_pillow_turns_it_and_as_it_lies_upstream(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((30, 20), 80).convert("RGB").save(path := tmp_path / "x", format=form, exif=exif)
    with Image.open(path) as file:
        lying = file.convert("RGB")
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    assert open_picture(path).tobytes() == upright.tobytes()
    assert open_as_upstream(path).tobytes() == lying.tobytes()
    if form != "TIFF":  # which Pillow turns by itself
        assert (upright.tobytes() == lying.tobytes()) == (orientation == 1)
    assert set(TURNS) == set(range(2, 9))


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        (lambda g: g.astype(np.uint16) * 257, ".png"),
        (lambda g: g.astype(np.uint16) * 257, ".tif"),
        (lambda g: g.astype(np.int32) * 257, ".tif"),
        (lambda g: g.astype(np.int32), ".tif"),
        (lambda g: g.astype(np.float32) / 255, ".tif"),
        (lambda g: g.astype(np.float32), ".tif"),
    ],
)
def test_grey_values_of_any_scale_are_those_of_eight_bits(tmp_path: Path, values: Callable, ending: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (12, 9)).astype(np.uint8)
    grey[0, :2] = 0, 255
    Image.fromarray(values(grey)).save(path := tmp_path / f"x{ending}")
    read = np.asarray(open_picture(path))
    assert (read == grey[..., None]).all()
    Image.fromarray(np.ones((3, 3), np.float32) * -1).save(path := tmp_path / "y.tif")
    for wrong in (-1.0, 256.0, np.nan, np.inf):
        Image.fromarray(np.full((3, 3), wrong, np.float32)).save(path)
        with pytest.raises(InputError, match=r"y\.tif: expected a readable picture with values of 0 to 1, or 0 to 255, got"):
            open_picture(path)


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, kind in (("pipe.png", "a pipe"), ("folder.png", "a folder")):
        for opener in (open_picture, open_as_upstream):
            with pytest.raises(InputError, match=f"{name}: expected a readable picture, got {kind}"):
                opener(tmp_path / name)
    table = tmp_path / "t.csv"
    for name in ("pipe.png", "folder.png"):
        table.write_text(f"path,class\n{name},cat\n")
        status, out = checked(f"csv:{table}", capsys)
        assert status == 1 and "line 2: expected a picture's path" in out


def companions(place: Path) -> None:
    """What lies beside pictures and is none: of a Mac, of the system, of a user."""
    for name in ("._00.png", ".hidden.png", "Thumbs.db", "notes.txt"):
        (place / name).write_bytes(b"\0\5\x16\7no picture")
    for name in ("__MACOSX", "@eaDir", ".thumbnails"):
        (place / name).mkdir(exist_ok=True)
        (place / name / "00.png").write_bytes(b"no picture")
    os.mkfifo(place / "pipe.png")
    (place / "gone.png").symlink_to("nowhere.png")


def test_the_same_files_count_as_pictures_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = folder_of(tmp_path / "d", {"cat.png": 5, "red_fox": 6})
    for place in (tmp_path / "d", tmp_path / "d" / "cat.png", tmp_path / "d" / "red_fox"):
        companions(place)
    for ending in ENDINGS:
        noise(tmp_path / "d" / "red_fox" / "x.png", 5).rename(tmp_path / "d" / "red_fox" / f"x{ending.upper()}")
    data = load_dataset(name)
    assert data.classnames == ["cat.png", "red fox"]
    used = {d.impath for part in (data.train, data.val, data.test) for d in part}
    assert used == set(map(str, find_images([tmp_path / "d"]).paths)) and len(used) == 11 + len(ENDINGS)
    status, out = checked(name, capsys)
    assert status == 0 and f"all {len(used)} images decode" in out
    assert "not used: 12 files (.png 6, .db 3, .txt 3)" in out


def test_ones_own_pictures_are_upright_in_training_too_and_the_papers_are_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path, exif=exif)
    item = Datum(str(path), 0, "cat", "x.png")

    def top(name: str) -> float:
        cfg = helpers.make_cfg("DATASET.NAME", name)
        images = ImageDataset([item], build_transform(cfg, False), 1, opener=opener_of(cfg))
        return images.pixels(0, 0)[:, :16].float().mean().item()

    assert top(f"folder:{tmp_path}") == top("csv:t.csv") == 0
    assert all(top(name) == 255 for name in ("emoji", "Caltech101", "ImageNet", "tiny"))


def test_features_are_kept_by_how_pictures_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset(folder_of(tmp_path, {"cat": 5, "dog": 5}))
    trainer = helpers.make_trainer(data)

    def key(name: str) -> str:
        cfg = helpers.make_cfg("DATASET.NAME", name)
        features = FrozenFeatures(trainer.method.frozen, cfg, data, "fp32", trainer.device, trainer.ranks)
        return json.dumps(features._described("test", 0), sort_keys=True)

    papers, own = key("Caltech101"), key("folder:x")
    assert papers != own == key("csv:y") and papers == key("emoji")
    monkeypatch.setattr("plpp_reg.engine.features.READING", 10**6)
    assert key("folder:x") != own and key("Caltech101") == papers
