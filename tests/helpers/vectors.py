"""An embedding and context vectors of noise, small enough for loops."""

from __future__ import annotations

import torch
from torch import nn

V, D, M, P = 40, 8, 3, 4


def embedding(dtype=torch.float32, seed=0) -> nn.Embedding:
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, V)[:, None]
    return nn.Embedding.from_pretrained(table.to(dtype), freeze=False)


def states(*prompts: int, dtype=torch.float32, seed=1) -> list[torch.Tensor]:
    """A leaf (P, M, D) for each number of prompts; (M, D) for 0."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*((p,) if p else ()), M, D, generator=g).to(dtype).requires_grad_() for p in prompts]
