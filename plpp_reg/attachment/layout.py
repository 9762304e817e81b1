"""Where context vectors stand in the prompts that a text tower reads, and which of the prompts differ.

Nothing is remembered from one text pass to the next: prompts may change in what no key could hold (the graph that makes them),
and looking again costs two backward passes through the making of the prompts. The host waits for the device once, for the
answer's integers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.attachment.entrance import graph_of
from plpp_reg.errors import InputError

POSITIONS = ("end", "middle", "front")
BYTES_AT_ONCE = 2**26  # of prompts whose bits are summed at a time
# How far two states may lie apart, as a share of their length, that count as one: rounding, in a batch's different rows.
ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 0.03}
MARKS, STEPS = 2, 2**20  # numbers that stand for a prompt's states, in integers


class Layout(NamedTuple):
    """Where the context vectors stand in N prompts; of a prompt that reads none of them, nothing else counts."""

    slot: Tensor  # (N, M) their positions
    owner: Tensor  # (N,) which of the contexts a prompt reads; 0 where all share one
    reads: Tensor  # (N,) whether it reads any
    found: Tensor  # (N,) whether each vector is where ``slot`` says, once, as it is or shifted


class Rows(NamedTuple):
    """The prompts among N that read the context, on the prompts' device. Those that are alike count as one."""

    row: Tensor  # (R,) which of the N
    slot: Tensor  # (R, M) positions of their context vectors
    alike: Tensor  # (R,) which of the P distinct ones each is
    distinct: int  # P
    shared: bool  # all read one context, with equal vectors made of the same: one v serves them
    every: bool  # those that are alike are all named; else R is P


class Layouts:
    """The layouts of one context's prompts.

    Args:
        prompt_learner: what is asked for ``name_lens`` where the name stands before context vectors.
        position: as :func:`plpp_reg.attach` takes it; None: found by :func:`find_context`.
        states: "preceding" or "own".
    """

    def __init__(self, prompt_learner: nn.Module, position: str | Tensor | None, states: str) -> None:
        self.prompt_learner, self.position, self.states = prompt_learner, position, states
        self._length: int | None = None  # as far as the last prompts were read
        self._compared = False  # given positions with those that the graph shows

    def of(self, prompts: Tensor, context: Tensor, hidden: Tensor | None = None) -> Rows | None:
        """The distinct ones of prompts (N, T, D); None where they do not depend on the context.

        ``hidden``, the tower's states (N, T, D): prompts that are alike up to their vectors count as one only where their
        states are, which a tower that puts something of each class into a deeper layer (TCP) makes differ.
        """
        if not context.requires_grad:
            return None
        if self.position is None:
            layout = find_context(prompts, context)
        else:
            layout = self._told_layout(*prompts.shape[:2], context) if _linked(prompts, context) else None
            layout = layout and Layout(*(t.to(prompts.device, non_blocking=True) for t in layout))
            if layout is not None and not self._compared:
                self._compare(layout, prompts, context)
        if layout is None:
            return None
        length = min(self._length or prompts.shape[1], prompts.shape[1])
        marks = None if hidden is None else _marks(hidden, layout.slot - int(self.states == "preceding"))
        values = _values(prompts, layout, length, marks)
        end = 1 + max((p for slots, _, reads, *_ in values if reads for p in slots), default=-1)
        if end > length:
            values = _values(prompts, layout, end, marks)
        self._length = end or None
        rounding = 0 if hidden is None else ROUNDING.get(hidden.dtype, 1e-5) * STEPS
        # in half precision a share of a gradient may be less than what the numbers hold
        half = prompts.element_size() < 4 or torch.is_autocast_enabled(prompts.device.type)
        return self._distinct(values, prompts, rounding, not half and _has_others(prompts, context))

    def _compare(self, told: Layout, prompts: Tensor, context: Tensor) -> None:
        """Once: where the graph shows the positions too, they are those that were given."""
        self._compared = True
        seen = find_context(prompts, context) if prompts.shape[1] <= _longest(prompts.dtype) else None
        if seen is None:
            return
        elsewhere = seen.reads & seen.found & (seen.slot != told.slot).any(1)
        if bool(elsewhere.any()):
            n = int(elsewhere.long().argmax())
            raise InputError(
                f"position: expected {seen.slot[n].tolist()}, where prompt {n} has the context's vectors, got "
                f"{told.slot[n].tolist()}; None finds them"
            )

    def _distinct(self, values: list[tuple], prompts: Tensor, rounding: float, every: bool) -> Rows | None:
        """``every``: prompts that are alike are named too."""
        known: dict[tuple, tuple[int, list[int]]] = {}  # of each distinct prompt: its number, the marks of its states
        reading: list[tuple[int, ...]] = []  # of each that reads the context: row, number, positions
        contexts = set()
        first = 0 if self.states == "own" else 1
        for n, (slots, owner, reads, found, upto, vectors, *marks) in enumerate(values):
            if not reads:
                continue
            if not found or len(set(slots)) < len(slots):
                raise InputError(
                    "position: expected each context vector once in each prompt, as it is or shifted; the prompts depend on it "
                    f"in another way: give position= ({', '.join(map(repr, POSITIONS))}, or the positions)"
                )
            if min(slots) < first or max(slots) >= prompts.shape[1]:
                before = "after the first token, to have a state before each (states='own' needs none)" if first else ""
                raise InputError(
                    f"position: expected context vectors within {prompts.shape[1]} positions {before}, got position "
                    f"{min(slots)} to {max(slots)}"
                )
            new = len(known)
            number, its = known.setdefault((owner, slots, upto), (new, marks))
            if max(abs(a - b) for a, b in zip(marks, its, strict=True)) > rounding:
                number, _ = known.setdefault((owner, slots, upto, n), (new, marks))
            if number == new or every:
                reading.append((n, number, *slots))
                contexts.add((owner, vectors))
        if not reading:
            return None
        packed = torch.tensor(reading).to(prompts.device, non_blocking=True)
        return Rows(packed[:, 0], packed[:, 2:], packed[:, 1], len(known), len(contexts) == 1 and not every, every)

    def _told_layout(self, n: int, length: int, context: Tensor) -> Layout:
        m, yes = context.shape[-2], torch.ones(n, dtype=torch.bool)
        owner = torch.arange(n) if context.dim() == 3 else torch.zeros(n, dtype=torch.long)
        if isinstance(self.position, Tensor):
            slot = self.position.cpu().long()
            if slot.shape not in ((m,), (n, m)):
                raise InputError(f"position: expected integers ({m},) or ({n}, {m}), got {tuple(slot.shape)}")
            if slot.min() < 0 or slot.max() >= length:
                raise InputError(f"position: expected integers below {length}, got {int(slot.min())} to {int(slot.max())}")
            return Layout(slot.expand(n, m), owner, yes, yes)
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
        return Layout(1 + order + lengths.unsqueeze(1) * after, owner, yes, yes)


