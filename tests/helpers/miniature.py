"""The folder layouts of CoOp's DATASETS page in miniature: the same files, names and lists, few classes, tiny pictures.

``make(root, name)`` writes one; everything in it is a function of the name. Also used by tools/compare_upstream.py, which runs
upstream's readers and ours on these folders.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from plpp_reg.data import DATASETS


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (200, 120, 40)).save(buffer, format="JPEG")
    return buffer.getvalue()


PICTURE = _picture()


def _write(path: Path, content: bytes | str = PICTURE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _counts(rng: random.Random, n: int, low: int = 8, high: int = 24) -> list[int]:
    return [rng.randint(low, high) for _ in range(n)]


def _class_folders(folder: Path, rng: random.Random, images: str, classes: Sequence[str], others: Sequence[str] = ()) -> None:
    for classname, count in zip([*classes, *others], _counts(rng, len(classes) + len(others)), strict=True):
        for i in range(count):
            _write(folder / images / classname / f"image_{i + 1:04d}.jpg")
    _write(folder / images / ".DS_Store", "hidden")


def _caltech(folder: Path, rng: random.Random) -> None:
    classes = ["accordion", "airplanes", "Faces", "Leopards", "Motorbikes", "crocodile_head", "yin_yang"]
    _class_folders(folder, rng, "101_ObjectCategories", classes, ["BACKGROUND_Google", "Faces_easy"])


def _dtd(folder: Path, rng: random.Random) -> None:
    _class_folders(folder, rng, "images", ["banded", "polka-dotted", "zigzagged", "blotchy", "cobwebbed"])


def _food(folder: Path, rng: random.Random) -> None:
    _class_folders(folder, rng, "images", ["apple_pie", "beef_carpaccio", "waffles", "hot_dog"])


def _eurosat(folder: Path, rng: random.Random) -> None:
    _class_folders(folder, rng, "2750", list(DATASETS["EuroSAT"].layout.renamed))


def _pets(folder: Path, rng: random.Random) -> None:
    breeds = ["Abyssinian", "american_bulldog", "Egyptian_Mau", "yorkshire_terrier", "Sphynx"]
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, (breed, count) in enumerate(zip(breeds, _counts(rng, len(breeds), 10), strict=True), start=1):
        for i in range(count):
            name = f"{breed}_{i + 1}"
            lines["trainval" if i < count * 2 // 3 else "test"].append(f"{name} {label} 1 {label}")
            _write(folder / "images" / f"{name}.jpg")
    for part, rows in lines.items():
        rng.shuffle(rows)  # first appearance is not label order
        _write(folder / "annotations" / f"{part}.txt", "".join(f"{row}\n" for row in rows))


def _cars(folder: Path, rng: random.Random) -> None:
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "BMW M3 Coupe 2012", "Ram C/V Cargo Van Minivan 2012"]
    dtype = [("bbox_x1", object), ("class", object), ("fname", object)]
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        labels = [label for label, count in enumerate(_counts(rng, len(names)), start=1) for _ in range(count)]
        rng.shuffle(labels)
        cars = np.zeros((1, len(labels)), dtype=dtype)
        for i, label in enumerate(labels):
            cars[0, i] = (np.array([[1]]), np.array([[label]], dtype=np.uint8), f"{i + 1:05d}.jpg")
            _write(folder / f"cars_{part}" / f"{i + 1:05d}.jpg")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        savemat(folder / file, {"annotations": cars})
    meta = np.empty((1, len(names)), dtype=object)
    meta[0] = names
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": meta})


def _flowers(folder: Path, rng: random.Random) -> None:
    names = {
        "1": "pink primrose",
        "2": "hard-leaved pocket orchid",
        "3": "canterbury bells",
        "4": "sweet pea",
        "5": "black-eyed susan",
    }
    labels = [int(label) for label, count in zip(names, _counts(rng, len(names)), strict=True) for _ in range(count)]
    rng.shuffle(labels)
    for i in range(len(labels)):
        _write(folder / "jpg" / f"image_{i + 1:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    _write(folder / "cat_to_name.json", json.dumps(dict(reversed(names.items()))))


def _aircraft(folder: Path, rng: random.Random) -> None:
    variants = ["707-320", "Cessna 172", "MD-80", "A340-300", "F-16A/B"]
    _write(folder / "variants.txt", "".join(f"{v}\n" for v in variants))
    number = 1000
    for part in ("train", "val", "test"):
        lines = []
        for variant, count in zip(variants, _counts(rng, len(variants)), strict=True):
            for _ in range(count):
                number += 7
                lines.append(f"{number} {variant}")
                _write(folder / "images" / f"{number}.jpg")
        rng.shuffle(lines)
        _write(folder / f"images_variant_{part}.txt", "".join(f"{line}\n" for line in lines))


def _sun(folder: Path, rng: random.Random) -> None:
    categories = ["a/abbey", "a/apse/indoor", "c/church/indoor", "c/church/outdoor", "y/youth_hostel"]
    _write(folder / "ClassName.txt", "".join(f"/{c}\n" for c in categories))
    for file in ("Training_01.txt", "Testing_01.txt"):
        names = [
            f"{c}/sun_{file[0]}{i:03d}.jpg"
            for c, count in zip(categories, _counts(rng, len(categories)), strict=True)
            for i in range(count)
        ]
        rng.shuffle(names)
        for name in names:
            _write(folder / "SUN397" / name)
        _write(folder / file, "".join(f"/{name}\n" for name in names))


def _ucf(folder: Path, rng: random.Random) -> None:
    actions = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "BalanceBeam": "Balance_Beam", "YoYo": "Yo_Yo", "TaiChi": "Tai_Chi"}
    lists = folder / "ucfTrainTestlist"
    _write(lists / "classInd.txt", "".join(f"{i} {a}\n" for i, a in enumerate(actions, start=1)))
    for part in ("train", "test"):
        lines = []
        for i, (action, count) in enumerate(zip(actions, _counts(rng, len(actions)), strict=True), start=1):
            for k in range(count):
                video = f"v_{action}_{part}_g{k:02d}_c01"
                lines.append(f"{action}/{video}.avi {i}" if part == "train" else f"{action}/{video}.avi")
                _write(folder / "UCF-101-midframes" / actions[action] / f"{video}.jpg")
        rng.shuffle(lines)
        _write(lists / f"{part}list01.txt", "".join(f"{line}\r\n" for line in lines))  # as published


WNIDS = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n02012849": "crane bird",
    "n01518878": "ostrich",
    "n15075141": "toilet tissue",
}


def _classnames(folder: Path) -> None:
    _write(folder / "classnames.txt", "".join(f"{wnid} {name}\n" for wnid, name in WNIDS.items()))


def _imagenet(folder: Path, rng: random.Random) -> None:
    _classnames(folder)
    for part, low, high in (("train", 18, 24), ("val", 3, 5)):
        for wnid, count in zip(WNIDS, _counts(rng, len(WNIDS), low, high), strict=True):
            for i in range(count):
                name = f"{wnid}_{rng.randint(1, 9999)}_{i}.JPEG" if part == "train" else f"ILSVRC2012_val_{i}{wnid[-3:]}.JPEG"
                _write(folder / "images" / part / wnid / name)


def _imagenet_folders(images: str, wnids: Sequence[str], readme: bool) -> Callable[[Path, random.Random], None]:
    def make_it(folder: Path, rng: random.Random) -> None:
        _classnames(folder)
        for wnid, count in zip(wnids, _counts(rng, len(wnids), 3, 6), strict=True):
            for i in range(count):
                _write(folder / images / wnid / f"0.{i}_{wnid}.jpg")
        if readme:
            _write(folder / images / "README.txt", "read me")

    return make_it


def _imagenet_numbered(folder: Path, rng: random.Random) -> None:
    # Upstream's code counts to 1000, so this one is not in miniature.
    _write(folder / "classnames.txt", "".join(f"n{i * 37 % 1000:08d} thing {i}\n" for i in range(1000)))
    for i in range(1000):
        for k in range(1 + i % 2):
            _write(folder / "imagenetv2-matched-frequency-format-val" / str(i) / f"{k}.jpeg")


MAKERS: dict[str, Callable[[Path, random.Random], None]] = {
    "ImageNet": _imagenet,
    "Caltech101": _caltech,
    "OxfordPets": _pets,
    "StanfordCars": _cars,
    "OxfordFlowers": _flowers,
    "Food101": _food,
    "FGVCAircraft": _aircraft,
    "SUN397": _sun,
    "DescribableTextures": _dtd,
    "EuroSAT": _eurosat,
    "UCF101": _ucf,
    "ImageNetV2": _imagenet_numbered,
    "ImageNetSketch": _imagenet_folders("images", list(WNIDS), readme=False),
    "ImageNetA": _imagenet_folders("imagenet-a", ["n01443537", "n15075141", "n01518878"], readme=True),
    "ImageNetR": _imagenet_folders("imagenet-r", ["n01443537", "n15075141"], readme=True),
}


def make(root: Path, name: str) -> Path:
    """One data set's folder below ``root``, without a split file."""
    folder = root / DATASETS[name].layout.folder
    MAKERS[name](folder, random.Random(name))
    return folder


def digest_all(lists: dict[str, Sequence]) -> str:
    """A short hash of the parts, (path below the image folder, label, class name) of each image, and of the classes."""
    text = json.dumps([lists[part] for part in ("train", "val", "test", "classnames")])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
