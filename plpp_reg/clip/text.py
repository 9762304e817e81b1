"""The exact fast text tower: CLIP's own weights, only the positions that are read, each once.

The literal tower runs all 77 positions of all C prompts. Here (docs/method.md tells why each step is exact):

1. nothing after a prompt's EOT is computed;
2. what prompts share at their beginning is computed once; its keys and values serve all of them;
3. prompts of equal remaining length run together, so nothing is padded;
4. in the last layer only the rows that are read are computed: EOT, and the states that precede context vectors.

(The fifth, encoding the classes once a model state in evaluation, is the trainer's.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from plpp_reg.clip.tree import Chunk, Group, Nodes, PromptTree

KeyValue = tuple[Tensor, Tensor]


class TextOutput(NamedTuple):
    """``features`` (G, C, embed_dim), not normalised; ``hidden`` (G * P, M, D), or None where it was not asked for.

    ``context``: of a prompt learner, the vectors that ``hidden`` precedes.
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
        memory_mib: bound on what the suffixes keep for the backward pass, in MiB (an estimate); prompts beyond it are
            computed in chunks, each again in backward.

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

    def max_nodes(self, groups: int = 1) -> int:
        """How many tree positions fit the memory bound, ``groups`` contexts at once."""
        width = self.ln_final.weight.shape[0]
        kept = 22 * width * len(self.resblocks) * torch.finfo(self.dtype).bits // 8  # bytes a position, measured
        return max(1, int(self.memory_mib * 2**20 / (kept * groups)))

    def forward(self, tree: PromptTree, context: Tensor, deep: Sequence[Tensor] = (), need_hidden: bool = True) -> TextOutput:
        """Class features and the states that precede the context vectors, in one pass.

        Args:
            tree: the prompts.
            context: (G, S, D) learnable rows by slot, for G contexts at once (1, or B images each with its own).
            deep: for layers 1, 2, ...: (G, S, D) rows that replace the context rows at the layer's entry.
            need_hidden: whether ``hidden`` is wanted.

        Returns:
            :class:`TextOutput` in the tower's dtype (features under autocast: in autocast's).
        """
        p = tree.prefix_length
        last = tree.prefix_reads if need_hidden else 0
        prefix_states, cache = self._prefix(tree.prefix, context, deep, last)
        checkpointed = len(tree.chunks) > 1 and torch.is_grad_enabled()
        need_states = need_hidden and not tree.before_in_prefix
        features, states = [], []
        for chunk in tree.chunks:
            if checkpointed:
                out = checkpoint(
                    self._suffix, chunk, context, deep, cache, need_states, use_reentrant=False, preserve_rng_state=False
                )
            else:
                out = self._suffix(chunk, context, deep, cache, need_states)
            features.append(out[0])
            states.append(out[1])
        ordered = torch.cat(features, 1).index_select(1, tree.order)
        if not need_hidden:
            return TextOutput(ordered, None)
        if tree.before_in_prefix:
            hidden = prefix_states.index_select(1, tree.before[0]).unsqueeze(1)
        else:
            # prefix rows that are not computed are never looked up: ``before`` only points at the first ``last``
            shift = torch.where(tree.before < p, tree.before, tree.before - p + last)
            rows = torch.cat([prefix_states, *states], 1)
            hidden = rows[:, shift]
        return TextOutput(ordered, hidden.flatten(0, 1))

    def _embed(self, nodes: Nodes, context: Tensor) -> Tensor:
        """(N,) nodes -> (G, N, D) input of the first layer."""
        dtype = self.dtype
        x = self.token_embedding(nodes.token).to(dtype).expand(len(context), -1, -1)
        x = _with_rows(x, nodes, context.to(dtype))
        return x + self.positional_embedding[nodes.position].to(dtype)

    def _prefix(self, nodes: Nodes, context: Tensor, deep: Sequence[Tensor], last: int) -> tuple[Tensor, list[KeyValue]]:
        """The shared chain: ``ln_final`` states of its first ``last`` rows, and keys and values (G, p, D) of each layer."""
        x = self._embed(nodes, context)
        cache: list[KeyValue] = []
        for layer, block in enumerate(self.resblocks):
            if 0 < layer <= len(deep):
                x = _with_rows(x, nodes, deep[layer - 1].to(x.dtype))
            final = layer == len(self.resblocks) - 1
            y = block.ln_1(x)
            cache.append(_keys_and_values(block.attn, y))
            if final:
                x, y = x[:, :last], y[:, :last]
            if not final or last:
                x = _residual(block, x, _attend_causal(_queries(block.attn, y), *cache[-1], block.attn.num_heads))
        return self.ln_final(x).to(self.dtype), cache

    def _suffix(
        self, chunk: Chunk, context: Tensor, deep: Sequence[Tensor], cache: list[KeyValue], need_states: bool
    ) -> tuple[Tensor, Tensor]:
        """A chunk's features (G, C', embed_dim), and the states of the rows that were read (G, n_read, D)."""
        x = self._embed(chunk.nodes, context)
        for layer, block in enumerate(self.resblocks):
            if 0 < layer <= len(deep):
                x = _with_rows(x, chunk.nodes, deep[layer - 1].to(x.dtype))
            y = block.ln_1(x)
            k, v = _keys_and_values(block.attn, y)
            if layer < len(self.resblocks) - 1:
                q = _queries(block.attn, y)
                out = torch.cat(
                    [_attend_group(g, _paths(g, q), k, v, cache[layer], block.attn.num_heads) for g in chunk.groups], 1
                )
                if chunk.first_visit is not None:  # a shared node's output is the same on each of its paths
                    out = out.index_select(1, chunk.first_visit)
                x = _residual(block, x, out)
            else:
                reads = [g.read if need_states else g.read[-1:] for g in chunk.groups]
                rows = [g.path[:, read].flatten() for g, read in zip(chunk.groups, reads, strict=True)]
                q = _queries(block.attn, y.index_select(1, torch.cat(rows))).split([len(r) for r in rows], 1)
                out = torch.cat(
                    [
                        _attend_group(g, qg.unflatten(1, (len(g.path), -1)), k, v, cache[layer], block.attn.num_heads, read)
                        for g, qg, read in zip(chunk.groups, q, reads, strict=True)
                    ],
                    1,
                )
                x = _residual(block, x.index_select(1, torch.cat(rows)), out)
        states = self.ln_final(x).to(self.dtype)
        parts = states.split([len(r) for r in rows], 1)
        ends = [s.unflatten(1, (len(g.path), -1))[:, :, -1] for g, s in zip(chunk.groups, parts, strict=True)]
        return torch.cat(ends, 1) @ self.text_projection, states


