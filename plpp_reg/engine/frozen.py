"""Frozen image encoders: each computes and describes itself, so that what is kept of one is never served to another."""

from __future__ import annotations

import functools
import hashlib
import inspect
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from plpp_reg.clip.vision import ImageTower
from plpp_reg.errors import InputError


def normalize(features: Tensor) -> Tensor:
    """Unit length, in float32: a cosine in half precision, times CLIP's scale of 100, moves in steps of a tenth."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


class FrozenEncoder:
    """The frozen image tower of a CLIP: images (B, 3, H, W) -> normalised features (B, width).

    Its features are kept (plpp_reg/engine/features.py) under all that their bits depend on: what an encoder depends on is
    its :attr:`key`. A subclass that computes something else defines :meth:`encode` and :attr:`key` both, and the class is
    refused where it does not; its name and its file's content join what it says.

    Raises:
        TypeError: a subclass that defines one of the two alone.
    """

    #: keys of ``cfg.INPUT`` that its images need otherwise than the run's have them: SIZE, PIXEL_MEAN, PIXEL_STD
    input: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, tower: ImageTower) -> None:
        self.tower = tower

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "encode" in vars(cls) and "key" not in vars(cls):
            raise TypeError(f"{cls.__name__}: expected a key beside its encode(): features are kept by it")

    @property
    def width(self) -> int:
        """Of the features."""
        return self.tower.visual.output_dim

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width), normalised."""
        return normalize(self.tower(images))

    @property
    def key(self) -> dict[str, Any]:
        """What :meth:`encode` depends on, as JSON has it: the weights, and whatever else is not its code."""
        return {"weights": weights_sha256(self.tower.visual)}

    def described(self) -> dict[str, Any]:
        """:attr:`key`, and of a subclass which code it is.

        Raises:
            InputError: :meth:`encode` is replaced on the object itself, which no key tells.
        """
        if "encode" in vars(self):
            raise InputError(f"{type(self).__name__}: expected a subclass with its own encode and key, got another encode")
        cls = type(self)
        if cls is FrozenEncoder:
            return self.key
        return {**self.key, "encoder": f"{cls.__module__}.{cls.__qualname__}", "code": code_sha256(cls, FrozenEncoder)}


def code_sha256(cls: type, base: type) -> list[str]:
    """Of the files that define a class and those between it and ``base``; without one it is another code in each process."""
    return [_file_sha256(c) for c in cls.__mro__[: cls.__mro__.index(base)]]


@functools.cache
def _file_sha256(cls: type) -> str:
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return secrets.token_hex(16)


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's tensors and of what they do not tell (activations, heads); made again when a tensor has changed."""
    tensors = [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in module.state_dict().values()]
    seen = (tensors, repr(module), [m.num_heads for m in module.modules() if hasattr(m, "num_heads")])
    if module.__dict__.get("_plpp_sha256", (None,))[0] != seen:
        module.__dict__["_plpp_sha256"] = (seen, tensors_sha256(module.state_dict(), str(seen[1:])))
    return str(module.__dict__["_plpp_sha256"][1])


def tensors_sha256(tensors: Mapping[str, Tensor], beside: str = "") -> str:
    """Hash of tensors and their names, in whatever order, and of a text beside them."""
    digest = hashlib.sha256(beside.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
