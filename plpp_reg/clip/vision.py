"""The image tower: CLIP's own weights, with visual prompts at the input and at the entry of deeper layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plpp_reg.clip.blocks import attend, residual
from plpp_reg.errors import InputError


class ImageTower(nn.Module):
    """Encodes images through the image tower of a CLIP model, in the dtype of its weights; holds nothing of its own.

    A vision transformer runs on the stock modules (``conv1, class_embedding, positional_embedding, ln_pre, transformer``,
    ``ln_post, proj``). Only the class token is read of the last layer, so only its row is computed there. A ModifiedResNet
    runs as it is, and takes no prompts.

    Args:
        clip_model: a model as :func:`plpp_reg.clip.load.load_clip` returns it.
    """

    def __init__(self, clip_model: nn.Module) -> None:
        super().__init__()
        self.visual = clip_model.visual

    @property
    def is_transformer(self) -> bool:
        return hasattr(self.visual, "class_embedding")

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @property
    def width(self) -> int:
        """Width of the visual prompts."""
        self.require_transformer()
        return self.visual.class_embedding.shape[0]

    @property
    def depth(self) -> int:
        """Number of layers: prompts can be given to as many."""
        self.require_transformer()
        return len(self.visual.transformer.resblocks)

    def require_transformer(self) -> None:
        """
        Raises:
            InputError: the image tower is a ResNet.
        """
        if not self.is_transformer:
            raise InputError("visual prompts: expected a backbone with a vision transformer (ViT-…), got a ResNet")

    def forward(self, images: Tensor, prompts: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        """(B, 3, H, W) -> (B, embed_dim), not normalised.

        Args:
            images: preprocessed images.
            prompts: (M, width) rows that are appended after the patches, with no position, before ``ln_pre``.
            deep: for layers 1, 2, ...: (M, width) rows that replace them at the layer's entry (VPT, arXiv 2203.12119).

        Raises:
            InputError: ``deep`` without ``prompts``, whose rows it would replace; prompts for a ResNet.
        """
        if deep and prompts is None:
            raise InputError(f"prompts: expected rows that deep prompts of {len(deep)} layers replace, got None")
        images = images.to(self.dtype)
        if prompts is None:
            return self._transformer(images) if self.is_transformer else self.visual(images)
        self.require_transformer()
        return self._transformer(images, prompts, deep)

    def _transformer(self, images: Tensor, prompts: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        v = self.visual
        patches = v.conv1(images).flatten(2).transpose(1, 2)  # B, patches, width
        first = v.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([first, patches], 1) + v.positional_embedding.to(patches.dtype)
        if prompts is not None:
            x = torch.cat([x, _for_each_image(prompts, x)], 1)
        x = v.ln_pre(x)
        last = len(v.transformer.resblocks) - 1
        for layer, block in enumerate(v.transformer.resblocks):
            if 0 < layer <= len(deep):
                rows = deep[layer - 1]
                x = torch.cat([x[:, : -len(rows)], _for_each_image(rows, x)], 1)
            rows = 1 if layer == last else x.shape[1]
            x = residual(block, x[:, :rows], attend(block, x, rows=rows))
        x = v.ln_post(x[:, 0])
        return x if v.proj is None else x @ v.proj


def _for_each_image(rows: Tensor, x: Tensor) -> Tensor:
    """(M, width) -> (B, M, width) in x's dtype."""
    return rows.to(x.dtype).expand(x.shape[0], -1, -1)