def _with_rows(x: Tensor, nodes: Nodes, rows: Tensor) -> Tensor:
    """x (G, N, D) with the learnable rows (G, S, D) in their places."""
    if not len(nodes.context_node):
        return x
    return x.index_copy(1, nodes.context_node, rows.index_select(1, nodes.context_slot))


def _queries(attn: nn.MultiheadAttention, y: Tensor) -> Tensor:
    d = y.shape[-1]
    return F.linear(y, attn.in_proj_weight[:d], attn.in_proj_bias[:d])


def _keys_and_values(attn: nn.MultiheadAttention, y: Tensor) -> KeyValue:
    d = y.shape[-1]
    k, v = F.linear(y, attn.in_proj_weight[d:], attn.in_proj_bias[d:]).chunk(2, -1)
    return k, v


def _residual(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """What follows attention in a CLIP block, row by row."""
    x = x + block.attn.out_proj(attended)
    return x + block.mlp(block.ln_2(x))


def _attend_causal(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Causal self-attention of a chain's first n rows: q (G, n, D), k, v (G, N >= n, D) -> (G, n, D)."""
    n = q.shape[1]
    q, k, v = (t[:, :n].unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _paths(group: Group, x: Tensor) -> Tensor:
    """(G, N, D) by node -> (G, n, L, D) by prompt and position."""
    if group.start is not None:
        return x[:, group.start : group.start + group.path.numel()].unflatten(1, group.path.shape)
    return x.index_select(1, group.path.flatten()).unflatten(1, group.path.shape)


def _attend_group(
    group: Group, q: Tensor, k: Tensor, v: Tensor, prefix: KeyValue, heads: int, read: Tensor | None = None
) -> Tensor:
    """Attention of n prompts' rows to the shared prefix and to their own past, without copying the prefix n times.

    q (G, n, r, D), for the positions ``read`` (r,) of each prompt, None: all L; k, v (G, N, D) by node; prefix 2 x (G, p, D).
    Returns (G, n * r, D).
    """
    own_k, own_v = (_paths(group, t).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4) for t in (k, v))  # G H n L d
    shared_k, shared_v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in prefix)  # G H p d
    p, length = shared_k.shape[2], own_k.shape[3]
    positions = torch.arange(length, device=q.device)
    future = positions > (positions if read is None else read).unsqueeze(1)  # (r, L)

    q = q.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)  # G H n r d
    q = q * q.shape[-1] ** -0.5
    n_and_r = q.shape[2:4]
    to_shared = (q.flatten(2, 3) @ shared_k.transpose(-1, -2)).unflatten(2, n_and_r)
    to_own = (q @ own_k.transpose(-1, -2)).masked_fill(future, -torch.inf)
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = torch.cat([to_shared, to_own], -1).softmax(-1, dtype=dtype).to(q.dtype)
    from_shared = (weights[..., :p].flatten(2, 3) @ shared_v).unflatten(2, n_and_r)
    out = from_shared + weights[..., p:] @ own_v
    return out.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
