"""Run upstream CoOp's readers beside ours on generated folders in each data set's layout.

    python tools/compare_upstream.py --coop COOP_CHECKOUT --dassl DASSL_CHECKOUT [--facts tests/upstream_facts.json]

For each of the 15 data sets: the lists train, val and test with and without a split file, class names by label, few-shot picks
for several seeds and shots, base and new halves; equal or not. docs/fidelity.md records the outcome. ``--facts`` writes hashes
of what upstream's code gave, with folders listed in sorted order, for the tests of a checkout that has no upstream beside it.
Both checkouts are other people's code (MIT) and are only imported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from plpp_reg.data import DATASETS, load_dataset

from helpers.miniature import MAKERS, digest_all, make

SEEDS = (0, 1, 2, 3, 17)
SHOTS = (-1, 1, 2, 4, 8, 16)
HALVES = ("all", "base", "new")
UPSTREAM_MODULES = {
    "ImageNet": "imagenet",
    "Caltech101": "caltech101",
    "OxfordPets": "oxford_pets",
    "StanfordCars": "stanford_cars",
    "OxfordFlowers": "oxford_flowers",
    "Food101": "food101",
    "FGVCAircraft": "fgvc_aircraft",
    "SUN397": "sun397",
    "DescribableTextures": "dtd",
    "EuroSAT": "eurosat",
    "UCF101": "ucf101",
    "ImageNetV2": "imagenetv2",
    "ImageNetSketch": "imagenet_sketch",
    "ImageNetA": "imagenet_a",
    "ImageNetR": "imagenet_r",
}
TEST_ONLY = ("ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR")


def load_upstream(coop: Path, dassl: Path) -> dict[str, type]:
    """Upstream's data set classes. Dassl's package files import all of Dassl, so its packages are entered without them."""
    for package in ("dassl", "dassl.utils", "dassl.data", "dassl.data.datasets"):
        module = types.ModuleType(package)
        module.__path__ = [str(dassl.joinpath(*package.split(".")))]
        sys.modules[package] = module
    sys.modules["gdown"] = types.ModuleType("gdown")  # for downloads alone
    tools, registry = (importlib.import_module(f"dassl.utils.{name}") for name in ("tools", "registry"))
    for module in (tools, registry):
        for name in module.__all__:
            setattr(sys.modules["dassl.utils"], name, getattr(module, name))
    build = importlib.import_module("dassl.data.datasets.build")
    base = importlib.import_module("dassl.data.datasets.base_dataset")
    for name, value in (("DATASET_REGISTRY", build.DATASET_REGISTRY), ("Datum", base.Datum), ("DatasetBase", base.DatasetBase)):
        setattr(sys.modules["dassl.data.datasets"], name, value)
    datasets = types.ModuleType("datasets")
    datasets.__path__ = [str(coop / "datasets")]
    sys.modules["datasets"] = datasets
    return {name: getattr(importlib.import_module(f"datasets.{m}"), name) for name, m in UPSTREAM_MODULES.items()}


def theirs(cls: type, root: Path, name: str, shots: int, seed: int, subsample: str) -> dict[str, object]:
    """Upstream's lists. Its caches are removed first, as though the seed and shots were new to the folder."""
    folder = root / DATASETS[name].layout.folder
    shutil.rmtree(folder / "split_fewshot", ignore_errors=True)
    (folder / "preprocessed.pkl").unlink(missing_ok=True)
    random.seed(seed)  # what set_random_seed does of interest here
    cfg = SimpleNamespace(
        DATASET=SimpleNamespace(ROOT=str(root), NUM_SHOTS=shots, SUBSAMPLE_CLASSES=subsample), SEED=seed, VERBOSE=False
    )
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that is not there
        data = cls(cfg)
    images = folder / DATASETS[name].layout.images

    def rows(items: list | None) -> list[tuple[str, int, str]]:
        return [(os.path.relpath(d.impath, images), d.label, d.classname) for d in items or ()]

    return {"train": rows(data.train_x), "val": rows(data.val), "test": rows(data.test), "classnames": list(data.classnames)}


