"""Images to batches. What an image looks like in an epoch is a function of (seed, epoch, its index) alone.

The epoch counts as its view: the same number, unless ``INPUT.VIEWS`` says that so many augmentations are seen in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from yacs.config import CfgNode

from plpp_reg.data import DataSplit, Datum, load_dataset
from plpp_reg.data.augmentation import Transform, build_transform
from plpp_reg.data.contents import file_state
from plpp_reg.data.own import own_kind
from plpp_reg.errors import InputError
from plpp_reg.io.mixing import MASK, STEP, mixed
from plpp_reg.io.pictures import open_as_upstream, open_picture

Item = TypeVar("Item")
Made = TypeVar("Made")
Opener = Callable[[str], Image.Image]
DECODED_BYTES = 64 * 2**20  # of a part's pictures, kept decoded from one view to the next
MOST_WORKERS = 1024  # more is a slip of the hand, which a machine would not survive
BATCHES_AHEAD = 1  # of pictures, made while the one before is encoded


def image_seed(seed: int, epoch: int, index: int) -> int:
    """One 63-bit seed for (seed, epoch, index), well mixed (splitmix64's finaliser)."""
    z = seed * STEP + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB + 0x2545F4914F6CDD1D
    return mixed(z & MASK) >> 1


def view_of(epoch: int, views: int) -> int:
    """Which augmentation of an image an epoch sees: one of its own, or, with ``views`` = N > 0, one of N in turn."""
    return epoch % views if views > 0 else epoch


class Sharing(Protocol):
    """Which part of a sequence is this process's, of ``size`` processes."""

    @property
    def size(self) -> int: ...

    def share(self, items: Sequence[Item]) -> Sequence[Item]: ...


class One:
    """A run in one process."""

    size = 1

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        return items


ONE = One()


class Pictures:
    """Opens pictures, and keeps small ones in memory: they are not decoded anew for each view.

    Args:
        largest: bytes of decoded pixels, of a picture that is kept.
        opener: what reads a file.
    """

    def __init__(self, largest: int = 0, opener: Opener = open_picture) -> None:
        self.largest, self.opener = largest, opener
        self._kept: dict[str, tuple[tuple[int, ...], Image.Image]] = {}  # with the state of its file

    def open(self, path: str) -> Image.Image:
        """In three channels.

        Raises:
            InputError: it cannot be read.
        """
        state = file_state(path)
        kept, image = self._kept.get(path, (None, None))
        if kept != state:
            image = self.opener(path)
            if 3 * image.width * image.height <= self.largest:
                self._kept[path] = state, image
        return image


class ImageDataset(Dataset):
    """Items by (view, index): ``{"img": (3, H, W), "label", "index"}``. No random stream but an image's own is touched.

    Args:
        items: the images.
        transform: what they become.
        seed: of the views.
        max_bytes: of decoded pictures that are kept for their next view; large ones, of which not all would fit, are not.
        opener: what reads a picture's file.
    """

    def __init__(
        self, items: Sequence[Datum], transform: Transform, seed: int, max_bytes: int = 0, opener: Opener = open_picture
    ) -> None:
        self.items, self.transform, self.seed = items, transform, seed
        self.pictures = Pictures(max_bytes // max(1, len(items)), opener)

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, view: int, index: int) -> Tensor:
        """(3, H, W) uint8 of one view of one image; any number of threads may ask at once."""
        generator = torch.Generator().manual_seed(image_seed(self.seed, view, index))
        return self.transform.pixels(self.pictures.open(self.items[index].impath), generator)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | int]:
        view, index = key
        image = self.transform.normalized(self.pixels(view, index))
        return {"img": image, "label": self.items[index].label, "index": index}


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

    def __init__(self, size: int, batch_size: int, seed: int, train: bool, ranks: Sharing = ONE, views: int = 0) -> None:
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


def opener_of(cfg: CfgNode) -> Opener:
    """How the pictures of ``cfg.DATASET`` are read: one's own as a person sees them, a paper's as upstream reads them."""
    return open_picture if own_kind(cfg.DATASET.NAME) else open_as_upstream


def load_data(cfg: CfgNode, trains: bool = True) -> DataSplit:
    """What ``cfg.DATASET`` names, as a run sees it; ``trains``: whether it reads the training images."""
    node = cfg.DATASET
    return load_dataset(node.NAME, node.ROOT, node.NUM_SHOTS, image_seed_of(cfg), node.SUBSAMPLE_CLASSES, trains)


def part_of(cfg: CfgNode, data: DataSplit, split: str) -> Sequence[Datum]:
    """The images of one part of the data, "train", "val" or "test".

    Raises:
        InputError: it has none.
    """
    items = getattr(data, split)
    if not items:
        ways = {
            "train": "--eval-only tests prompts that are there",
            "val": "TEST.FINAL_MODEL last_step and TEST.SPLIT test need none",
            "test": "TEST.SPLIT val tests on what is there to choose on, TEST.NO_TEST True on nothing",
        }
        counts = f"{len(data.train):,} / {len(data.val):,} / {len(data.test):,} (train / val / test)"
        raise InputError(
            f"data set {cfg.DATASET.NAME!r}: expected images in its {split} part, it has none, but {counts}; {ways[split]}"
        )
    return items


def build_loader(
    cfg: CfgNode, items: Sequence[Datum], train: bool, pin_memory: bool = False, pixels: bool = True, ranks: Sharing = ONE
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
    if not 0 <= cfg.DATALOADER.NUM_WORKERS <= MOST_WORKERS:
        raise InputError(f"DATALOADER.NUM_WORKERS: expected an integer, 0 to {MOST_WORKERS}, got {cfg.DATALOADER.NUM_WORKERS}")
    workers = cfg.DATALOADER.NUM_WORKERS if pixels else 0
    kept = 0 if workers else DECODED_BYTES  # or each worker would keep its own
    images = ImageDataset(items, build_transform(cfg, train), image_seed_of(cfg), kept, opener_of(cfg))
    return DataLoader(
        images if pixels else Labels(items),
        batch_sampler=EpochBatches(len(items), batch_size, cfg.SEED, train, ranks, cfg.INPUT.VIEWS),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader's own seed for its workers, not the run's stream
    )


def ahead(make: Callable[[Item], Made], batches: Iterable[Sequence[Item]], threads: int) -> Iterator[list[Made]]:
    """What ``make`` gives of each batch, made by ``threads`` threads while the caller has the batch before."""
    pool, waiting = ThreadPoolExecutor(threads), deque[list[Future[Made]]]()
    try:
        for batch in batches:
            waiting.append([pool.submit(make, item) for item in batch])
            if len(waiting) > BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(images: ImageDataset, batches: Sequence[Sequence[tuple[int, int]]], threads: int) -> Iterator[Tensor]:
    """Each batch of (view, index) as (B, 3, H, W) float32, made ahead.

    Pillow computes without Python's lock, and an image's draws are its own: the number of threads changes no bit.
    """
    for parts in ahead(lambda key: images.pixels(*key), batches, threads):
        yield images.transform.normalized(torch.stack(parts))