def read_context(
    prompts: Tensor, hidden: Tensor, rows: Rows, states: str = "preceding", positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The vectors and the states before or at them, each distinct prompt once: v (1 or P, M, D), h (P, M, D).

    ``positions`` (T, D) are taken off the vectors. Of prompts that are alike and not made of the same (each class may have a
    shift of its own that is still zero) each gets its share of the gradient.
    """
    row, slot = rows.row.unsqueeze(1), rows.slot
    v = prompts[row, slot]  # (R, M, D)
    if positions is not None:
        v = v.to(torch.promote_types(v.dtype, torch.float32)) - positions.detach()[slot]
    h = _means(hidden[row, slot - 1 if states == "preceding" else slot], rows)
    return v[:1] if rows.shared else _means(v, rows), h


def _means(x: Tensor, rows: Rows) -> Tensor:
    """The mean of those that are alike: x (R, M, D) -> (P, M, D)."""
    if not rows.every:
        return x
    sizes = x.new_zeros(rows.distinct).index_add(0, rows.alike, x.new_ones(len(x)))
    return x.new_zeros(rows.distinct, *x.shape[1:]).index_add(0, rows.alike, x) / sizes.view(-1, 1, 1)


def find_context(prompts: Tensor, context: Tensor) -> Layout | None:
    """Where each context vector stands in prompts (N, T, D), read off the graph that made them; None if they are not linked.

    What arrives at a vector when position t sends back a_t is a_s, where it stands at s alone, as it is or shifted by something
    else. Two such a, t + 1 and its square, find s and prove it. D prompts are told apart at a time, one by each
    coordinate. Nothing here waits for the device.
    """
    n, length, width = prompts.shape
    if length > _longest(prompts.dtype):
        raise InputError(f"prompts: expected at most 256 positions in {prompts.dtype}, got {length}: give position=")
    sent = _probes(length, prompts.device, prompts.dtype)
    parts = []
    for first in range(0, n, width):
        rows = torch.arange(first, min(first + width, n), device=prompts.device)
        arrived = []
        for numbers in sent:
            probe = torch.zeros_like(prompts)
            probe[rows, :, rows - first] = numbers
            gradient = _gradient(prompts, context, probe)
            if gradient is None:
                return None
            arrived.append(gradient.float().reshape(-1, *context.shape[-2:])[..., : len(rows)])
        parts.append(arrived)
    place, proof = (torch.cat(part, -1) for part in zip(*parts, strict=True))  # (1 or C, M, N)
    came = (place != 0) | (proof != 0)
    owner = came.any(1).long().argmax(0)  # (N,)
    index = owner.expand(1, place.shape[1], -1)
    own, own_proof = place.gather(0, index)[0].T, proof.gather(0, index)[0].T  # (N, M)
    slot = own.round().long().clamp(1, length) - 1
    found = (own == slot + 1).all(1) & (own_proof == sent[1].float()[slot]).all(1) & (came.any(1).sum(0) == 1)
    return Layout(slot, owner, came.any(0).any(0), found)


def _longest(dtype: torch.dtype) -> int:
    """Up to which length a position is a number that ``dtype`` holds exactly."""
    return int(2 / torch.finfo(dtype).eps)


def _gradient(prompts: Tensor, context: Tensor, probe: Tensor) -> Tensor | None:
    with torch.autocast(prompts.device.type, enabled=False), _without_hooks(context):
        return torch.autograd.grad(prompts, context, probe, retain_graph=True, allow_unused=True)[0]


@contextlib.contextmanager
def _without_hooks(tensor: Tensor) -> Iterator[None]:
    """A probe is no gradient: hooks do not see it, and do not change it."""
    hooks = tensor._backward_hooks or {}
    kept = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(kept)


def _has_others(prompts: Tensor, context: Tensor) -> bool:
    """Whether something else that is trained is in the prompts: then prompts that are alike need not be made of the same."""
    leaves = (getattr(node, "variable", None) for node in graph_of(prompts, beyond=context))
    return any(leaf is not None and leaf is not context for leaf in leaves)


def _linked(prompts: Tensor, context: Tensor) -> bool:
    return _gradient(prompts, context, prompts.new_zeros(()).expand_as(prompts)) is not None


@functools.lru_cache(maxsize=16)
def _probes(length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t + 1, and its square, or, where ``dtype`` does not hold that exactly, numbers without order, (T,) each.

    The square proves it of a vector that stands in several places: (a + b)^2 > a^2 + b^2.
    """
    place = torch.arange(1, length + 1)
    exact = length**2 <= _longest(dtype)
    numbers = place**2 if exact else torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(0))
    return place.to(device, dtype), numbers.to(device, dtype)


