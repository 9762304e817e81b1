"""``attach``: PLPP on a model that somebody else wrote, by hooks: its code, its forward pass and its checkpoint do not change.

Two modules are watched: the text encoder (its arguments are the prompts, with the context vectors among them) and its
``ln_final`` (its output is the states that precede them). The term joins at the text encoder's output: there the host's loss
and the term meet in one backward pass, so every prompt parameter gets the gradient of the sum, and the text tower runs once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from plpp_reg.attachment.discovery import contexts, find_learner, find_text_encoder, named_module
from plpp_reg.attachment.gradient_join import Group, Join, joined
from plpp_reg.attachment.layout import POSITIONS, Layout, Layouts, distinct_prompts, find_context, read_context
from plpp_reg.errors import InputError
from plpp_reg.loss.functional import STATES
from plpp_reg.loss.regularizer import Components, PerplexityRegularizer

# the parts in joining, layout and places keep their names here
__all__ = ["POSITIONS", "Handle", "Layout", "attach", "contexts", "distinct_prompts", "find_context", "find_text_encoder"]


class Handle:
    """What :func:`attach` returns. ``last`` is for logs; ``remove()`` takes everything away again.

    ``scaler``, ``loss_scale`` and ``backward_pass`` (see :func:`attach`) may be set between steps; ``ever_joined`` says whether
    any backward pass has carried the term.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: PerplexityRegularizer,
        text_encoder: nn.Module,
        prompt_learner: nn.Module,
        context: nn.Parameter,
        position: str | Tensor | None,
        states: str = "preceding",
    ) -> None:
        self.regularizer, self.states = regularizer, states
        self.text_encoder, self.prompt_learner, self.context = text_encoder, prompt_learner, context
        self.scaler: Any = None
        self.loss_scale = 1.0
        self.backward_pass = 1
        self._hidden: Tensor | None = None
        self._in_text_encoder = False
        self._group: Group | None = None
        self._layouts = Layouts(prompt_learner, context, position)
        self._seen = self.ever_joined = False
        self._forwards = 0
        self._hooks = [
            model.register_forward_pre_hook(self._before_model),
            text_encoder.register_forward_pre_hook(self._before_text),
            text_encoder.ln_final.register_forward_hook(self._after_ln_final),
            text_encoder.register_forward_hook(self._after_text, with_kwargs=True),
        ]

    def remove(self) -> None:
        """The model is as it was before, to the bit; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._group = self._hidden = None
        self._layouts.forget()

    @property
    def last(self) -> Components | None:
        """The components of the newest loss, detached, means over its text passes; None before the first.

        ``total`` is weighted, the two losses are not (nats). The perplexity is worked out when it is asked for.
        """
        group, means = self._group, self.losses
        if means is None:
            return None
        if group.summary is None:
            with torch.no_grad():
                nll = [_perplexity(self.regularizer, *measured).log() for measured in group.measured]
            group.summary = means._replace(perplexity=torch.stack(nll).mean().exp())
        return group.summary

    @property
    def losses(self) -> Components | None:
        """As :attr:`last`, but the perplexity is nan where it would cost a look at the vocabulary."""
        if self._group is None or not self._group.measured:
            return None
        columns = zip(*(parts for parts, _, _ in self._group.measured), strict=True)
        return Components(*(torch.stack(column).mean() for column in columns))

    @property
    def rows(self) -> int:
        """How many context vectors :attr:`last` is a mean over; its perplexity costs a pass over the vocabulary for each."""
        return sum(max(len(v), len(h)) * v.shape[1] for _, v, h in self._group.measured) if self._group else 0

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: Any) -> None:
        if _in_backward() or not torch.is_grad_enabled() or not self._trains(self.context):
            return
        if getattr(module, "_is_replica", False):
            raise InputError(_ONE_DEVICE)
        if self._forwards and not self._seen:
            raise InputError(
                f"text_encoder: expected a module that the model calls with prompt embeddings (N, T, {self._width}) which "
                f"depend on the context; {type(self.text_encoder).__name__} was not called so: name the right one"
            )
        self._forwards += 1
        self._open_group()

    def _before_text(self, module: nn.Module, args: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise InputError(_ONE_DEVICE)
        self._hidden, self._in_text_encoder = None, True

    def _after_ln_final(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._in_text_encoder:
            self._hidden = output

    def _after_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        prompts = next((t for t in tensors if t.dim() == 3 and t.is_floating_point() and t.shape[2] == self._width), None)
        hidden, self._hidden, self._in_text_encoder = self._hidden, None, False
        if prompts is None or not self._trains(prompts):
            return output
        tokens = next((t for t in tensors if t.dim() == 2 and not t.is_floating_point() and len(t) == len(prompts)), None)
        layout = self._layouts.of(prompts, tokens)
        if layout is None:
            return output
        self._seen = True
        again = _in_backward()  # a checkpoint runs the text encoder once more
        if not torch.is_grad_enabled():  # the first run of a reentrant checkpoint: its second run makes the graph
            if not again:
                self._next_pass().run_again = True
            return output
        v, h = read_context(prompts, self._states(hidden, prompts), layout, self.states)
        self._check_scaler(prompts.device)
        parts = self.regularizer.components(v, h, with_perplexity=False)
        group = self._group
        if not again or group is None or group.in_backward:
            group = self._next_pass()
            group.in_backward = again
        if not again or group.run_again or group.in_backward:
            group.measure(parts, v, h)
        return joined(output, functools.partial(Join.apply, self, group, parts.total))

    # ---- what a pass holds ---------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return self.context.shape[-1]

    def _trains(self, tensor: Tensor) -> bool:
        return self.regularizer.active and self.prompt_learner.training and tensor.requires_grad

    def _open_group(self) -> Group:
        before = self._group
        if before is not None and 0 < before.backward_passes < self.backward_pass:
            raise InputError(
                f"backward_pass: expected {self.backward_pass} backward passes through one forward pass, the term to ride on "
                f"the last; got {before.backward_passes}"
            )
        self._group = Group()
        return self._group

    def _next_pass(self) -> Group:
        """The group that a text pass belongs to: the model's forward pass, or, outside one, all since the last backward."""
        group = self._group
        if group is None or group.backward_passes:
            group = self._open_group()
        group.passes += 1
        return group

    def _check_scaler(self, device: torch.device) -> None:
        if self.scaler is None and torch.is_autocast_enabled(device.type):
            if torch.get_autocast_dtype(device.type) == torch.float16:
                raise InputError(
                    "scaler: expected the GradScaler that goes with autocast to float16 (handle.scaler = …; False if there is "
                    "none): the term must be scaled as the loss is"
                )

    def _states(self, hidden: Any, prompts: Tensor) -> Tensor:
        """``ln_final``'s output as (N, T, D), linked to the prompts."""
        n, length, width = prompts.shape
        if isinstance(hidden, Tensor) and hidden.shape == (length, n, width) and length != n:
            hidden = hidden.transpose(0, 1)
        if not isinstance(hidden, Tensor) or hidden.shape != prompts.shape:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else "no call of it"
            raise InputError(f"text_encoder: expected its ln_final to give states {tuple(prompts.shape)}, got {got}")
        if not hidden.requires_grad:
            raise InputError(
                "text_encoder: expected its ln_final's output to carry a gradient, got none: a part of it is checkpointed with "
                "use_reentrant=True; checkpoint the whole text encoder, or use use_reentrant=False"
            )
        return hidden


