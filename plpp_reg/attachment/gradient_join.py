"""A term that joins a loss on its way back: the tower's states pass through unchanged, and the term gets its gradient there."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from plpp_reg.attachment.layout import Rows
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import Components


class TextPass:
    """One pass through the text tower, and the backward passes that come by it."""

    def __init__(self, rows: Rows, prompts: Tensor | None = None) -> None:
        self.rows = rows
        self.prompts = prompts  # of one without gradients: a reentrant checkpoint's second run makes its graph
        self.join: weakref.ref[Any] | None = None  # the node in its graph
        self.backward_passes = 0
        self.made_graph = False  # one of them, with create_graph=True
        self.carried = False  # one of them, the term

    @property
    def reachable(self) -> bool:
        """Whether a loss can come from it: not where its graph is gone."""
        return self.join is None or self.join() is not None


class Group:
    """The text passes that belong to one loss: one of a model's forward pass, or more (CoCoOp: one an image)."""

    def __init__(self) -> None:
        self.passes: list[TextPass] = []
        self.in_backward = False  # its passes are seen in a second run alone: the whole model is checkpointed
        self.measured: list[tuple[Components, Tensor, Tensor]] = []  # all detached
        self.summary: Components | None = None
        self._sharing: list[TextPass] = []

    @property
    def sharing(self) -> list[TextPass]:
        """The passes that share the loss, as it was when the first backward pass came by."""
        self._sharing = self._sharing or [one for one in self.passes if one.reachable]
        return self._sharing

    def share(self, text_pass: TextPass) -> float:
        """Of one pass: each distinct prompt of the passes that share the loss counts once."""
        return text_pass.rows.distinct / sum(one.rows.distinct for one in self.sharing)

    @property
    def backward_passes(self) -> int:
        return max((one.backward_passes for one in self.passes), default=0)

    @property
    def carried(self) -> int:
        """How many text passes have had the term carried."""
        return sum(one.carried for one in self.passes)

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

    def tell(self, what: str, message: str) -> None:
        """Warn, of each ``what`` once."""


class Join(torch.autograd.Function):
    """The text tower's states as they are. On the way back, the term gets the gradient of a summand of the loss.

    That gradient is a constant, and the states' own passes through: both can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, handle: Term, group: Group, text_pass: TextPass, term: Tensor, states: Tensor) -> Tensor:
        ctx.handle, ctx.group, ctx.text_pass = handle, group, text_pass
        ctx.dtype, ctx.device = term.dtype, term.device
        ctx.set_materialize_grads(False)
        return states.clone()  # not a view: a host may change its states in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        handle, group, text_pass = ctx.handle, ctx.group, ctx.text_pass
        if text_pass not in group.passes:
            raise InputError(
                "text_encoder: expected a text pass that is seen in the forward pass, got one that a checkpoint with "
                "use_reentrant=True hides with its prompts: checkpoint the text encoder alone, or use use_reentrant=False"
            )
        if text_pass.made_graph and handle.backward_pass is None:
            raise InputError(
                "backward_pass: expected to be told what carries the term where a backward pass makes a graph "
                "(create_graph=True) and another comes by: 1, that one alone (MAML: its gradient is a step), or (1, 2), both "
                "(a penalty on the gradient, added to the loss); got None"
            )
        text_pass.made_graph |= torch.is_grad_enabled()
        text_pass.backward_passes += 1
        if text_pass.backward_passes == 2 and handle.backward_pass is None:
            handle.tell(
                "backward_pass",
                "a second backward pass came through one forward pass, the term rode on the first alone (attach's "
                "backward_pass= says on which: 1, 2, (1, 2))",
            )
        carried = text_pass.backward_passes in riding(handle.backward_pass)
        text_pass.carried |= carried
        handle.passed(group, carried)
        on_term = None
        if carried:
            # only now is it known how many text passes share the loss
            share = group.share(text_pass) * handle.loss_scale / handle.forward_passes
            on_term = torch.full((), share, dtype=ctx.dtype, device=ctx.device)
            if handle.scaler:
                on_term = handle.scaler.scale(on_term)
        return None, None, None, on_term, gradient


def riding(backward_pass: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The backward passes that carry the term, counted from 1."""
    if backward_pass is None:
        return (1,)
    return backward_pass if isinstance(backward_pass, tuple) else (backward_pass,)
