"""Prompts of the layers below the first, by the names under which upstream's checkpoints hold them."""

from __future__ import annotations

import torch
from torch import nn

from plpp_reg.errors import InputError

STD = 0.02  # of every prompt that starts at random, in either tower


def random_prompt(count: int, width: int) -> nn.Parameter:
    """(count, width) float32, normal with standard deviation 0.02."""
    return nn.Parameter(torch.empty(count, width).normal_(std=STD))


def check_prompts(key: str, value: int, most: int | None = None) -> None:
    """A number of prompts, or of layers that have some, of which there are at most ``most``.

    Raises:
        InputError: it is below 1 or above ``most``.
    """
    if value < 1 or (most is not None and value > most):
        upper = f" and <= {most} (the tower's layers)" if most is not None else ""
        raise InputError(f"{key}: expected an integer >= 1{upper}, got {value}")


def register(root: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Make ``parameter`` the entry ``name`` ("a.b.2.c") of root's state_dict."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.register_parameter(leaf, parameter)
    return parameter
