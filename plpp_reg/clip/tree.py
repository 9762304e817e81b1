"""Prompts as a prefix tree, laid out for one masked pass: which positions the causal text tower computes, and what each sees.

The text tower is causal, so the state at a position depends only on the symbols up to it. Prompts that begin alike share
those states exactly: SOS and a shared context, and also names that begin alike ("2012 BMW ...", "2012 Audi ..."). Nothing
after a prompt's EOT is ever read. So every prompt is a path in a prefix tree, from SOS to its EOT.

The nodes are laid into K chunks of L rows. A chunk holds whole paths, a beginning that its paths share once, and is one
sequence for the transformer: a row sees its ancestors and itself, nothing else. What lies in several chunks is computed in
each of them, and a chunk that is not full ends in rows that nobody reads: K and L are chosen so that this costs least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A row's linear maps are 24 D^2 operations, its attention to a row 4 D: as much as 6 D rows, if both ran at the same rate.
ATTENTION_ON_CPU = 2  # how much slower an operation of attention is than one of a linear map, about


def context_symbol(slot: int) -> int:
    """The symbol of learnable row ``slot`` in a prompt; frozen tokens are their own id, >= 0."""
    return -1 - slot


@dataclass(frozen=True)
class Chunks:
    """K chunks of L rows that are computed together, and what is read of them. Row (k, l) has the number k * L + l."""

    token: Tensor  # (K, L) token id; 0 where a learnable row stands, or nothing
    position: Tensor  # (K, L) position in the prompt
    mask: Tensor  # (K, 1, L, L) float32: 0 where row i sees row j, else -inf
    context_row: Tensor  # (S,) the rows where learnable vectors stand ...
    context_slot: Tensor  # (S,) ... and which vectors
    end: Tensor  # (C,) the row of each prompt's EOT
    beside: Tensor  # (B,) the rows whose states are read for context vectors, each once
    state: Tensor  # (P, M) which of them for each context vector; P is C, or 1, or 0 (another part has them)
    read: Tensor  # (C + B,) end and beside


@dataclass(frozen=True)
class PromptTree:
    """C prompts, ready for the text tower, in parts of which each is computed at once.

    ``order`` (C,) says where prompt c stands in the parts' concatenation; None: there is one part, in the prompts' order.
    """

    parts: tuple[Chunks, ...]
    order: Tensor | None

    @property
    def positions(self) -> int:
        """How many positions are computed, those that nobody reads included; the literal tower computes C * 77."""
        return sum(part.token.numel() for part in self.parts)

    def to(self, device: torch.device | str) -> PromptTree:
        """The same tree on another device."""
        parts = tuple(Chunks(*(tensor.to(device) for tensor in vars(part).values())) for part in self.parts)
        return PromptTree(parts, None if self.order is None else self.order.to(device))


def build_tree(
    prompts: Sequence[Sequence[int]],
    n_ctx: int,
    width: int,
    max_rows: int | None = None,
    states: str = "preceding",
    device: torch.device | str = "cpu",
) -> PromptTree:
    """Build the tree of C prompts.

    Args:
        prompts: symbols from SOS to EOT: token ids, and :func:`context_symbol` where a learnable row stands. Each prompt
            holds ``n_ctx`` of those (none at all if ``n_ctx`` is 0).
        n_ctx: number M of context vectors a prompt.
        width: D of the text tower, on which it depends how long a chunk may be before attention costs more than sharing saves.
        max_rows: computed together at most (at least one prompt is); None: all.
        states: which state is read for each context vector, one of :data:`plpp_reg.loss.functional.STATES`.
        device: where the tree goes; on an accelerator chunks are longer, and their length suits its kernels. On "meta", where
            nothing is computed, they are as on the device that this machine computes with.
    """
    kind = torch.device(device).type
    on_cpu = kind == "cpu" or (kind == "meta" and not torch.cuda.is_available())
    row_cost, multiple = (6 * width / ATTENTION_ON_CPU, 1) if on_cpu else (6 * width, 8)
    order = sorted(range(len(prompts)), key=lambda c: tuple(prompts[c]))
    alike = [0, *(_common(prompts[a], prompts[b]) for a, b in zip(order, order[1:], strict=False))]
    lengths = [len(prompts[c]) for c in order]
    starts, length = _plan(lengths, alike, max_rows, row_cost, multiple)
    at_once = max(1, max_rows // length) if max_rows else len(starts)
    parts = -(-len(starts) // at_once)
    at_once = -(-len(starts) // parts)  # equal parts

    shift = {"preceding": 1, "own": 0}[states]
    reads = [[t - shift for t, symbol in enumerate(prompt) if symbol < 0] for prompt in prompts]
    shared = min(alike[1:], default=lengths[0])  # how far all prompts are alike
    one_state = n_ctx > 0 and all(t < shared for t in reads[order[0]]) and all(row == reads[0] for row in reads)

    borders = [*starts, len(order)]
    built = []
    for first in range(0, len(starts), at_once):
        chunks = [order[a:b] for a, b in zip(borders[first : first + at_once], borders[first + 1 :], strict=False)]
        members = sorted(c for chunk in chunks for c in chunk) if parts == 1 else [c for chunk in chunks for c in chunk]
        having_states = members if not one_state else members[:1] if first == 0 else []
        built.append(_lay_out(chunks, prompts, length, members, having_states, reads, n_ctx))
    if parts == 1:
        return PromptTree(tuple(built), None).to(device)
    place = {c: i for i, c in enumerate(order)}
    return PromptTree(tuple(built), torch.tensor([place[c] for c in range(len(prompts))])).to(device)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _plan(
    lengths: Sequence[int], alike: Sequence[int], max_rows: int | None, row_cost: float, multiple: int
) -> tuple[list[int], int]:
    """At which of the sorted prompts each chunk starts, and the length L of all: ``K L (row_cost + L)`` is near its least."""
    least = max(lengths)  # the longest prompt is in one chunk
    longest = max(least, sum(lengths) - sum(alike))
    if max_rows:
        longest = max(least, min(longest, max_rows))

    def pack(most: int) -> tuple[list[int], int]:
        """Chunks of at most so many rows, each filled before the next is begun, and the rows of the fullest."""
        starts, rows, fullest = [], most + 1, 0
        for i, (length, common) in enumerate(zip(lengths, alike, strict=True)):
            rows += length - common
            if rows > most:
                starts.append(i)
                rows = length
            fullest = max(fullest, rows)
        return starts, fullest

    def rounded(rows: int) -> int:
        return -(-rows // multiple) * multiple

    def cost(plan: tuple[list[int], int]) -> float:
        return len(plan[0]) * rounded(plan[1]) * (row_cost + rounded(plan[1]))

    best, most = pack(least), float(least)
    while most < longest:
        most = min(most * 1.1 + 1, longest)
        best = min(best, pack(int(most)), key=cost)
        if most * most > 16 * row_cost * least and most > 4 * least:  # attention alone costs more than the best does
            break
    low, high = least, best[1]
    while low < high:  # the smallest L with as many chunks
        middle = (low + high) // 2
        if len(pack(middle)[0]) > len(best[0]):
            low = middle + 1
        else:
            high = middle
    starts, fullest = pack(high)
    return starts, rounded(fullest)


def _lay_out(
    chunks: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    length: int,
    members: Sequence[int],
    having_states: Sequence[int],
    reads: Sequence[Sequence[int]],
    n_ctx: int,
) -> Chunks:
    """The rows of some chunks, and what is read of them: the EOT of ``members``, the states of ``having_states``."""
    symbols: list[int] = []
    positions: list[int] = []
    parents: list[int] = []  # within the chunk
    path_of: dict[int, list[int]] = {}
    for k, chunk in enumerate(chunks):
        first = k * length
        path: list[int] = []
        previous: Sequence[int] = ()
        for c in chunk:  # sorted: what a prompt shares with any before it, it shares with the last one
            path = path[: _common(previous, prompts[c])]
            for t in range(len(path), len(prompts[c])):
                symbols.append(prompts[c][t])
                positions.append(t)
                parents.append(path[-1] - first if path else 0)
                path.append(len(symbols) - 1)
            path_of[c], previous = path, prompts[c]
        fill = first + length - len(symbols)  # rows that see SOS and themselves
        symbols += [0] * fill
        positions += [0] * fill
        parents += [0] * fill

    shape = (len(chunks), length)
    symbol, parent = torch.tensor(symbols), torch.tensor(parents).view(shape)
    visible = torch.eye(length, dtype=torch.bool).repeat(len(chunks), 1, 1)
    ancestor = parent
    for _ in range(max(positions)):
        visible.scatter_(2, ancestor.unsqueeze(2), True)
        ancestor = parent.gather(1, ancestor)
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf).unsqueeze(1)

    end = torch.tensor([path_of[c][-1] for c in members])
    state = torch.tensor([[path_of[c][t] for t in reads[c]] for c in having_states], dtype=torch.long)
    beside, state = state.view(len(having_states), n_ctx).unique(return_inverse=True)
    context_row = (symbol < 0).nonzero()[:, 0]
    return Chunks(
        token=symbol.clamp_min(0).view(shape),
        position=torch.tensor(positions).view(shape),
        mask=mask,
        context_row=context_row,
        context_slot=-1 - symbol[context_row],
        end=end,
        beside=beside,
        state=state,
        read=torch.cat([end, beside]),
    )
