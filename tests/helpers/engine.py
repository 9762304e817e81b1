"""What the engine's tests share: a small data set of pictures, a tiny random CLIP of OpenAI's architecture, short recipes.

Also importable in a subprocess (``sys.path`` with this folder), where ``register()`` adds the data set to the table.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from plpp_reg.clip.load import freeze, from_weights, openai_clip
from plpp_reg.data import DATASETS, DatasetEntry, DataSplit, Datum
from plpp_reg.engine import config
from plpp_reg.engine.evaluation import Classifier
from plpp_reg.engine.frozen import FrozenEncoder, normalize
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Classes, Method
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers.coop import CoOp

HERE = Path(__file__).parent.parent  # tests/
ROOT = HERE.parent
RESOLUTION, WIDTH = 32, 64
# Token counts differ, and so do first letters; an odd number, so that base and new halves differ in size.
CLASSNAMES = ["cat", "hot air balloon", "tea", "zebra_crossing", "map"]
COUNTS = {"train": 5, "val": 2, "test": 3}  # a class; 25 training images: the last batch of 6 is a single image

RECIPE: dict[str, Any] = {
    "DATASET": {"NAME": "tiny"},
    "DATALOADER": {"TRAIN_X": {"BATCH_SIZE": 6}, "TEST": {"BATCH_SIZE": 4}, "NUM_WORKERS": 0},
    "INPUT": {
        "SIZE": [RESOLUTION, RESOLUTION],
        "INTERPOLATION": "bicubic",
        "TRANSFORMS": ["random_resized_crop", "random_flip", "normalize"],
    },
    "OPTIM": {
        "NAME": "sgd",
        "LR": 0.05,
        "MAX_EPOCH": 2,
        "LR_SCHEDULER": "cosine",
        "WARMUP_EPOCH": 1,
        "WARMUP_TYPE": "constant",
    },
    "FEATURES": {"MAX_GIB": 0.0},  # nothing is left in the user's cache
    "TRAINER": {"COOP": {"N_CTX": 3, "PREC": "fp32"}},
}


def make_images(folder: Path) -> Path:
    """PNGs at folder/<part>/<label>/<k>.png: noise around a colour of the class, of odd sizes."""
    rng = np.random.default_rng(0)
    for label in range(len(CLASSNAMES)):
        colour = rng.integers(40, 215, 3)
        for part, count in COUNTS.items():
            (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                pixels = np.clip(colour + rng.normal(0, 40, (37, 43, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{k}.png")
    return folder


def read_tiny(root: str | Path) -> DataSplit:
    """The reader that the table names; --root is the folder of :func:`make_images`."""
    parts = {
        part: [
            Datum(str(Path(root) / part / str(label) / f"{k}.png"), label, name, f"{part}/{label}/{k}.png")
            for label, name in enumerate(CLASSNAMES)
            for k in range(count)
        ]
        for part, count in COUNTS.items()
    }
    return DataSplit(**parts, classnames=list(CLASSNAMES))


def register() -> None:
    DATASETS["tiny"] = DatasetEntry("helpers.engine:read_tiny")


@functools.cache
def _tiny_state(seed: int) -> dict[str, torch.Tensor]:
    streams = torch.get_rng_state()
    torch.manual_seed(seed)
    model = openai_clip().model.CLIP(
        embed_dim=32,
        image_resolution=RESOLUTION,
        vision_layers=1,
        vision_width=64,
        vision_patch_size=16,
        context_length=77,
        vocab_size=49408,
        transformer_width=WIDTH,
        transformer_heads=1,
        transformer_layers=2,
    )
    torch.set_rng_state(streams)
    # In float16 as OpenAI's files are, so that a model from the file and one from here agree to the bit.
    return {name: t.half() for name, t in model.state_dict().items()}


def tiny_clip(seed: int = 0) -> torch.nn.Module:
    """A frozen float32 CLIP, as load_clip gives it; the same bits at each call."""
    model = from_weights(_tiny_state(seed))
    model.trained_token_ids = None
    return freeze(model)


def write_backbone(path: Path, seed: int = 0) -> Path:
    """The same model as a file that --backbone takes."""
    torch.save(_tiny_state(seed), path)
    return path


def write_recipe(path: Path, **changes: Any) -> Path:
    """RECIPE as a --config-file; ``changes`` by key with __ for the dots (OPTIM__LR=1)."""
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE))
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = recipe
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def make_cfg(*opts: object, **nodes: object):
    """RECIPE resolved, then KEY VALUE pairs: ``make_cfg("OPTIM.LR", 0.1)``."""
    cfg = config.get_cfg_default()
    for key, value in config._flat(RECIPE):
        config.set_value(cfg, key, value)
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        config.set_value(cfg, key, value)
    cfg.TRAINER.NAME = "CoOp" + ("_PLPP" if cfg.TRAINER.PLPP.ENABLED else "")
    return cfg


def make_trainer(
    data: DataSplit, *opts: object, clip_model: torch.nn.Module | None = None, cls: type[Method] = CoOp
) -> Trainer:
    """A quiet trainer on the tiny model."""
    return Trainer(cls, make_cfg(*opts), data=data, clip_model=clip_model or tiny_clip(), log=RunLog(quiet=True))


def quietly(arguments: RunArguments) -> dict[str, Any]:
    """A whole run that prints nothing: its result."""
    return run(arguments, RunLog(quiet=True))[0]


def fixed_batches(n: int, size: int = 6, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of noise, for steps without a loader."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "img": torch.randn(size, 3, RESOLUTION, RESOLUTION, generator=generator),
            "label": torch.randint(len(CLASSNAMES), (size,), generator=generator),
        }
        for _ in range(n)
    ]


def logits_of(trainer: Trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, C), as a test computes them."""
    return Classifier(trainer.method)(batch)


def losses_of(trainer: Trainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The method's own, without PLPP's."""
    method = trainer.method
    images = method.image_features(batch) if method.classes_depend_on_image else None
    return method.losses(batch, method.encode_classes(images))


class Doubled(FrozenEncoder):
    """Another encoder, for the same images."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(super().encode(images) + 1)

    @property
    def key(self) -> dict[str, object]:
        return super().key


def noisy_losses(self: CoOp, batch: dict[str, torch.Tensor], classes: Classes) -> dict[str, torch.Tensor]:
    """CoOp's loss, scaled by a draw from each random stream: a stream that a resume does not restore shows in the context."""
    draws = torch.rand(()).item() + random.random() + np.random.random()
    return {"ce": _losses(self, batch, classes)["ce"] * (0.5 + draws / 3)}


_losses = CoOp.losses


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, in structure, type and value."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def files_below(folder: Path) -> list[str]:
    """Every file and folder, for a look before and after."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
