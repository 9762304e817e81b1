"""``attach``: PLPP on a model that somebody else wrote, by hooks: its code, its forward pass and its checkpoint do not change.

The last norm of the text tower is watched: its output has the states of the context vectors, and what entered the
tower before is the prompts with the vectors among them. The term joins at those states: there the host's loss and the term
meet in one backward pass, so every prompt parameter gets the gradient of the sum, and the text tower runs once.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from plpp_reg.attachment.discovery import (
    find_context_parameter,
    find_final_norm,
    holders,
    named_module,
    refuse_bidirectional,
)
from plpp_reg.attachment.entrance import ONE_DEVICE
from plpp_reg.attachment.gradient_join import riding
from plpp_reg.attachment.handle import Handle
from plpp_reg.attachment.layout import POSITIONS
from plpp_reg.errors import InputError
from plpp_reg.loss.functional import STATES
from plpp_reg.loss.regularizer import PerplexityRegularizer


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
    backward_pass: int | tuple[int, ...] | None = None,
    states: str = "preceding",
    forward_passes: int = 1,
    final_norm: nn.Module | str | None = None,
) -> Handle:
    """Add ``regularizer`` to the loss of ``model``, whatever that loss is: the same as ``loss + regularizer(v, h)``.

    The forward pass does not change by a bit. When a backward pass reaches the text tower's states, the term's gradient joins.
    It acts while the prompt learner is in training mode and gradients are on. The term is the mean over the distinct prompts of
    a forward pass, of all its text passes (CoCoOp: one an image, each counts 1/B). A gradient that reaches the context without
    the term is an error, at the latest when the optimizer would step with it.

    Args:
        model: whose forward pass one loss comes from; on one device, or within DistributedDataParallel.
        regularizer: made from the token embedding of this model's text tower.
        text_encoder: the module (or its name) that holds the last norm; None: what holds the one ``ln_final`` or
            ``final_layer_norm`` of the vocabulary's width. A tower that is called inline, layer by layer, needs no such module.
        prompt_learner: the module (or its name) whose mode says whether the model trains; None: the one that holds the context.
        context: the learnable vectors (M, D) or (C, M, D), or their name; None: the one parameter called ``ctx`` of that
            width, or the one of that shape that is trained.
        position: where they stand: "end", "middle", "front", or their positions (M,) or (N, M); None: found by following the
            gradient from the prompts to the context, which needs them to go into the prompts as they are, or shifted.
        scaler: the ``GradScaler`` of the training loop; False: there is none, even under autocast to float16.
        loss_scale: what else the loss is multiplied by before its backward pass: 1/k where k batches are accumulated and each
            loss is divided by k.
        backward_pass: on which of several backward passes through one forward pass the term rides, or on which ones; None: on
            the first, as long as no other comes by a graph that a backward pass has made (``create_graph=True``).
        states: which states are h: the "preceding" ones, which predict the vectors, or the vectors' "own".
        forward_passes: how many forward passes of ``model`` share one loss (two views of FixMatch or R-Drop: 2); each counts
            1/n. A backward pass that meets another number of them says so, once.
        final_norm: the module (or its name) whose output (N, T, D) is the states; None: see ``text_encoder``.

    Returns:
        :class:`Handle`.

    Raises:
        InputError: no context or text tower or more than one, another width, a tower that is not causal, DataParallel, a second
            attach to one context. In a backward pass or an optimizer's step: the term did not join.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        raise InputError(ONE_DEVICE)
    if not isinstance(regularizer, PerplexityRegularizer):
        raise InputError(f"regularizer: expected a PerplexityRegularizer, got {type(regularizer).__name__}")
    if isinstance(position, str) and position not in POSITIONS:
        raise InputError(f"position: expected one of {', '.join(map(repr, POSITIONS))} or a tensor, got {position!r}")
    if isinstance(position, Tensor) and position.is_floating_point():
        raise InputError(f"position: expected integers, got a tensor of {position.dtype}")
    if not all(_is_count(n) for n in riding(backward_pass)) or backward_pass == ():
        raise InputError(f"backward_pass: expected an integer >= 1, or a tuple of them, got {backward_pass!r}")
    if not _is_count(forward_passes):
        raise InputError(f"forward_passes: expected an integer >= 1, got {forward_passes!r}")
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)) or not 0 < loss_scale < math.inf:
        raise InputError(f"loss_scale: expected a finite number > 0, got {loss_scale!r}")
    if scaler is not None and scaler is not False and not callable(getattr(scaler, "scale", None)):
        raise InputError(f"scaler: expected a GradScaler, None or False, got {scaler!r}")
    if states not in STATES:
        raise InputError(f"states: expected one of {', '.join(map(repr, STATES))}, got {states!r}")
    width = regularizer.width
    learner = named_module(model, "prompt_learner", prompt_learner)
    learner, parameter = find_context_parameter(model, learner, context, width)
    encoder = named_module(model, "text_encoder", text_encoder)
    _, norm = find_final_norm(model, final_norm, encoder, width)
    held_by = holders(model, norm)
    towers = list({id(m): m for m in (encoder, *_outermost_last(held_by)) if m is not None}.values()) or [norm]
    if states == "preceding":
        for tower in towers:
            refuse_bidirectional(tower)
    for handle in attached(model):
        if handle.context is parameter.value:
            raise InputError(
                f"model: expected {parameter.name} without PLPP, this one has it: call remove() on the first handle "
                "(plpp_reg.attachment.attached(model) lists them, of a copied model too)"
            )
    if not parameter.value.requires_grad:
        warnings.warn(f"PLPP: {parameter.name} is frozen: the term is off as long as it is", stacklevel=2)
    _forget_compiled(model)
    handle = Handle(model, regularizer, norm, towers, learner, parameter, position, states)
    handle.scaler, handle.loss_scale = scaler, loss_scale
    handle.backward_pass, handle.forward_passes = backward_pass, forward_passes
    return handle


def attached(model: nn.Module) -> list[Handle]:
    """The handles of ``model``, of a copy of an attached one too: a copy keeps the term."""
    hooks = (getattr(hook, "__self__", None) for m in model.modules() for hook in m._forward_hooks.values())
    return list({id(h): h for h in hooks if isinstance(h, Handle)}.values())


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1


def _outermost_last(modules: list[nn.Module]) -> list[nn.Module]:
    """Text encoders before a whole CLIP, which embeds tokens itself."""
    return sorted(modules, key=lambda m: "token_embedding" in m._modules)


def _forget_compiled(model: nn.Module) -> None:
    """What torch.compile has made of the model knows of no hooks: it is made anew."""
    compiled = (hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    if any(compiled):
        torch.compiler.reset()
