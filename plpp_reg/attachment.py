"""``attach``: PLPP on a model that somebody else wrote, by hooks: its code, its forward pass and its checkpoint do not change.

Two modules are watched: the text encoder (its arguments are the prompts, with the context vectors among them) and its
``ln_final`` (its output is the states that precede them). The term joins at the text encoder's output: there the host's loss
and the term meet in one backward pass, so every prompt parameter gets the gradient of the sum, and the text tower runs once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.errors import InputError
from plpp_reg.regularizer import Components, PerplexityRegularizer

POSITIONS = ("end", "middle", "front")


class Layout(NamedTuple):
    """Where the context vectors stand in N prompts."""

    slot: Tensor  # (N, M) their positions
    owner: Tensor  # (N,) which of the contexts a prompt reads; 0 where all share one


class _Group:
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


class _Join(torch.autograd.Function):
    """The text features as they are. On the way back, the term gets the gradient of a summand of the loss."""

    @staticmethod
    def forward(ctx: Any, handle: Handle, group: _Group, term: Tensor, *features: Tensor) -> Tensor | tuple[Tensor, ...]:
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
    ) -> None:
        self.regularizer = regularizer
        self.text_encoder, self.prompt_learner, self.context = text_encoder, prompt_learner, context
        self.scaler: Any = None
        self.loss_scale = 1.0
        self.backward_pass = 1
        self._position = position
        self._hidden: Tensor | None = None
        self._in_text_encoder = False
        self._group: _Group | None = None
        self._layouts: list[tuple[torch.Size, Tensor | None, Layout | None]] = []
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
        self._layouts = []

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
        layout = self._layout(prompts, tokens)
        if layout is None:
            return output
        self._seen = True
        again = _in_backward()  # a checkpoint runs the text encoder once more
        if not torch.is_grad_enabled():  # the first run of a reentrant checkpoint: its second run makes the graph
            if not again:
                self._next_pass().run_again = True
            return output
        v, h = self._read(prompts, self._states(hidden, prompts), layout)
        self._check_scaler(prompts.device)
        if self.regularizer.vocabulary.device != v.device:
            self.regularizer.to(v.device)
        parts = self.regularizer.components(v, h, with_perplexity=False)
        group = self._group
        if not again or group is None or group.in_backward:
            group = self._next_pass()
            group.in_backward = again
        if not again or group.run_again or group.in_backward:
            group.measure(parts, v, h)
        return _joined(output, functools.partial(_Join.apply, self, group, parts.total))

    # ---- what a pass holds ---------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return self.context.shape[-1]

    def _trains(self, tensor: Tensor) -> bool:
        return self.regularizer.active and self.prompt_learner.training and tensor.requires_grad

    def _open_group(self) -> _Group:
        before = self._group
        if before is not None and 0 < before.backward_passes < self.backward_pass:
            raise InputError(
                f"backward_pass: expected {self.backward_pass} backward passes through one forward pass, the term to ride on "
                f"the last; got {before.backward_passes}"
            )
        self._group = _Group()
        return self._group

    def _next_pass(self) -> _Group:
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

    def _read(self, prompts: Tensor, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The vectors and the states before them, each distinct prompt once: v (1 or P, M, D), h (P, M, D)."""
        rows = distinct_prompts(prompts.detach(), layout)
        slot, row = layout.slot[rows], rows.unsqueeze(1)
        v, h = prompts[row, slot], hidden[row, slot - 1]
        if len(v) > 1 and (layout.owner == layout.owner[0]).all() and torch.equal(v, v[:1].expand_as(v)):
            v = v[:1]  # one context read in P places: its nearest words are looked up once
        return v, h

    def _layout(self, prompts: Tensor, tokens: Tensor | None) -> Layout | None:
        """Found once for the same tokenised prompts; None where the prompts do not depend on the context."""
        for shape, known, layout in self._layouts:
            if shape == prompts.shape and _same(known, tokens):
                return layout
        if self._position is None:
            layout = find_context(prompts, self.context)
        else:
            layout = self._told_layout(*prompts.shape[:2], prompts.device)
        if layout is not None and (int(layout.slot.min()) < 1 or int(layout.slot.max()) >= prompts.shape[1]):
            raise InputError("position: expected context vectors after the first token, to have a state before each")
        self._layouts = [*self._layouts[-7:], (prompts.shape, None if tokens is None else tokens.clone(), layout)]
        return layout

    def _told_layout(self, n: int, length: int, device: torch.device) -> Layout:
        m = self.context.shape[-2]
        owner = torch.arange(n) if self.context.dim() == 3 else torch.zeros(n, dtype=torch.long)
        if isinstance(self._position, Tensor):
            slot = self._position.cpu().long()
            if slot.shape not in ((m,), (n, m)):
                raise InputError(f"position: expected integers ({m},) or ({n}, {m}), got {tuple(slot.shape)}")
            return Layout(slot.expand(n, m).to(device), owner.to(device))
        order = torch.arange(m)
        lengths = torch.zeros(n, dtype=torch.long)
        if self._position != "end":
            names = getattr(self.prompt_learner, "name_lens", None)
            if names is None or len(names) != n:
                raise InputError(
                    f"position: expected name_lens, {n} token counts, on the prompt learner for {self._position!r}; give the "
                    f"positions themselves, integers ({n}, {m})"
                )
            lengths = torch.tensor(list(names))
        after = order >= (m // 2 if self._position == "middle" else 0)
        slot = 1 + order + lengths.unsqueeze(1) * after
        return Layout(slot.to(device), owner.to(device))


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
) -> Handle:
    """Add ``regularizer`` to the loss of ``model``, whatever that loss is: the same as ``loss + regularizer(v, h)``.

    The forward pass does not change by a bit. When a backward pass reaches the text features, the term's gradient joins. It
    acts while the prompt learner is in training mode and gradients are on. Each distinct prompt counts once; where one forward
    pass makes B text passes (CoCoOp: one an image) each counts 1/B.

    Args:
        model: whose forward pass one loss comes from; on one device, or within DistributedDataParallel.
        regularizer: made from the token embedding of this model's text tower; moved to the model's device.
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
    width = regularizer.vocabulary.shape[1]
    learner = _named_module(model, "prompt_learner", prompt_learner)
    learner, parameter = _find_context(model, learner, context, width)
    encoder = _named_module(model, "text_encoder", text_encoder) or find_text_encoder(model)
    norm = getattr(encoder, "ln_final", None)
    if not isinstance(norm, nn.Module):
        raise InputError(f"text_encoder: expected a module that holds ln_final, got {type(encoder).__name__} without it")
    there = getattr(norm, "weight", None)
    if isinstance(there, Tensor) and there.shape[-1] != width:
        raise InputError(f"text_encoder: expected width {width}, the vocabulary's, got ln_final of width {there.shape[-1]}")
    if any(isinstance(getattr(h, "__self__", None), Handle) for h in encoder._forward_hooks.values()):
        raise InputError("model: expected one without PLPP, this one has it: call remove() on the first handle")
    handle = Handle(model, regularizer, encoder, learner, parameter, position)
    handle.scaler, handle.loss_scale, handle.backward_pass = scaler, loss_scale, backward_pass
    return handle


_ONE_DEVICE = (
    "model: expected a model on one device, got nn.DataParallel: show one GPU (CUDA_VISIBLE_DEVICES=0), "
    "or use DistributedDataParallel"
)


# ---- finding the places ----------------------------------------------------------------------------------------------


def _named_module(model: nn.Module, argument: str, given: nn.Module | str | None) -> nn.Module | None:
    if not isinstance(given, str):
        return given
    try:
        return model.get_submodule(given)
    except AttributeError as e:
        names = ", ".join(name for name, _ in model.named_children())
        raise InputError(f"{argument}: expected the name of a submodule, got {given!r} (the model's own: {names})") from e


def contexts(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter ``ctx`` of two or three dimensions: its name, the module that holds it, itself."""
    for name, module in model.named_modules():
        parameter = module._parameters.get("ctx")
        if parameter is not None and parameter.dim() in (2, 3):
            yield f"{name}.ctx".lstrip("."), module, parameter