def ours(root: Path, name: str, shots: int, seed: int, subsample: str) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the split that had to be made
        data = load_dataset(name, root, shots, seed, subsample)
    parts = {p: [(d.name, d.label, d.classname) for d in getattr(data, p)] for p in ("train", "val", "test")}
    return {**parts, "classnames": data.classnames}


def settings(name: str) -> list[tuple[int, int, str]]:
    if name in TEST_ONLY:  # upstream takes no sample and no half of these
        return [(-1, 1, "all")]
    return [(shots, seed, half) for shots in SHOTS for seed in (SEEDS if shots > 0 else (1,)) for half in HALVES]


def expected_difference(name: str, upstream: dict[str, object]) -> dict[str, object]:
    """Where ours is meant to differ: no test image stands in another part."""
    changed = dict(upstream)
    if name == "ImageNet":
        changed["val"] = []
    if name in TEST_ONLY:
        changed["train"] = changed["val"] = []
    return changed


def compare(name: str, cls: type, place: Path) -> tuple[dict[str, str], dict[str, object]]:
    """What agrees, in words, and upstream's hashes."""
    a, b = place / "theirs", place / "ours"
    for root in (a, b):
        make(root, name)
    # The same folder for both, so that the file system lists it in one order: ours reads theirs, with its split file set aside.
    split = a / DATASETS[name].layout.folder / (DATASETS[name].layout.split or "none")
    report: dict[str, str] = {}
    facts: dict[str, object] = {}
    upstream = expected_difference(name, theirs(cls, a, name, -1, 1, "all"))
    if split.is_file():
        written = split.read_bytes()
        split.unlink()
        report["split made, seed 1"] = _same(ours(a, name, -1, 1, "all"), upstream)
        report["its file"] = "equal to the byte" if split.read_bytes() == written else "DIFFERENT"
        facts["split file"] = hashlib.sha256(written).hexdigest()[:16]
    agreed = 0
    grid = settings(name)
    for shots, seed, half in grid:
        upstream = expected_difference(name, theirs(cls, a, name, shots, seed, half))
        agreed += _same(ours(a, name, shots, seed, half), upstream) == "equal"
        facts[f"{shots} {seed} {half}"] = digest_all(upstream)
    report["lists, picks, halves, class names"] = f"{agreed} of {len(grid)} equal"
    return report, facts


def _same(one: dict[str, object], other: dict[str, object]) -> str:
    different = [part for part in other if one[part] != other[part]]
    return f"DIFFERENT in {', '.join(different)}" if different else "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coop", type=Path, required=True, help="a checkout of KaiyangZhou/CoOp")
    parser.add_argument("--dassl", type=Path, required=True, help="a checkout of KaiyangZhou/Dassl.pytorch")
    parser.add_argument("--facts", type=Path, help="write upstream's hashes here, folders listed in sorted order")
    args = parser.parse_args()
    classes = load_upstream(args.coop.resolve(), args.dassl.resolve())
    if args.facts:
        listdir = os.listdir
        os.listdir = functools.wraps(listdir)(lambda path=".": sorted(listdir(path)))
    different, recorded = False, {}
    print("| data set | " + " | ".join(("split made, seed 1", "its file", "lists, picks, halves, class names")) + " |")
    print("|---|---|---|---|")
    for name in MAKERS:
        with tempfile.TemporaryDirectory() as place:
            report, recorded[name] = compare(name, classes[name], Path(place))
        cells = [report.get(column, "no split file") for column in ("split made, seed 1", "its file")]
        cells.append(report["lists, picks, halves, class names"])
        total = len(settings(name))
        different |= "DIFFERENT" in " ".join(cells) or not cells[-1].startswith(f"{total} of {total} ")
        print(f"| {name} | {' | '.join(cells)} |")
    if args.facts:
        args.facts.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
