"""Pictures to pixels: to the bit what torchvision's own transforms make, in any thread, from an image's own draws."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from plpp_reg.data import Datum
from plpp_reg.data.augmentation import TRAIN_TRANSFORMS, build_transform
from plpp_reg.data.loaders import ImageDataset, Pictures, image_seed, read_ahead
from plpp_reg.errors import InputError

from helpers import engine as helpers

MODES = {
    "bilinear": T.InterpolationMode.BILINEAR,
    "bicubic": T.InterpolationMode.BICUBIC,
    "nearest": T.InterpolationMode.NEAREST,
}
SIZES = [(43, 37), (37, 43), (32, 32), (90, 20), (20, 90), (1, 60), (200, 3), (64, 64), (224, 160)]  # width, height
NAMES = [
    ("random_resized_crop", "random_flip"),
    ("random_resized_crop", "random_flip", "colorjitter", "randomgrayscale"),
    ("random_crop", "random_flip"),
    ("random_flip",),
    ("colorjitter",),
    ("randomgrayscale",),
    ("center_crop",),
    (),
]


def torchvisions(cfg, train: bool) -> T.Compose:
    """The same transforms by torchvision's own classes, which draw from torch's global stream."""
    inp, mode, size = cfg.INPUT, MODES[cfg.INPUT.INTERPOLATION], tuple(cfg.INPUT.SIZE)
    end = [T.ToTensor(), T.Normalize(inp.PIXEL_MEAN, inp.PIXEL_STD)]
    if not train:
        return T.Compose([T.Resize(max(size), interpolation=mode), T.CenterCrop(size), *end])
    made = {
        "random_crop": T.RandomCrop(size, padding=inp.CROP_PADDING),
        "random_resized_crop": T.RandomResizedCrop(size, scale=tuple(inp.RRCROP_SCALE), interpolation=mode),
        "random_flip": T.RandomHorizontalFlip(),
        "colorjitter": T.ColorJitter(inp.COLORJITTER_B, inp.COLORJITTER_C, inp.COLORJITTER_S, inp.COLORJITTER_H),
        "randomgrayscale": T.RandomGrayscale(p=inp.RGS_P),
    }
    crops = {"random_crop", "random_resized_crop"} & set(inp.TRANSFORMS)
    steps = [] if crops else [T.Resize(size, interpolation=mode)]
    return T.Compose([*steps, *(made[name] for name in TRAIN_TRANSFORMS if name in inp.TRANSFORMS and name in made), *end])


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def theirs(transform: T.Compose, image: Image.Image, seed: int) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", NAMES, ids=lambda names: "-".join(names) or "none")
def test_training_pictures_are_torchvisions_to_the_bit(names: tuple[str, ...], mode: str) -> None:
    opts = ("INPUT.TRANSFORMS", (*names, "normalize"), "INPUT.INTERPOLATION", mode, "INPUT.SIZE", (24, 18))
    cfg = helpers.make_cfg(*opts, "INPUT.CROP_PADDING", 20, "INPUT.RGS_P", 0.5)
    ours, literal = build_transform(cfg, train=True), torchvisions(cfg, train=True)
    seen = set()
    for number in range(8):
        for size in SIZES:
            image, seed = picture(size, number), image_seed(1, number, size[0])
            got = ours(image, torch.Generator().manual_seed(seed))
            assert torch.equal(got, theirs(literal, image, seed)), (size, number)
            assert got.is_contiguous() and got.dtype == torch.float32
            seen.add(got.sum().item())
    assert len(seen) > 8


@pytest.mark.parametrize(("low", "high"), [(0.08, 1.0), (0.9, 1.0), (1.0, 1.0), (0.001, 0.002)])
def test_crops_of_any_scale_are_torchvisions_to_the_bit(low: float, high: float) -> None:
    """Also where no attempt fits the picture, and the largest part of an allowed ratio is taken instead."""
    cfg = helpers.make_cfg("INPUT.RRCROP_SCALE", (low, high))
    ours, literal = build_transform(cfg, train=True), torchvisions(cfg, train=True)
    for seed in range(40):
        for size in SIZES:
            image = picture(size, seed)
            assert torch.equal(ours(image, torch.Generator().manual_seed(seed)), theirs(literal, image, seed)), (size, seed)


def test_a_crop_is_the_same_part_at_any_size() -> None:
    """So a teacher at another size sees what its student sees, and no box is kept. Red is where right is, green where below."""
    ramp = np.linspace(0, 255, 200)
    where = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200))], -1)
    image = Image.fromarray(where.round().astype(np.uint8))
    opts = ("INPUT.TRANSFORMS", ("random_resized_crop", "random_flip", "normalize"), "INPUT.RRCROP_SCALE", (0.08, 1.0))
    small, large = (build_transform(helpers.make_cfg(*opts, "INPUT.SIZE", (s, s)), train=True) for s in (48, 224))
    for seed in range(50):
        parts = [t.pixels(image, torch.Generator().manual_seed(seed)).float() for t in (small, large)]
        for statistic in (lambda t: t.mean((1, 2)), lambda t: t[:, :, :1].mean((1, 2)) - t[:, :, -1:].mean((1, 2))):
            assert (statistic(parts[0]) - statistic(parts[1])).abs().max() < 6, seed


@pytest.mark.parametrize("size", [(32, 32), (24, 18), (18, 24), (31, 33)])
def test_pictures_to_test_on_are_torchvisions_to_the_bit(size: tuple[int, int]) -> None:
    cfg = helpers.make_cfg("INPUT.SIZE", size)
    ours, literal = build_transform(cfg, train=False), torchvisions(cfg, train=False)
    for number, shape in enumerate(SIZES):
        assert torch.equal(ours(picture(shape, number)), literal(picture(shape, number))), shape


def test_a_data_set_can_be_sent_to_a_worker_that_is_a_fresh_process(tmp_path: Path) -> None:
    images = dataset(tmp_path)
    sent = pickle.loads(pickle.dumps(images))
    assert torch.equal(sent[2, 3]["img"], images[2, 3]["img"])


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    cfg = helpers.make_cfg("INPUT.TRANSFORMS", ("random_crop", "normalize"))
    with pytest.raises(InputError, match=r"random_crop of 32 x 32 .* got 28 x 48"):
        build_transform(cfg, train=True)(picture((20, 40), 0), torch.Generator())


def dataset(tmp_path: Path, max_bytes: int = 0, count: int = 24) -> ImageDataset:
    items = []
    for i in range(count):
        picture(SIZES[i % len(SIZES)], i).save(tmp_path / f"{i}.png")
        items.append(Datum(str(tmp_path / f"{i}.png"), 0, "cat", f"{i}.png"))
    names = ("random_resized_crop", "random_flip", "colorjitter", "randomgrayscale", "normalize")
    return ImageDataset(items, build_transform(helpers.make_cfg("INPUT.TRANSFORMS", names), True), 1, max_bytes)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_read_ahead_are_the_single_images_for_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    images = dataset(tmp_path, max_bytes=2**20)
    keys = [[(view, i) for i in range(start, min(start + 7, len(images)))] for view in range(3) for start in (0, 7, 14, 21)]
    alone = [torch.stack([images[key]["img"] for key in batch]) for batch in keys]
    before = torch.get_rng_state()
    found = list(read_ahead(images, keys, threads))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == len(alone) and all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_threads_do_not_share_their_draws(tmp_path: Path) -> None:
    images = dataset(tmp_path)
    keys = [(view, i) for view in range(8) for i in range(len(images))]
    alone = [images.pixels(*key) for key in keys]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda key: images.pixels(*key), keys))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_picture_that_cannot_be_read_ends_reading_ahead_with_its_name(tmp_path: Path) -> None:
    images = dataset(tmp_path)
    Path(images.items[9].impath).write_bytes(b"not a picture")
    reading = read_ahead(images, [[(0, i) for i in range(k, k + 4)] for k in range(0, 24, 4)], 2)
    with pytest.raises(InputError, match=r"image .*9\.png: expected a readable picture"):
        list(reading)


def test_small_pictures_are_decoded_once_and_large_ones_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        picture((10, 10 + i // 2), i).save(path)
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kw: opened.append(path) or original(path, **kw))
    pictures = Pictures(largest=300)
    for _ in range(2):
        for path in paths:
            pictures.open(str(path))
    assert opened == [*map(str, paths), str(paths[2])]
    picture((10, 10), 7).save(paths[0])  # a changed file is another picture
    assert np.array_equal(np.asarray(pictures.open(str(paths[0]))), np.asarray(picture((10, 10), 7)))


def test_decoded_pictures_are_kept_where_all_of_them_fit(tmp_path: Path) -> None:
    images = dataset(tmp_path)
    largest = 3 * max(width * height for width, height in SIZES)
    assert dataset(tmp_path, largest * len(images)).pictures.largest == largest
    assert images.pictures.largest == 0