def _find_context(
    model: nn.Module, learner: nn.Module | None, given: nn.Parameter | str | None, width: int
) -> tuple[nn.Module, nn.Parameter]:
    if isinstance(given, str):
        owner, _, leaf = given.rpartition(".")
        holder = _named_module(model, "context", owner) if owner else model
        parameter = getattr(holder, leaf, None)
        if not isinstance(parameter, Tensor):
            raise InputError(f"context: expected the name of a parameter, got {given!r}")
        learner = learner or holder
    elif isinstance(given, Tensor):
        parameter = given
        holders = (m for m in model.modules() if any(p is given for p in m._parameters.values()))
        learner = learner or next(holders, model)
    else:
        found = list(contexts(learner or model))
        fitting = [f for f in found if f[2].shape[-1] == width]
        if found and not fitting:
            shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, _, p in found)
            raise InputError(f"context: expected width {width}, the vocabulary's, got {shapes}")
        if len(fitting) != 1:
            several = f"got {', '.join(name for name, _, _ in fitting)}" if fitting else "found none"
            raise InputError(
                f"context: looked in {type(model).__name__} for one parameter named ctx, (M, {width}) or (C, M, {width}), "
                f"{several}: give it as context="
            )
        _, holder, parameter = fitting[0]
        learner = learner or holder
    if parameter.dim() not in (2, 3) or parameter.shape[-1] != width:
        raise InputError(f"context: expected (M, {width}) or (C, M, {width}), got {tuple(parameter.shape)}")
    return learner, parameter


def find_text_encoder(model: nn.Module) -> nn.Module:
    """The one submodule that holds ``ln_final``; a whole CLIP, which embeds tokens itself, only where there is no other."""
    holders = {name: m for name, m in model.named_modules() if isinstance(m._modules.get("ln_final"), nn.Module)}
    towers = {name: m for name, m in holders.items() if "token_embedding" not in m._modules} or holders
    if len(towers) != 1:
        named = [m for name, m in towers.items() if name.rpartition(".")[2] == "text_encoder"]
        if len(named) == 1:
            return named[0]
        several = f"got {', '.join(towers)}" if towers else "found none"
        raise InputError(
            f"text_encoder: looked in {type(model).__name__} for one submodule that holds ln_final, {several}: "
            "give it as text_encoder="
        )
    return next(iter(towers.values()))


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


# ---- small parts -----------------------------------------------------------------------------------------------------


def _joined(output: Any, join: Callable[..., Any]) -> Any:
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


def _perplexity(regularizer: PerplexityRegularizer, parts: Components, v: Tensor, h: Tensor) -> Tensor:
    """The figure where the losses had it at hand, else by one more look at the vocabulary."""
    return parts.perplexity if parts.perplexity.isfinite() else regularizer.components(v, h).perplexity


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: then a forward pass is a checkpoint's second run."""
    return torch._C._current_graph_task_id() != -1
