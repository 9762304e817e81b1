"""A term that joins a loss on its way back: the text features pass through unchanged, and the term gets its gradient there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import Components


class Group:
    """The text passes that belong to one loss: one of a model's forward pass, or B of them (CoCoOp: one an image)."""

    def __init__(self) -> None:
        self.passes = 0
        self.run_again = False  # its passes were counted without gradients, and make their graph in a second run
        self.in_backward = False  # its passes are seen in a second run alone: the whole model is checkpointed
        self.backward_passes = 0
        self.measured: list[tuple[Components, Tensor, Tensor]] = []  # all detached
        self.summary: Components | None = None

    def measure(self, parts: Components, v: Tensor, h: Tensor) -> None:
        self.measured.append((Components(*(t.detach() for t in parts)), v.detach(), h.detach()))
        self.summary = None


class Term(Protocol):
    """What a :class:`plpp_reg.Handle` says of its term; see :func:`plpp_reg.attach`."""

    scaler: Any
    loss_scale: float
    backward_pass: int
    ever_joined: bool


class Join(torch.autograd.Function):
    """The text features as they are. On the way back, the term gets the gradient of a summand of the loss."""

    @staticmethod
    def forward(ctx: Any, handle: Term, group: Group, term: Tensor, *features: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.handle, ctx.group, ctx.backward_passes = handle, group, 0
        ctx.dtype, ctx.device = term.dtype, term.device
        ctx.set_materialize_grads(False)
        copies = tuple(f.clone() for f in features)  # not views: some hosts normalise their features in place
        return copies if len(copies) > 1 else copies[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.backward_passes += 1
        ctx.group.backward_passes = max(ctx.group.backward_passes, ctx.backward_passes)
        on_term = None
        if ctx.backward_passes == ctx.handle.backward_pass:
            ctx.handle.ever_joined = True
            # only now is it known how many text passes share the loss
            on_term = torch.full((), ctx.handle.loss_scale / ctx.group.passes, dtype=ctx.dtype, device=ctx.device)
            if ctx.handle.scaler:
                on_term = ctx.handle.scaler.scale(on_term)
        return None, None, on_term, *gradients


def joined(output: Any, join: Callable[..., Any]) -> Any:
    """The text encoder's output with every differentiable tensor of it passed through ``join``, all in one call."""
    items = [output] if isinstance(output, Tensor) else output
    if not isinstance(items, (tuple, list, dict)):
        raise InputError(f"text_encoder: expected features, or a tuple or dict with them, got {type(output).__name__}")
    keys = list(items) if isinstance(items, dict) else range(len(items))
    at = [k for k in keys if isinstance(items[k], Tensor) and items[k].requires_grad]
    if not at:
        raise InputError("text_encoder: expected text features that carry a gradient, got none: the term has nothing to join")
    values = join(*(items[k] for k in at))
    new = copy.copy(items) if isinstance(items, dict) else list(items)
    for k, value in zip(at, values if len(at) > 1 else (values,), strict=True):
        new[k] = value
    if isinstance(output, Tensor):
        return new[0]
    if isinstance(output, tuple):
        return type(output)(*new) if hasattr(output, "_fields") else tuple(new)
    return new
