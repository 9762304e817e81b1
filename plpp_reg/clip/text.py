"""The exact fast text tower: CLIP's own weights, one masked pass over the positions that are read.

The literal tower runs all 77 positions of all C prompts. Here (docs/method.md tells why each step is exact):

1. nothing after a prompt's EOT is computed;
2. prompts are paths in a prefix tree: what they share at their beginning stands once in a chunk of rows;
3. a layer is one attention over K equal chunks, under a mask that says "ancestors and self";
4. in the last layer only the rows that are read pass its maps: EOT, and the states beside context vectors.

(The fifth, encoding the classes once a model state in evaluation, is the trainer's.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plpp_reg.clip.blocks import attend, residual
from plpp_reg.clip.tree import Chunks, PromptTree
from plpp_reg.errors import InputError


class TextOutput(NamedTuple):
    """``features`` (G, C, embed_dim), not normalised; ``hidden`` (G * P, M, D), or None where it was not asked for.

    ``context``: of a prompt learner, the vectors beside which ``hidden`` was read.
    """

    features: Tensor
    hidden: Tensor | None
    context: Tensor | None = None


class TextTower(nn.Module):
    """Runs a :class:`~plpp_reg.clip.tree.PromptTree` through the text transformer of a CLIP model.

    Works on the stock modules of openai-clip (``transformer.resblocks`` of ``ln_1, attn, ln_2, mlp`` with
    ``nn.MultiheadAttention`` weights, ``positional_embedding``, ``ln_final``, ``text_projection``), of any width and depth,
    in the dtype of its weights, and holds nothing of its own.

    Args:
        clip_model: a model as :func:`plpp_reg.clip.load.load_clip` returns it.
        memory_mib: bound on what the chunks keep for the backward pass, in MiB (an estimate); prompts beyond it are
            computed in parts, each again in backward.

    >>> from plpp_reg.clip.load import load_clip
    >>> from plpp_reg.clip.prompts import PromptLearner
    >>> model = load_clip()
    >>> prompts, tower = PromptLearner(model, ["cat", "hot air balloon"], n_ctx=4), TextTower(model)
    >>> output = prompts(tower)  # one pass
    >>> output.features.shape, output.hidden.shape  # (C, embed_dim), (P, M, D)
    (torch.Size([2, 128]), torch.Size([1, 4, 128]))
    """

    def __init__(self, clip_model: nn.Module, memory_mib: float = 1024) -> None:
        super().__init__()
        self.resblocks = clip_model.transformer.resblocks
        self.token_embedding = clip_model.token_embedding
        self.positional_embedding = clip_model.positional_embedding
        self.ln_final = clip_model.ln_final
        self.text_projection = clip_model.text_projection
        self.memory_mib = memory_mib

    @property
    def dtype(self) -> torch.dtype:
        return self.resblocks[0].attn.in_proj_weight.dtype

    def max_rows(self, groups: int = 1) -> int:
        """How many positions fit the memory bound, ``groups`` contexts at once."""
        width = self.ln_final.weight.shape[0]
        kept = 12 * width * len(self.resblocks) * torch.finfo(self.dtype).bits // 8  # bytes a position, measured
        return max(1, int(self.memory_mib * 2**20 / (kept * groups)))

    def forward(self, tree: PromptTree, context: Tensor, deep: Sequence[Tensor] = (), need_hidden: bool = True) -> TextOutput:
        """Class features and the states beside the context vectors, in one pass.

        Args:
            tree: the prompts, and which states are read.
            context: (G, S, D) learnable rows by slot, for G contexts at once (1, or B images each with its own).
            deep: for layers 1, 2, ...: (G, S, D) rows that replace the context rows at the layer's entry.
            need_hidden: whether ``hidden`` is wanted.

        Returns:
            :class:`TextOutput` in the tower's dtype (features under autocast: in autocast's).
        """
        if len(deep) >= len(self.resblocks):
            raise InputError(
                f"deep: expected prompts for at most {len(self.resblocks) - 1} layers after the first, got {len(deep)}"
            )
        run = self._run
        if len(tree.parts) > 1 and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        rows = (context, *deep)
        outputs = [run(part, rows, need_hidden) for part in tree.parts]
        if len(outputs) == 1:
            features, hidden = outputs[0]
        else:
            features = torch.cat([part[0] for part in outputs], 1).index_select(1, tree.order)
            hidden = torch.cat([part[1] for part in outputs], 1)
            if hidden.shape[1] > 1:  # a state a prompt
                hidden = hidden.index_select(1, tree.order)
        return TextOutput(features, hidden.flatten(0, 1) if need_hidden else None)

    def _run(self, part: Chunks, rows: Sequence[Tensor], need_hidden: bool) -> tuple[Tensor, Tensor]:
        """A part's features (G, C, embed_dim) and states (G, P, M, D); ``rows`` (G, S, D) for layers 0, 1, ..."""
        (k, length), groups, dtype = part.token.shape, len(rows[0]), self.dtype
        # (layers, G, S, D), each vector once for every chunk that holds it
        rows = torch.stack([r.to(dtype) for r in rows]).index_select(2, part.context_slot).unbind()
        mask = self._mask(part, groups)
        x = self.token_embedding(part.token).to(dtype).flatten(0, 1).expand(groups, -1, -1)
        position = self.positional_embedding[part.position].to(dtype)
        read = part.read if need_hidden else part.end
        for layer, block in enumerate(self.resblocks):
            if layer < len(rows) and len(part.context_row):
                x = x.index_copy(1, part.context_row, rows[layer])
            x = x.reshape(groups * k, length, -1) if layer else (x.view(groups, k, length, -1) + position).flatten(0, 1)
            out = attend(block, x, mask).view(groups, k * length, -1)
            x = x.view(groups, k * length, -1)
            if layer == len(self.resblocks) - 1:
                x, out = x.index_select(1, read), out.index_select(1, read)
            x = residual(block, x, out)
        ends, states = self.ln_final(x).to(dtype).split([len(part.end), len(read) - len(part.end)], 1)
        if need_hidden:
            # one prompt's states are read in its order already
            states = states if len(part.state) == 1 else states.index_select(1, part.state.flatten())
            states = states.unflatten(1, part.state.shape)
        return ends @ self.text_projection, states

    def _mask(self, part: Chunks, groups: int) -> Tensor:
        """(G * K, 1, L, L) in the dtype that attention computes in."""
        device = part.mask.device.type
        # float64 is left alone by autocast
        autocast = device != "meta" and self.dtype != torch.float64 and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.dtype
        return part.mask.to(dtype).expand(groups, *part.mask.shape).flatten(0, 1)
