"""Where context vectors stand in the prompts that a text encoder is called with, and which of the prompts differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.errors import InputError

POSITIONS = ("end", "middle", "front")
REMEMBERED = 8  # tokenised prompts whose layout is known


class Layout(NamedTuple):
    """Where the context vectors stand in N prompts."""

    slot: Tensor  # (N, M) their positions
    owner: Tensor  # (N,) which of the contexts a prompt reads; 0 where all share one


class Layouts:
    """The layouts of one prompt learner's prompts, each found once for the same tokenised prompts.

    Args:
        prompt_learner: what is asked for ``name_lens`` where the name stands before context vectors.
        context: the learnable vectors (M, D) or (C, M, D).
        position: as :func:`plpp_reg.attach` takes it; None: found by :func:`find_context`.
    """

    def __init__(self, prompt_learner: nn.Module, context: Tensor, position: str | Tensor | None) -> None:
        self.prompt_learner, self.context, self.position = prompt_learner, context, position
        self._known: list[tuple[torch.Size, Tensor | None, Layout | None]] = []

    def forget(self) -> None:
        self._known = []

    def of(self, prompts: Tensor, tokens: Tensor | None) -> Layout | None:
        """Found once for the same tokenised prompts; None where the prompts do not depend on the context."""
        for shape, known, layout in self._known:
            if shape == prompts.shape and _same(known, tokens):
                return layout
        if self.position is None:
            layout = find_context(prompts, self.context)
        else:
            layout = self._told_layout(*prompts.shape[:2], prompts.device)
        if layout is not None and (int(layout.slot.min()) < 1 or int(layout.slot.max()) >= prompts.shape[1]):
            raise InputError("position: expected context vectors after the first token, to have a state before each")
        self._known = [*self._known[1 - REMEMBERED :], (prompts.shape, None if tokens is None else tokens.clone(), layout)]
        return layout

    def _told_layout(self, n: int, length: int, device: torch.device) -> Layout:
        m = self.context.shape[-2]
        owner = torch.arange(n) if self.context.dim() == 3 else torch.zeros(n, dtype=torch.long)
        if isinstance(self.position, Tensor):
            slot = self.position.cpu().long()
            if slot.shape not in ((m,), (n, m)):
                raise InputError(f"position: expected integers ({m},) or ({n}, {m}), got {tuple(slot.shape)}")
            return Layout(slot.expand(n, m).to(device), owner.to(device))
        order = torch.arange(m)
        lengths = torch.zeros(n, dtype=torch.long)
        if self.position != "end":
            names = getattr(self.prompt_learner, "name_lens", None)
            if names is None or len(names) != n:
                raise InputError(
                    f"position: expected name_lens, {n} token counts, on the prompt learner for {self.position!r}; give the "
                    f"positions themselves, integers ({n}, {m})"
                )
            lengths = torch.tensor(list(names))
        after = order >= (m // 2 if self.position == "middle" else 0)
        slot = 1 + order + lengths.unsqueeze(1) * after
        return Layout(slot.to(device), owner.to(device))


def read_context(prompts: Tensor, hidden: Tensor, layout: Layout, states: str = "preceding") -> tuple[Tensor, Tensor]:
    """The vectors and the states before or at them, each distinct prompt once: v (1 or P, M, D), h (P, M, D)."""
    rows = distinct_prompts(prompts.detach(), layout)
    slot, row = layout.slot[rows], rows.unsqueeze(1)
    v, h = prompts[row, slot], hidden[row, slot - 1 if states == "preceding" else slot]
    if len(v) > 1 and (layout.owner == layout.owner[0]).all() and torch.equal(v, v[:1].expand_as(v)):
        v = v[:1]  # one context read in P places: its nearest words are looked up once
    return v, h


def find_context(prompts: Tensor, context: Tensor) -> Layout | None:
    """Where each context vector stands in prompts (N, T, D), read off the graph that made them; None if they are not linked.

    A gradient of t + 1 at position t arrives at the vector that stands there as t + 1, as long as vectors go into the prompts
    as they are or shifted by something else. D prompts are told apart at a time, one by each coordinate.

    Raises:
        InputError: the prompts depend on the context in another way.
    """
    n, length, width = prompts.shape
    contexts_by_class = context.dim() == 3
    slots, owners = [], []
    places = torch.arange(1, length + 1, device=prompts.device, dtype=prompts.dtype)
    for first in range(0, n, width):
        rows = torch.arange(first, min(first + width, n), device=prompts.device)
        arrived = []
        for weights in (places, torch.ones_like(places)):
            probe = torch.zeros_like(prompts)
            probe[rows, :, rows - first] = weights
            with torch.autocast(prompts.device.type, enabled=False):
                (gradient,) = torch.autograd.grad(prompts, context, probe, retain_graph=True, allow_unused=True)
            if gradient is None:
                return None
            arrived.append(gradient.float().view(-1, *context.shape[-2:])[..., : len(rows)])
        place, count = arrived  # (1 or C, M, rows)
        owner = count[:, 0].argmax(0)
        index = owner.expand(1, place.shape[1], -1)
        place, own = place.gather(0, index)[0], count.gather(0, index)[0]
        elsewhere = count.abs().sum(0) - own if contexts_by_class else torch.zeros_like(own)
        if not (own == 1).all() or elsewhere.any() or (place != place.round()).any():
            raise InputError(
                "position: expected each context vector once in each prompt, as it is or shifted; the prompts depend on it in "
                f"another way: give position= ({', '.join(map(repr, POSITIONS))}, or the positions)"
            )
        slots.append(place.T.long() - 1)
        owners.append(owner)
    return Layout(torch.cat(slots), torch.cat(owners))


def distinct_prompts(prompts: Tensor, layout: Layout) -> Tensor:
    """Indices of prompts that differ in something a context vector or a state before one depends on: one of each, (P,)."""
    n, device = len(prompts), prompts.device
    everything = torch.arange(n, device=device)
    if n == 1 or len(layout.owner.unique()) == n:
        return everything
    last = layout.slot.amax(1, keepdim=True)
    upto = int(last.max()) + 1
    read = torch.arange(upto, device=device) <= last  # (N, upto): what stands after the last context vector does not matter
    rows = prompts[:, :upto] * read.unsqueeze(2)
    same_place = (layout.slot == layout.slot[:1]).all() and (layout.owner == layout.owner[:1]).all()
    if same_place and torch.equal(rows, rows[:1].expand_as(rows)):
        return everything[:1]
    # a number for each prompt: equal prompts have equal ones; that equal ones mean equal prompts is checked
    weights = torch.arange(rows[0].numel(), device=device, dtype=torch.float64).sin().view_as(rows[0])
    number = (rows * weights).sum((1, 2)) + (layout.slot * layout.slot).sum(1) + layout.owner * torch.pi
    _, group = number.unique(return_inverse=True)
    first = torch.full((n,), n, device=device).scatter_reduce(0, group, everything, "amin")[: int(group.max()) + 1]
    chosen = first[group]
    equal = torch.equal(rows, rows[chosen]) and torch.equal(layout.slot, layout.slot[chosen])
    return first.sort().values if equal and torch.equal(layout.owner, layout.owner[chosen]) else everything


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