def attach(
    model: nn.Module,
    regularizer: PerplexityRegularizer,
    *,
    text_encoder: nn.Module | str | None = None,
    prompt_learner: nn.Module | str | None = None,
    context: nn.Parameter | str | None = None,
    position: str | Tensor | None = None,
    scaler: Any = None,
    loss_scale: float = 1.0,
    backward_pass: int = 1,
    states: str = "preceding",
) -> Handle:
    """Add ``regularizer`` to the loss of ``model``, whatever that loss is: the same as ``loss + regularizer(v, h)``.

    The forward pass does not change by a bit. When a backward pass reaches the text features, the term's gradient joins. It
    acts while the prompt learner is in training mode and gradients are on. Each distinct prompt counts once; where one forward
    pass makes B text passes (CoCoOp: one an image) each counts 1/B.

    Args:
        model: whose forward pass one loss comes from; on one device, or within DistributedDataParallel.
        regularizer: made from the token embedding of this model's text tower.
        text_encoder: the module (or its name) that is called with prompt embeddings (N, T, D) and holds ``ln_final``; None: the
            one submodule that has a ``ln_final`` and no ``token_embedding``.
        prompt_learner: the module (or its name) whose mode says whether the model trains; None: the one that holds the context.
        context: the learnable vectors (M, D) or (C, M, D), or their name; None: the one parameter called ``ctx`` of that width.
        position: where they stand: "end", "middle", "front", or their positions (M,) or (N, M); None: found by following the
            gradient from the prompts to the context, which needs them to go into the prompts as they are, or shifted.
        scaler: the ``GradScaler`` of the training loop; False: there is none, even under autocast to float16.
        loss_scale: what else the loss is multiplied by before its backward pass: 1/k where k batches are accumulated and each
            loss is divided by k.
        backward_pass: on which of several backward passes through one forward pass the term rides: it counts once.
        states: which states are h: the "preceding" ones, which predict the vectors, or the vectors' "own".

    Returns:
        :class:`Handle`.

    Raises:
        InputError: no context or text encoder or more than one, another width, DataParallel, a second attach.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        raise InputError(_ONE_DEVICE)
    if not isinstance(regularizer, PerplexityRegularizer):
        raise InputError(f"regularizer: expected a PerplexityRegularizer, got {type(regularizer).__name__}")
    if isinstance(position, str) and position not in POSITIONS:
        raise InputError(f"position: expected one of {', '.join(map(repr, POSITIONS))} or a tensor, got {position!r}")
    if not isinstance(backward_pass, int) or backward_pass < 1:
        raise InputError(f"backward_pass: expected an integer >= 1, got {backward_pass!r}")
    if states not in STATES:
        raise InputError(f"states: expected one of {', '.join(map(repr, STATES))}, got {states!r}")
    width = regularizer.width
    learner = named_module(model, "prompt_learner", prompt_learner)
    learner, parameter = find_learner(model, learner, context, width)
    encoder = named_module(model, "text_encoder", text_encoder) or find_text_encoder(model)
    norm = getattr(encoder, "ln_final", None)
    if not isinstance(norm, nn.Module):
        raise InputError(f"text_encoder: expected a module that holds ln_final, got {type(encoder).__name__} without it")
    there = getattr(norm, "weight", None)
    if isinstance(there, Tensor) and there.shape[-1] != width:
        raise InputError(f"text_encoder: expected width {width}, the vocabulary's, got ln_final of width {there.shape[-1]}")
    if any(isinstance(getattr(h, "__self__", None), Handle) for h in encoder._forward_hooks.values()):
        raise InputError("model: expected one without PLPP, this one has it: call remove() on the first handle")
    handle = Handle(model, regularizer, encoder, learner, parameter, position, states)
    handle.scaler, handle.loss_scale, handle.backward_pass = scaler, loss_scale, backward_pass
    return handle


_ONE_DEVICE = (
    "model: expected a model on one device, got nn.DataParallel: show one GPU (CUDA_VISIBLE_DEVICES=0), "
    "or use DistributedDataParallel"
)


def _perplexity(regularizer: PerplexityRegularizer, parts: Components, v: Tensor, h: Tensor) -> Tensor:
    """The figure where the losses had it at hand, else by one more look at the vocabulary."""
    return parts.perplexity if parts.perplexity.isfinite() else regularizer.components(v, h).perplexity


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: then a forward pass is a checkpoint's second run."""
    return torch._C._current_graph_task_id() != -1
