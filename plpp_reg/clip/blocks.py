"""A residual attention block of CLIP's towers, over the stock modules: few, large operations, whatever is read of it.

Works on the blocks of openai-clip (``ln_1, attn, ln_2, mlp`` with ``nn.MultiheadAttention`` weights), of either tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUICK_GELU = 1.702  # x * sigmoid(1.702 x), OpenAI's activation


def attend(block: nn.Module, x: Tensor, mask: Tensor | None = None, rows: int | None = None) -> Tensor:
    """Attention of the first ``rows`` positions to all that they see, before the output map: (N, L, D) -> (N, rows, D).

    Args:
        block: the block.
        x: its input, N sequences.
        mask: (N or 1, 1, L, L), added to the scores; None: every position sees every other.
        rows: None: all L.
    """
    attn, d = block.attn, x.shape[-1]
    y = block.ln_1(x)
    if rows is None or rows == x.shape[1]:
        q, k, v = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    else:
        q = F.linear(y[:, :rows], attn.in_proj_weight[:d], attn.in_proj_bias[:d])
        k, v = F.linear(y, attn.in_proj_weight[d:], attn.in_proj_bias[d:]).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def residual(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """What follows attention in a block, row by row: x, attended (..., D) -> (..., D).

    QuickGELU is ``y sigmoid(a y) = silu(a y) / a`` with a = 1.702. Both factors become part of the linear maps' products and
    of the sum, so that an MLP is three operations instead of five, and autograd keeps one tensor (..., 4 D) instead of three.
    """
    x = x + block.attn.out_proj(attended)
    y, mlp = block.ln_2(x), block.mlp
    if not _is_stock(mlp):
        return x + mlp(y)
    wide = torch.addmm(mlp.c_fc.bias, y.flatten(0, -2), mlp.c_fc.weight.t(), beta=QUICK_GELU, alpha=QUICK_GELU)
    out = torch.addmm(mlp.c_proj.bias, F.silu(wide), mlp.c_proj.weight.t(), beta=QUICK_GELU)
    return torch.add(x, out.view(x.shape), alpha=1 / QUICK_GELU)


def _is_stock(mlp: nn.Module) -> bool:
    """Whether it is two linear maps around QuickGELU, unchanged: open_clip's may have nn.GELU, others adapters or hooks."""
    maps = (mlp.c_fc, mlp.c_proj)
    plain = all(type(m) is nn.Linear and not (m._forward_hooks or m._forward_pre_hooks) for m in maps)
    return plain and type(mlp.gelu).__name__ == "QuickGELU"
