"""Prompts of the image tower and of the layers below the first, by the names under which upstream's checkpoints hold them."""

from __future__ import annotations

import torch
from torch import nn

from plpp_reg.clip.vision import ImageTower
from plpp_reg.errors import InputError

STD = 0.02  # of every prompt that starts at random, in either tower


def random_prompt(count: int, width: int) -> nn.Parameter:
    """(count, width) float32, normal with standard deviation 0.02."""
    return nn.Parameter(torch.empty(count, width).normal_(std=STD))


def check_depth(key: str, depth: int, most: int) -> None:
    """A number of layers that have prompts, of the tower's ``most``.

    Raises:
        InputError: there are not so many.
    """
    if depth > most:
        raise InputError(f"{key}: expected an integer <= {most} (the tower's layers), got {depth}")


def register(root: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Make ``parameter`` the entry ``name`` ("a.b.2.c") of root's state_dict."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.register_parameter(leaf, parameter)
    return parameter


def shallow(root: nn.Module, tower: str, depth: int, count: int, width: int) -> list[nn.Parameter]:
    """Random prompts (count, width) of layers 1 to ``depth`` - 1 of a tower, as entries of root's state_dict."""
    names = [f"{tower}.transformer.resblocks.{layer}.VPT_shallow" for layer in range(1, depth)]
    return [register(root, name, random_prompt(count, width)) for name in names]


class VisualPrompts(nn.Module):
    """Prompts of the image tower's first ``depth`` layers, (count, width) each; none where either is 0.

    Raises:
        InputError: the tower has not so many layers, or is no transformer.
    """

    def __init__(self, image_tower: ImageTower, count: int, depth: int, key: str = "PROMPT_DEPTH_VISION") -> None:
        super().__init__()
        self.layers: list[nn.Parameter] = []
        if count and depth:
            check_depth(key, depth, image_tower.depth)
            first = register(self, "image_encoder.VPT", random_prompt(count, image_tower.width))
            self.layers = [first, *shallow(self, "image_encoder", depth, count, image_tower.width)]
