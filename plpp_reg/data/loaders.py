"""Images to batches. What an image looks like in an epoch is a function of (seed, epoch, its index) alone.

The epoch counts as its view: the same number, unless ``INPUT.VIEWS`` says that so many augmentations are seen in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T
from yacs.config import CfgNode

from plpp_reg.data import DataSplit, Datum, load_dataset
from plpp_reg.engine.distributed import Ranks
from plpp_reg.errors import InputError, unknown

ONE = Ranks()  # a run in one process
INTERPOLATIONS = {
    "bilinear": T.InterpolationMode.BILINEAR,
    "bicubic": T.InterpolationMode.BICUBIC,
    "nearest": T.InterpolationMode.NEAREST,
}
# Dassl's names, in the order in which Dassl applies them whatever the order in INPUT.TRANSFORMS.
TRAIN_TRANSFORMS = (
    "random_crop",
    "random_resized_crop",
    "center_crop",  # of no effect here, as in Dassl: every image has its size already
    "random_flip",
    "colorjitter",
    "randomgrayscale",
    "normalize",
)


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def build_transform(cfg: CfgNode, train: bool) -> T.Compose:
    """Dassl's transforms for ``cfg.INPUT``, through torchvision: image -> (3, H, W) float32."""
    if cfg.INPUT.INTERPOLATION not in INTERPOLATIONS:
        raise unknown("INPUT.INTERPOLATION", cfg.INPUT.INTERPOLATION, INTERPOLATIONS)
    mode, size = INTERPOLATIONS[cfg.INPUT.INTERPOLATION], tuple(cfg.INPUT.SIZE)
    names = tuple(cfg.INPUT.TRANSFORMS)
    for key, length in (("SIZE", 2), ("PIXEL_MEAN", 3), ("PIXEL_STD", 3), ("RRCROP_SCALE", 2)):
        if len(cfg.INPUT[key]) != length:
            raise InputError(f"INPUT.{key}: expected {length} numbers, got {cfg.INPUT[key]!r}")
    if cfg.INPUT.VIEWS < 0:
        raise InputError(f"INPUT.VIEWS: expected an integer >= 0 (0: a new view each epoch), got {cfg.INPUT.VIEWS}")
    if not min(cfg.INPUT.PIXEL_STD) > 0:
        raise InputError(f"INPUT.PIXEL_STD: expected numbers > 0, got {cfg.INPUT.PIXEL_STD!r}")
    if not 0 < cfg.INPUT.RRCROP_SCALE[0] <= cfg.INPUT.RRCROP_SCALE[1]:
        raise InputError(f"INPUT.RRCROP_SCALE: expected 0 < low <= high, got {cfg.INPUT.RRCROP_SCALE!r}")
    for name in names:
        if name not in TRAIN_TRANSFORMS:
            raise unknown("INPUT.TRANSFORMS", name, TRAIN_TRANSFORMS)
    steps: list = [_rgb]
    if not train:
        steps += [T.Resize(max(size), interpolation=mode), T.CenterCrop(size)]
    else:
        inp = cfg.INPUT
        if "random_crop" not in names and "random_resized_crop" not in names:
            steps.append(T.Resize(size, interpolation=mode))
        made = {
            "random_crop": lambda: T.RandomCrop(size, padding=inp.CROP_PADDING),
            "random_resized_crop": lambda: T.RandomResizedCrop(size, scale=tuple(inp.RRCROP_SCALE), interpolation=mode),
            "random_flip": lambda: T.RandomHorizontalFlip(),
            "colorjitter": lambda: T.ColorJitter(inp.COLORJITTER_B, inp.COLORJITTER_C, inp.COLORJITTER_S, inp.COLORJITTER_H),
            "randomgrayscale": lambda: T.RandomGrayscale(p=inp.RGS_P),
        }
        for name in TRAIN_TRANSFORMS:
            if name in names and name in made:
                try:
                    steps.append(made[name]())
                except ValueError as e:
                    raise InputError(f"INPUT: {name} ({name.upper()}_…): {e}") from e
    if "normalize" not in names:
        raise InputError(f"INPUT.TRANSFORMS: expected 'normalize' among them, which CLIP needs, got {list(names)}")
    steps += [T.ToTensor(), T.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)]
    return T.Compose(steps)


def image_seed(seed: int, epoch: int, index: int) -> int:
    """One 63-bit seed for (seed, epoch, index), well mixed (splitmix64's finaliser)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB + 0x2545F4914F6CDD1D) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def view_of(epoch: int, views: int) -> int:
    """Which augmentation of an image an epoch sees: one of its own, or, with ``views`` = N > 0, one of N in turn."""
    return epoch % views if views > 0 else epoch


class ImageDataset(Dataset):
    """Items by (view, index): ``{"img": (3, H, W), "label", "index"}``. The caller's random streams are left alone."""

    def __init__(self, items: Sequence[Datum], transform: T.Compose, seed: int) -> None:
        self.items, self.transform, self.seed = items, transform, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | int]:
        view, index = key
        item = self.items[index]
        try:
            image = Image.open(item.impath)
            image.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as e:  # broken PNG chunks are a SyntaxError
            raise InputError(f"image {item.impath}: expected a readable picture, got {e}") from e
        state = torch.get_rng_state()  # torchvision draws from the global stream
        try:
            torch.default_generator.manual_seed(image_seed(self.seed, view, index))  # not manual_seed: it seeds GPUs too
            return {"img": self.transform(image), "label": item.label, "index": index}
        finally:
            torch.set_rng_state(state)


