"""Prompts as a prefix tree: which positions the causal text tower must compute, each once.

The text tower is causal, so the state at a position depends only on the symbols up to it. Prompts that begin alike share
those states exactly: SOS and a shared context (computed once, not once a class), and also names that begin alike
("2012 BMW ...", "2012 Audi ..."). Nothing after a prompt's EOT is ever read, so nothing there is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def context_symbol(slot: int) -> int:
    """The symbol of learnable row ``slot`` in a prompt; frozen tokens are their own id, >= 0."""
    return -1 - slot


@dataclass(frozen=True)
class Nodes:
    """What stands at N tree positions: a frozen token or a learnable row."""

    token: Tensor  # (N,) token id; 0 where a learnable row stands
    position: Tensor  # (N,) position in the prompt
    context_node: Tensor  # (S,) the nodes where learnable rows stand ...
    context_slot: Tensor  # (S,) ... and which rows


@dataclass(frozen=True)
class Group:
    """n prompts whose part after the common prefix has the same length L: attention without padding."""

    path: Tensor  # (n, L) node of each position, first to EOT
    start: int | None  # path counts up from here, so that a view serves instead of a gather; None: it does not
    read: Tensor  # (r,) the positions in 0..L-1 that are read after the last layer; the last one is EOT


@dataclass(frozen=True)
class Chunk:
    """Prompts that are computed together, under a bound on the number of nodes."""

    nodes: Nodes
    groups: tuple[Group, ...]
    first_visit: Tensor | None  # (N,) where in the groups' concatenation a node stands first; None: it is the identity


@dataclass(frozen=True)
class PromptTree:
    """C prompts, ready for the text tower.

    ``prefix`` is the chain that all prompts share. ``order`` (C,) says where prompt c stands in the chunks' concatenation.
    ``before`` (P, M) says where the state preceding each context vector stands: index < prefix length: in the prefix;
    beyond it, ``index - prefix length`` counts the read rows of the chunks. P is 1 where every one of them is in the prefix.
    """

    prefix: Nodes
    chunks: tuple[Chunk, ...]
    order: Tensor
    before: Tensor
    before_in_prefix: bool
    prefix_reads: int  # how many rows of the prefix, from its beginning, are read after the last layer

    @property
    def prefix_length(self) -> int:
        return len(self.prefix.token)

    @property
    def positions(self) -> int:
        """How many positions are computed; the literal tower computes C * 77."""
        return self.prefix_length + sum(len(c.nodes.token) for c in self.chunks)

    def to(self, device: torch.device | str) -> PromptTree:
        return _to(self, device)


def build_tree(prompts: Sequence[Sequence[int]], n_ctx: int, max_nodes: int | None = None) -> PromptTree:
    """Build the tree of C prompts.

    Args:
        prompts: symbols from SOS to EOT: token ids, and :func:`context_symbol` where a learnable row stands. Each prompt
            holds ``n_ctx`` of those (none at all if ``n_ctx`` is 0).
        n_ctx: number M of context vectors a prompt.
        max_nodes: computed together at most (at least one prompt is); None: all.
    """
    p = _common_prefix(prompts)
    prefix_nodes = _nodes(list(enumerate(prompts[0][:p])))
    # Alike beginnings stand together, so that a chunk's border cuts few of them.
    rest = sorted(range(len(prompts)), key=lambda c: tuple(prompts[c]))
    before_places: dict[tuple[int, int], int] = {}
    chunks, order, n_read = [], [0] * len(prompts), 0
    place = 0
    for members in _split(rest, prompts, p, max_nodes):
        chunk, members_in_order, reads = _build_chunk(members, prompts, p, n_ctx)
        for c in members_in_order:
            order[c] = place
            place += 1
        for (c, m), row in reads.items():
            before_places[c, m] = p + n_read + row
        n_read += sum(g.path.shape[0] * len(g.read) for g in chunk.groups)
        chunks.append(chunk)
    before = []
    for c, prompt in enumerate(prompts):
        for m, t in enumerate(_context_positions(prompt)):
            before.append(t - 1 if t - 1 < p else before_places[c, m])
    rows = torch.tensor(before, dtype=torch.long).view(len(prompts), n_ctx)
    in_prefix = bool((rows < p).all())
    if in_prefix:
        rows = rows[:1]
    prefix_reads = max((t + 1 for t in before if t < p), default=0)
    return PromptTree(prefix_nodes, tuple(chunks), torch.tensor(order), rows, in_prefix, prefix_reads)


def _context_positions(prompt: Sequence[int]) -> list[int]:
    return [t for t, s in enumerate(prompt) if s < 0]


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the common beginning, leaving every prompt at least its EOT."""
    shortest = min(map(len, prompts))
    p = 0
    while p < shortest - 1 and all(prompt[p] == prompts[0][p] for prompt in prompts):
        p += 1
    return p


