"""A term that joins a loss on its way back: the tower's states pass through unchanged, and the term gets its gradient there."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from plpp_reg.attachment.layout import Rows
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import Components


class Group:
    """The text passes that belong to one loss: one of a model's forward pass, or B of them (CoCoOp: one an image)."""

    def __init__(self) -> None:
        self.passes = 0
        self.run_again = False  # its passes were counted without gradients, and make their graph in a second run
        self.in_backward = False  # its passes are seen in a second run alone: the whole model is checkpointed
        self.backward_passes = 0
        self.rows: list[tuple[Tensor, Rows]] = []  # what was read of prompts without gradients, for the second run
        self.measured: list[tuple[Components, Tensor, Tensor]] = []  # all detached
        self.summary: Components | None = None

    def measure(self, parts: Components, v: Tensor, h: Tensor) -> None:
        self.measured.append((Components(*(t.detach() for t in parts)), v.detach(), h.detach()))
        self.summary = None


class Term(Protocol):
    """What a :class:`plpp_reg.Handle` says of its term; see :func:`plpp_reg.attach`."""

    scaler: Any
    loss_scale: float
    backward_pass: int | tuple[int, ...] | None
    forward_passes: int

    def passed(self, group: Group, carried: bool) -> None:
        """A backward pass came by, and carried the term or not."""


class Join(torch.autograd.Function):
    """The text tower's states as they are. On the way back, the term gets the gradient of a summand of the loss.

    That gradient is a constant, and the states' own passes through: both can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, handle: Term, group: Group, term: Tensor, states: Tensor) -> Tensor:
        ctx.handle, ctx.group, ctx.backward_passes, ctx.made_graph = handle, group, 0, False
        ctx.dtype, ctx.device = term.dtype, term.device
        ctx.set_materialize_grads(False)
        return states.clone()  # not a view: a host may change its states in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        handle, group = ctx.handle, ctx.group
        if ctx.made_graph and handle.backward_pass is None:
            raise InputError(
                "backward_pass: expected to be told what carries the term where a backward pass makes a graph "
                "(create_graph=True) and another comes by: 1, that one alone (MAML: its gradient is a step), or (1, 2), both "
                "(a penalty on the gradient, added to the loss); got None"
            )
        ctx.made_graph |= torch.is_grad_enabled()
        ctx.backward_passes += 1
        group.backward_passes = max(group.backward_passes, ctx.backward_passes)
        carried = ctx.backward_passes in riding(handle.backward_pass)
        handle.passed(group, carried)
        on_term = None
        if carried:
            # only now is it known how many text passes share the loss
            share = handle.loss_scale / (group.passes * handle.forward_passes)
            on_term = torch.full((), share, dtype=ctx.dtype, device=ctx.device)
            if handle.scaler:
                on_term = handle.scaler.scale(on_term)
        return None, None, on_term, gradient


def riding(backward_pass: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The backward passes that carry the term, counted from 1."""
    if backward_pass is None:
        return (1,)
    return backward_pass if isinstance(backward_pass, tuple) else (backward_pass,)
