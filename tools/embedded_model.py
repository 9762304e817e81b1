"""The embedded backbone's towers, with clip.model's weights, and its next-word loss.

clip.model's own forward runs 77 positions and all patches; these run what is there.
"""

from __future__ import annotations

import torch
from clip.model import CLIP
from embedded_data import RESOLUTION
from torch import Tensor, nn
from torch.nn import functional as F

PATCH, CONTEXT = 8, 77
VISION_WIDTH, VISION_LAYERS, TEXT_WIDTH, TEXT_LAYERS, EMBED = 192, 6, 128, 4, 128


def new_clip(vocabulary: int, text_width: int = TEXT_WIDTH) -> CLIP:
    """A CLIP of the embedded size with random weights, in a compact vocabulary of `vocabulary` tokens."""
    vision = (RESOLUTION, VISION_LAYERS, VISION_WIDTH, PATCH)
    return CLIP(EMBED, *vision, CONTEXT, vocabulary, text_width, text_width // 64, TEXT_LAYERS)


def attend(block: nn.Module, x: Tensor, causal: bool, first_only: bool = False, dropout: float = 0.0) -> Tensor:
    """One residual block. `first_only` computes the first position alone: all that is read of the last.

    `dropout` is that of what the block adds, drawn from torch's global stream.
    """
    n, length, width = x.shape
    heads = block.attn.num_heads
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    q, k, v = qkv.view(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    if first_only:
        q, x = q[:, :, :1], x[:, :1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + F.dropout(block.attn.out_proj(y.transpose(1, 2).reshape(n, -1, width)), dropout)
    return x + F.dropout(block.mlp(block.ln_2(x)), dropout)


def image_features(model: CLIP, x: Tensor, g: torch.Generator | None = None, dropped: float = 0.0) -> Tensor:
    """Unit image features; with `dropped`, from a random part of each image's patches."""
    v = model.visual
    x = v.conv1(x).flatten(2).transpose(1, 2) + v.positional_embedding[1:]
    n, patches, width = x.shape
    if dropped:
        kept = torch.rand(n, patches, generator=g).argsort(1)[:, : round(patches * (1 - dropped))]
        x = x.gather(1, kept[..., None].expand(-1, -1, width))
    first = (v.class_embedding + v.positional_embedding[0]).expand(n, 1, width)
    x = v.ln_pre(torch.cat([first, x], 1))
    blocks = list(v.transformer.resblocks)
    for block in blocks:
        x = attend(block, x, causal=False, first_only=block is blocks[-1])
    return F.normalize(v.ln_post(x[:, 0]) @ v.proj, dim=-1)


def text_features(model: CLIP, tokens: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Unit text features and all last states. The end token has the largest id, here as in OpenAI's."""
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    for block in model.transformer.resblocks:
        x = attend(block, x, causal=True, dropout=dropout)
    states = model.ln_final(x)
    ends = states[torch.arange(len(tokens)), tokens.argmax(-1)]
    return F.normalize(ends @ model.text_projection, dim=-1), states


def next_word_loss(model: CLIP, tokens: Tensor, states: Tensor) -> Tensor:
    """Mean nats of each next token, by the tied head that PLPP reads: ln_final(x) @ token_embedding.T."""
    target = tokens[:, 1:]
    there = torch.arange(target.shape[1]) < tokens.argmax(-1, keepdim=True)
    return F.cross_entropy(states[:, :-1][there] @ model.token_embedding.weight.T, target[there])


def contrast_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Both ways' mean cross-entropy of (pictures, captions) logits; `true` has 1 where a caption is true of a picture."""
    by_image, by_text = true / true.sum(1, keepdim=True), true / true.sum(0, keepdim=True)
    return -((by_image * logits.log_softmax(1)).sum() + (by_text * logits.log_softmax(0)).sum()) / (2 * len(logits))
