"""What a run computes with: its precision on its device, a backbone that fits its configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from plpp_reg.clip.load import PRECISIONS
from plpp_reg.errors import InputError, unknown


def precision_on(device: torch.device, key: str, asked: str, say: Callable[[str], None]) -> str:
    """The PREC that is computed in where ``key`` asks for one: what a CPU has no use for becomes something else, and is said.

    Raises:
        InputError: there is no such precision.
    """
    if asked not in PRECISIONS:
        raise unknown(key, asked, PRECISIONS)
    if asked in ("fp32", "bf16") or device.type == "cuda":
        return asked
    if asked == "fp16":
        say("PREC fp16 needs a GPU: computing in fp32 on this CPU")
        return "fp32"
    if asked == "amp":
        say("PREC amp on this CPU is autocast to bfloat16, without loss scaling")
    return asked


@contextlib.contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast where the precision is amp; nothing otherwise, the weights' own dtype rules then."""
    if precision != "amp":
        yield
        return
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype):
        yield


def check_precision(clip_model: nn.Module, key: str, precision: str) -> None:
    """Whether a model that was given computes in what the run asks for, or in float64; one without weights is told later.

    Raises:
        InputError: its weights are of another type.
    """
    weight, wanted = clip_model.text_projection, PRECISIONS[precision]
    if weight.dtype not in (wanted, torch.float64) and not weight.is_meta:
        raise InputError(f"{key} {precision}: expected a CLIP with weights in {wanted}, got {weight.dtype}")


def check_input(cfg: CfgNode, clip_model: nn.Module) -> None:
    """Whether images come as the backbone was trained to see them.

    Raises:
        InputError: another size, or normalised otherwise.
    """
    backbone, resolution = cfg.MODEL.BACKBONE.NAME, clip_model.visual.input_resolution
    if tuple(cfg.INPUT.SIZE) != (resolution, resolution):
        raise InputError(
            f"INPUT.SIZE: expected {(resolution, resolution)} for backbone {backbone!r}, got {tuple(cfg.INPUT.SIZE)}"
        )
    if getattr(clip_model, "pixel_mean", None):  # open_clip's models say how their images are normalised
        for key in ("PIXEL_MEAN", "PIXEL_STD"):
            wanted = list(getattr(clip_model, key.lower()))
            if not np.allclose(wanted, cfg.INPUT[key], atol=1e-4):
                raise InputError(f"INPUT.{key}: expected {wanted} for backbone {backbone!r}, got {cfg.INPUT[key]}")