@functools.lru_cache(maxsize=16)
def _factors(length: int, width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (length, width), generator=generator).to(device)


def _values(prompts: Tensor, layout: Layout, length: int, marks: Tensor | None) -> list[tuple]:
    """Of each prompt: positions, owner, reads, found, sums for what stands up to its last vector and for its vectors, marks.

    Equal numbers have equal sums. Others have equal ones with a probability below 2^-32: 64 bits of a random linear function
    of their bits, in integers, whose sum no order changes. This is the one place that waits for the device.
    """
    with torch.no_grad():
        rows = torch.arange(len(prompts), device=prompts.device).unsqueeze(1)
        last = layout.slot.amax(1, keepdim=True)
        read = torch.arange(length, device=prompts.device) <= last  # what stands after the last vector does not matter
        upto = (_sums(prompts.detach()[:, :length]) * read).sum(1)
        vectors = _sums(prompts.detach()[rows, layout.slot]).sum(1)
        marks = layout.slot.new_zeros(len(prompts), MARKS) if marks is None else marks
        columns = (layout.slot, *(t.long().unsqueeze(1) for t in (*layout[1:], upto, vectors)), marks)
        table = torch.cat(columns, 1).tolist()
        m = layout.slot.shape[1]
    return [(tuple(r[:m]), *r[m:]) for r in table]


def _marks(hidden: Tensor, slot: Tensor) -> Tensor:
    """Of each prompt's states (N, T, D) at ``slot`` (N, M) numbers (N, MARKS) that differ where they do: their length in random
    directions, as a share of the whole."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        states = hidden.detach()[rows, slot.clamp(0, hidden.shape[1] - 1)].float()  # (N, M, D)
        length = states.norm(dim=(1, 2)).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        return (states.flatten(1) @ _signs(states[0].numel(), states.device) / length * STEPS).round().long()


@functools.lru_cache(maxsize=16)
def _signs(size: int, device: torch.device) -> Tensor:
    return (torch.randint(0, 2, (size, MARKS), generator=torch.Generator().manual_seed(0)) * 2.0 - 1).to(device)


def _sums(x: Tensor) -> Tensor:
    """(N, L, D) -> (N, L), int64."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int32}[x.element_size()]
    at_once = max(1, BYTES_AT_ONCE // (8 * x[0].numel()))
    parts = []
    for part in x.split(at_once):
        bits = (part + 0.0).contiguous().view(size)  # + 0.0: two zeros are one
        parts.append((bits * _factors(*bits.shape[1:], x.device)).sum(2))
    return torch.cat(parts)