def _split(rest: list[int], prompts: Sequence[Sequence[int]], p: int, max_nodes: int | None) -> list[list[int]]:
    """Consecutive prompts of at most ``max_nodes`` different nodes."""
    if max_nodes is None:
        return [rest]
    parts: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    for c in rest:
        new = {tuple(prompts[c][p : t + 1]) for t in range(p, len(prompts[c]))}
        if not parts or len(seen | new) > max_nodes:
            parts.append([])
            seen = set()
        seen |= new
        parts[-1].append(c)
    return parts


def _build_chunk(members: list[int], prompts: Sequence[Sequence[int]], p: int, n_ctx: int):
    by_length: dict[int, list[int]] = {}
    for c in members:
        by_length.setdefault(len(prompts[c]) - p, []).append(c)
    node_of: dict[tuple[int, int], int] = {}  # (parent node, symbol) -> node; the prefix's end is parent -1
    at: list[tuple[int, int]] = []  # (position, symbol) of each node
    first_visit: list[int] = []
    groups, order, reads = [], [], {}
    visited = row = 0
    for length, classes in sorted(by_length.items()):
        path = []
        wanted = {length - 1}
        for c in classes:
            parent = -1
            chain = []
            for t in range(p, len(prompts[c])):
                key = (parent, prompts[c][t])
                if key not in node_of:
                    node_of[key] = len(at)
                    at.append((t, prompts[c][t]))
                    first_visit.append(visited)
                parent = node_of[key]
                chain.append(parent)
                visited += 1
            path.append(chain)
            wanted |= {t - 1 - p for t in _context_positions(prompts[c]) if t - 1 >= p}
        read = sorted(wanted)
        for i, c in enumerate(classes):
            for m, t in enumerate(_context_positions(prompts[c])):
                if t - 1 >= p:
                    reads[c, m] = row + i * len(read) + read.index(t - 1 - p)
        row += len(classes) * len(read)
        order += classes
        nodes = torch.tensor(path)
        contiguous = bool((nodes.flatten() == torch.arange(nodes.numel()) + nodes[0, 0]).all())
        groups.append(Group(nodes, path[0][0] if contiguous else None, torch.tensor(read)))
    identity = first_visit == list(range(visited))
    return Chunk(_nodes(at), tuple(groups), None if identity else torch.tensor(first_visit)), order, reads


def _nodes(at: list[tuple[int, int]]) -> Nodes:
    context = [(i, -1 - s) for i, (_, s) in enumerate(at) if s < 0]
    return Nodes(
        token=torch.tensor([max(s, 0) for _, s in at], dtype=torch.long),
        position=torch.tensor([t for t, _ in at], dtype=torch.long),
        context_node=torch.tensor([i for i, _ in context], dtype=torch.long),
        context_slot=torch.tensor([s for _, s in context], dtype=torch.long),
    )


def _to(value, device):
    """The same structure with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: _to(getattr(value, name), device) for name in value.__dataclass_fields__})
    return value
