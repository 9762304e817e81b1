"""Pictures to pixels: Dassl's transforms for ``cfg.INPUT``, as torchvision has them, with random draws of one's own.

torchvision's random transforms draw from torch's global stream, which all threads share. Here each takes a generator, and
draws the same numbers in the same order: a picture is what ``torch.manual_seed`` and torchvision's own transforms would give,
to the bit, in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

from plpp_reg.errors import InputError, unknown

if TYPE_CHECKING:
    from yacs.config import CfgNode

Step = Callable[[Image.Image, Generator | None], Image.Image]  # objects that can be pickled: loaders' workers get them

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
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
RATIO = (3 / 4, 4 / 3)  # of width to height of a random resized crop
LOG_RATIO = tuple(torch.log(torch.tensor(RATIO)).tolist())  # in float32, as torchvision has it
ATTEMPTS = 10  # at a crop that fits


class Transform:
    """A picture of any size and mode to an image of one size: pixels first, then, any number at once, what CLIP expects."""

    def __init__(self, steps: Sequence[Step], mean: Sequence[float], std: Sequence[float]) -> None:
        self.steps = list(steps)
        self.mean, self.std = (torch.tensor(list(values), dtype=torch.float32).view(3, 1, 1) for values in (mean, std))

    def pixels(self, image: Image.Image, generator: Generator | None = None) -> Tensor:
        """(3, H, W) uint8; where the transform draws, the draws are the generator's."""
        image = rgb(image)
        for step in self.steps:
            image = step(image, generator)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def normalized(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> float32, contiguous."""
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(self.mean).div_(self.std)

    def __call__(self, image: Image.Image, generator: Generator | None = None) -> Tensor:
        """(3, H, W) float32."""
        return self.normalized(self.pixels(image, generator))


def build_transform(cfg: CfgNode, train: bool) -> Transform:
    """Dassl's transforms for ``cfg.INPUT``, for pictures to train on, or else to test on.

    Raises:
        InputError: a key of ``cfg.INPUT`` has a value that it cannot have.
    """
    inp = cfg.INPUT
    if inp.INTERPOLATION not in INTERPOLATIONS:
        raise unknown("INPUT.INTERPOLATION", inp.INTERPOLATION, INTERPOLATIONS)
    mode, size, names = INTERPOLATIONS[inp.INTERPOLATION], tuple(inp.SIZE), tuple(inp.TRANSFORMS)
    for key, length in (("SIZE", 2), ("PIXEL_MEAN", 3), ("PIXEL_STD", 3), ("RRCROP_SCALE", 2)):
        if len(inp[key]) != length:
            raise InputError(f"INPUT.{key}: expected {length} numbers, got {inp[key]!r}")
    if inp.VIEWS < 0:
        raise InputError(f"INPUT.VIEWS: expected an integer >= 0 (0: a new view each epoch), got {inp.VIEWS}")
    if not min(inp.PIXEL_STD) > 0:
        raise InputError(f"INPUT.PIXEL_STD: expected numbers > 0, got {inp.PIXEL_STD!r}")
    if not 0 < inp.RRCROP_SCALE[0] <= inp.RRCROP_SCALE[1]:
        raise InputError(f"INPUT.RRCROP_SCALE: expected 0 < low <= high, got {inp.RRCROP_SCALE!r}")
    for name in names:
        if name not in TRAIN_TRANSFORMS:
            raise unknown("INPUT.TRANSFORMS", name, TRAIN_TRANSFORMS)
    if "normalize" not in names:
        raise InputError(f"INPUT.TRANSFORMS: expected 'normalize' among them, which CLIP needs, got {list(names)}")
    if not train:
        return Transform([CentreCrop(size, mode)], inp.PIXEL_MEAN, inp.PIXEL_STD)
    made = {
        "random_crop": lambda: RandomCrop(size, inp.CROP_PADDING),
        "random_resized_crop": lambda: RandomResizedCrop(size, tuple(inp.RRCROP_SCALE), mode),
        "random_flip": RandomFlip,
        "colorjitter": lambda: ColorJitter(inp.COLORJITTER_B, inp.COLORJITTER_C, inp.COLORJITTER_S, inp.COLORJITTER_H),
        "randomgrayscale": lambda: RandomGrayscale(inp.RGS_P),
    }
    cropped = "random_crop" in names or "random_resized_crop" in names
    steps: list[Step] = [] if cropped else [Resize(size, mode)]
    for name in TRAIN_TRANSFORMS:
        if name in names and name in made:
            try:
                steps.append(made[name]())
            except ValueError as e:
                raise InputError(f"INPUT: {name} ({name.upper()}_…): {e}") from e
    return Transform(steps, inp.PIXEL_MEAN, inp.PIXEL_STD)


def rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _uniform(low: float, high: float, generator: Generator) -> Tensor:
    return torch.empty(1).uniform_(low, high, generator=generator)


def _integer(below: int, generator: Generator) -> int:
    return int(torch.randint(0, below, (1,), generator=generator))


def _happens(p: float, generator: Generator) -> bool:
    return bool(torch.rand(1, generator=generator) < p)


@dataclass(frozen=True)
class Resize:
    """To ``size`` (height, width), whatever the picture's shape."""

    size: tuple[int, int]
    mode: Image.Resampling

    def __call__(self, image: Image.Image, generator: Generator | None) -> Image.Image:
        return image.resize(self.size[::-1], self.mode)


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side resized to the longer one of ``size`` (height, width), then its centre."""

    size: tuple[int, int]
    mode: Image.Resampling

    def __call__(self, image: Image.Image, generator: Generator | None) -> Image.Image:
        height, width = self.size
        shorter = max(self.size)
        longer = int(shorter * max(image.size) / min(image.size))
        resized = image.resize((shorter, longer) if image.width <= image.height else (longer, shorter), self.mode)
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        return resized.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class RandomResizedCrop:
    """A part of the image's area and of RATIO, each drawn, at a drawn place, resized to ``size`` (height, width)."""

    size: tuple[int, int]
    scale: tuple[float, float]
    mode: Image.Resampling

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        left, top, width, height = self.draw(*image.size, generator)
        return image.crop((left, top, left + width, top + height)).resize(self.size[::-1], self.mode)

    def draw(self, width: int, height: int, generator: Generator) -> tuple[int, int, int, int]:
        """Left, top, width and height of the part."""
        area = width * height
        for _ in range(ATTEMPTS):
            target = area * _uniform(*self.scale, generator).item()
            ratio = torch.exp(_uniform(*LOG_RATIO, generator)).item()
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = _integer(height - h + 1, generator)
                return _integer(width - w + 1, generator), top, w, h
        w, h = width, height  # none fits: the largest of an allowed ratio, from the centre
        if width / height < RATIO[0]:
            h = round(width / RATIO[0])
        elif width / height > RATIO[1]:
            w = round(height * RATIO[1])
        return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class RandomCrop:
    """``size`` (height, width) of the picture, black around it by ``padding``, at a drawn place."""

    size: tuple[int, int]
    padding: int

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        height, width = self.size
        image = ImageOps.expand(image, self.padding)
        if image.height < height or image.width < width:
            raise InputError(
                f"INPUT.TRANSFORMS: random_crop of {width} x {height} pixels: expected images of at least that size with "
                f"CROP_PADDING, got {image.width} x {image.height}"
            )
        if (image.height, image.width) == self.size:
            return image
        top = _integer(image.height - height + 1, generator)
        left = _integer(image.width - width + 1, generator)
        return image.crop((left, top, left + width, top + height))


class RandomFlip:
    """Left for right, one time of two."""

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if _happens(0.5, generator) else image


class ColorJitter:
    """Brightness, contrast, saturation and hue changed by drawn factors, in a drawn order.

    Raises:
        ValueError: a range is not one.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        from torchvision import transforms  # late: it is slow to import, and most recipes do not need it

        checked = transforms.ColorJitter(brightness, contrast, saturation, hue)
        self.ranges = (checked.brightness, checked.contrast, checked.saturation, checked.hue)

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        from torchvision.transforms import functional as F

        changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        order = torch.randperm(4, generator=generator).tolist()
        factors = [None if r is None else _uniform(*r, generator).item() for r in self.ranges]
        for k in order:
            if factors[k] is not None:
                image = changes[k](image, factors[k])
        return image


@dataclass(frozen=True)
class RandomGrayscale:
    """Grey with probability ``p``."""

    p: float

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        return rgb(image.convert("L")) if _happens(self.p, generator) else image
