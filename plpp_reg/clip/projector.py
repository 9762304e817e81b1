"""A projector of image features into another model's, by the names under which PromptKD's checkpoints hold it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(nn.Module):
    """Batch norm over rows, as nn.BatchNorm2d saves it, but for its count of batches, which computes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, training: bool) -> Tensor:
        """(B, width) -> (B, width): by the batch's own statistics in training, which then move the running ones by a tenth."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training)


class Projector(nn.Module):
    """Linear, batch norm, ReLU, linear (arXiv 2403.02781): two 1x1 convolutions in shape and in their weights' start.

    Args:
        inputs: width of the features that come in.
        outputs: width of those that go out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = nn.Conv2d(inputs, outputs, 1), BatchNorm(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 1)
        self.conv1 = nn.Sequential(*layers)

    def forward(self, features: Tensor, training: bool) -> Tensor:
        """(B, inputs), not normalised -> (B, outputs), not normalised. ``training``: as :class:`BatchNorm` has it."""
        first, norm, relu, last = self.conv1
        x = norm(F.linear(features, first.weight.flatten(1), first.bias), training)
        return F.linear(relu(x), last.weight.flatten(1), last.bias)
