"""Tiny random CLIPs in OpenAI's architecture: real vocabulary (so that the tokenizer works), everything else small."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from plpp_reg.clip.load import freeze, from_weights, openai_clip

VOCABULARY, CONTEXT_LENGTH = 49408, 77


def make_clip(
    width: int = 128,
    layers: int = 3,
    *,
    resnet: bool = False,
    embed_dim: int = 32,
    vision_layers: int = 2,
    vision_width: int = 64,
    image_resolution: int = 32,
    patch_size: int = 16,
    context_length: int = CONTEXT_LENGTH,
    seed: int = 0,
) -> nn.Module:
    """A frozen float32 ``clip.model.CLIP`` with random weights; the global random stream is left as it was.

    ``resnet``: a ModifiedResNet with one block a stage instead of a ViT; vision_layers, vision_width and patch_size are the
    ViT's then and are ignored.
    """
    vision = ((1, 1, 1, 1), 8, None) if resnet else (vision_layers, vision_width, patch_size)
    return freeze(from_weights(_weights(embed_dim, image_resolution, *vision, context_length, width, layers, seed=seed)))


@functools.lru_cache(maxsize=8)  # most of a model is its vocabulary, and drawing that takes longest
def _weights(*sizes: Any, seed: int) -> dict[str, torch.Tensor]:
    *others, width, layers = sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = openai_clip().model.CLIP(*others, VOCABULARY, width, width // 64, layers)
        # OpenAI's initial biases are 0, norms 1 and the ResNet's branches closed: a mix-up of those would not show.
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                    module.weight.normal_(1, 0.1)
                    module.bias.normal_(0, 0.1)
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
                if isinstance(module, nn.MultiheadAttention):
                    module.in_proj_bias.normal_(0, 0.1)
                    module.out_proj.bias.normal_(0, 0.1)
    return model.state_dict()