class Labels(Dataset):
    """The same items without their pictures, for methods that read features of them."""

    def __init__(self, items: Sequence[Datum]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, int]:
        return {"label": self.items[key[1]].label, "index": key[1]}


class EpochBatches(Sampler):
    """Batches of (view, index). In training the order is a permutation by (seed, epoch) alone, and a smaller last batch is
    dropped where there is a full one, as Dassl does; in evaluation it is 0, 1, 2, ..."""

    def __init__(self, size: int, batch_size: int, seed: int, train: bool, ranks: Ranks = ONE, views: int = 0) -> None:
        self.size, self.batch_size, self.seed, self.train, self.epoch = size, batch_size, seed, train, 0
        self.ranks, self.views = ranks, views

    def __len__(self) -> int:
        if self.train and self.size >= self.batch_size:
            return self.size // self.batch_size
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.size))
        if self.train:
            generator = torch.Generator().manual_seed(image_seed(self.seed, self.epoch, -1))
            order = torch.randperm(self.size, generator=generator).tolist()
        for b in range(len(self)):
            if share := self.ranks.share(order[b * self.batch_size : (b + 1) * self.batch_size]):
                yield [(view_of(self.epoch, self.views), i) for i in share]


def image_seed_of(cfg: CfgNode) -> int:
    """The seed of the pictures: which are picked, and how they are augmented."""
    return cfg.DATASET.SEED if cfg.DATASET.SEED >= 0 else cfg.SEED


def load_data(cfg: CfgNode) -> DataSplit:
    """What ``cfg.DATASET`` names, as a run sees it."""
    node = cfg.DATASET
    return load_dataset(node.NAME, node.ROOT, node.NUM_SHOTS, image_seed_of(cfg), node.SUBSAMPLE_CLASSES)


def part_of(cfg: CfgNode, data: DataSplit, split: str) -> Sequence[Datum]:
    """The images of one part of the data, "train", "val" or "test".

    Raises:
        InputError: it has none.
    """
    items = getattr(data, split)
    if not items:
        raise InputError(f"data set {cfg.DATASET.NAME!r}: expected images in its {split} part, it has none")
    return items


def build_loader(
    cfg: CfgNode, items: Sequence[Datum], train: bool, pin_memory: bool = False, pixels: bool = True, ranks: Ranks = ONE
) -> DataLoader:
    """A loader whose ``batch_sampler.epoch`` the trainer sets. The number of workers changes no bit of any batch.

    Without ``pixels`` a batch has labels and indices alone. Each rank gets its share of every batch.
    """
    if not items:
        raise InputError(f"expected images to {'train' if train else 'test'} on, got none")
    batch_size = cfg.DATALOADER.TRAIN_X.BATCH_SIZE if train else cfg.DATALOADER.TEST.BATCH_SIZE
    if batch_size < 1:
        raise InputError(f"DATALOADER.{'TRAIN_X' if train else 'TEST'}.BATCH_SIZE: expected an integer >= 1, got {batch_size}")
    if train and min(batch_size, len(items)) % ranks.size:
        raise InputError(
            f"DATALOADER.TRAIN_X.BATCH_SIZE: expected a batch that {ranks.size} processes can share equally, "
            f"got {min(batch_size, len(items))} images"
        )
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise InputError(f"DATALOADER.NUM_WORKERS: expected an integer >= 0, got {cfg.DATALOADER.NUM_WORKERS}")
    workers = cfg.DATALOADER.NUM_WORKERS if pixels else 0
    images = ImageDataset(items, build_transform(cfg, train), image_seed_of(cfg))
    return DataLoader(
        images if pixels else Labels(items),
        batch_sampler=EpochBatches(len(items), batch_size, cfg.SEED, train, ranks, cfg.INPUT.VIEWS),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader's own seed for its workers, not the run's stream
    )


def canonical_loader(cfg: CfgNode, items: Sequence[Datum], train: bool, view: int, size: int, ranks: Ranks = ONE) -> DataLoader:
    """All images by index, always ``size`` in a batch: the last is filled up with the first image. Each rank gets every
    ``ranks.size``-th batch."""
    keys = [(view, i) for i in range(len(items))]
    keys += [(view, 0)] * (-len(keys) % size)
    return DataLoader(
        ImageDataset(items, build_transform(cfg, train), image_seed_of(cfg)),
        batch_sampler=ranks.share([keys[i : i + size] for i in range(0, len(keys), size)]),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        generator=torch.Generator(),
    )
