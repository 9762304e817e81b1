"""What watches an attached model: its text passes, the backward passes through them, and whether the two meet."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from plpp_reg.attachment.callers import in_backward, in_checkpoint, stepping_scaler
from plpp_reg.attachment.discovery import Context, is_causal
from plpp_reg.attachment.entrance import ONE_DEVICE, Entrance, Prompts, upright
from plpp_reg.attachment.gradient_join import Group, Join, TextPass, riding
from plpp_reg.attachment.layout import Layouts, Rows, read_context
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import Components, PerplexityRegularizer


class Handle:
    """What :func:`attach` returns. ``last`` is for logs; ``remove()`` takes everything away again.

    ``scaler``, ``loss_scale``, ``backward_pass`` and ``forward_passes`` (see :func:`attach`) may be set between steps;
    ``ever_joined`` says whether any backward pass has carried the term.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: PerplexityRegularizer,
        norm: nn.Module,
        towers: list[nn.Module],
        prompt_learner: nn.Module,
        context: tuple[str, nn.Module, str],
        position: str | Tensor | None,
        states: str = "preceding",
    ) -> None:
        self.model, self.regularizer, self.states = model, regularizer, states
        self.final_norm, self.text_encoder, self.prompt_learner = norm, towers[0], prompt_learner
        self.scaler: Any = None
        self.loss_scale = 1.0
        self.backward_pass: int | tuple[int, ...] | None = None
        self.forward_passes = 1
        self.ever_joined = False
        self._context = Context(*context)
        self._entrance = Entrance(model, towers, regularizer.width)
        self._layouts = Layouts(prompt_learner, position, states)
        self._order_known = states == "own" or any(is_causal(tower) for tower in towers)
        self._told: set[str] = set()
        self._forget()
        self._hooks = [
            model.register_forward_pre_hook(self._before_model),
            norm.register_forward_hook(self._after_norm),
            *self._entrance.hooks,
        ]
        self._watch_context()

    def _forget(self) -> None:
        """What belongs to a step."""
        self._group: Group | None = None
        self._awaiting: list[Group] = []  # whose passes a reentrant checkpoint runs again in backward
        self._last_states: Tensor | None = None
        self._came_by: dict[Group, bool] = {}  # groups that this backward pass met: whether they carried the term
        self._unjoined = self._evaluated = self._joined = False  # since the last step: gradients without the term, with it
        self._hooked: Tensor | None = None
        self._context_hook = self._step_hook = None
        self._entrance.caught = []

    def __getstate__(self) -> dict[str, Any]:
        """A copied model has a handle of its own; what belongs to a step is not copied."""
        step = ("_group", "_awaiting", "_last_states", "_hooked", "_context_hook", "_step_hook", "_came_by")
        return {k: v for k, v in self.__dict__.items() if k not in step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def context(self) -> Tensor:
        """The learnable vectors, as the model has them now."""
        return self._context.value

    def remove(self) -> None:
        """The model is as it was before, to the bit; a second call does nothing."""
        for hook in (*self._hooks, self._context_hook, self._step_hook):
            if hook is not None:
                hook.remove()
        self._hooks = []
        self._forget()

    @property
    def last(self) -> Components | None:
        """The components of the newest loss, detached, means over the prompts of its text passes; None before the first.

        ``total`` is weighted, the two losses are not (nats). The perplexity is worked out when it is asked for.
        """
        group, means = self._group, self.losses
        if means is None:
            return None
        if group.summary is None:
            with torch.no_grad():
                nll = [_perplexity(self.regularizer, *measured).log() for measured in group.measured]
            group.summary = means._replace(perplexity=_mean(nll, group).exp())
        return group.summary

    @property
    def losses(self) -> Components | None:
        """As :attr:`last`, but the perplexity is nan where it would cost a look at the vocabulary."""
        if self._group is None or not self._group.measured:
            return None
        columns = zip(*(parts for parts, _, _ in self._group.measured), strict=True)
        return Components(*(_mean(column, self._group) for column in columns))

    @property
    def rows(self) -> int:
        """How many context vectors :attr:`last` is a mean over; its perplexity costs a pass over the vocabulary for each."""
        return sum(max(len(v), len(h)) * v.shape[1] for _, v, h in self._group.measured) if self._group else 0

    # ---- hooks of the forward pass -------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_model(self, module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled() or not self.context.requires_grad:
            return
        if in_backward():  # the second run of a checkpoint around the whole model
            self._group = Group()
            self._group.in_backward = True
            return
        if getattr(module, "_is_replica", False):
            raise InputError(ONE_DEVICE)
        self._watch_context()
        if self._trains(self.context):
            self._open_group()

    @torch.compiler.disable
    def _after_norm(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not (isinstance(output, Tensor) and output.dim() == 3 and self.regularizer.active and self.prompt_learner.training):
            self._entrance.caught = []
            return None
        if torch._C._are_functorch_transforms_active():
            raise InputError(
                "model: expected a forward pass that autograd follows, got one within torch.func (grad, vmap, …), which hooks "
                "cannot join: torch.autograd.grad does it, through torch.func.functional_call too"
            )
        prompts = self._entrance.take(output, self.regularizer.source)
        again = in_backward()  # a checkpoint runs the tower once more
        if prompts is None:
            self._refuse_second_call(output, again)
            return None
        hidden = self._upright_states(output, prompts)
        group, text_pass = self._first_run(prompts.root) if again else (self._group, None)
        rows = self._layouts.of(prompts.rows, self.context, hidden) if text_pass is None else text_pass.rows
        if rows is None:
            return None
        self._watch_context()
        if not torch.is_grad_enabled():
            if prompts.with_grad:
                raise InputError(_NO_GRADIENT)
            if not again and in_checkpoint():  # a reentrant one's first run: its second run makes the graph
                group = self._next_pass(TextPass(rows, prompts.root))
                if group not in self._awaiting:
                    self._awaiting.append(group)
            return None
        if not hidden.requires_grad:
            raise InputError(_NO_GRADIENT)
        self._check_order(prompts, hidden, rows)
        v, h = read_context(prompts.rows, hidden, rows, self.states, prompts.positions)
        self._check_scaler(v.device)
        parts = self.regularizer.components(v, h, with_perplexity=False)
        new = not again or group is None or group.in_backward
        text_pass = text_pass or TextPass(rows)
        if new:
            group = self._next_pass(text_pass)
            group.in_backward = again
        if text_pass in group.passes:
            group.measure(parts, v, h)
        states = Join.apply(self, group, text_pass, parts.total, output)
        if new:
            text_pass.join = weakref.ref(states.grad_fn)
        self._last_states = None if again else states.detach()
        return states

    def _first_run(self, prompts: Tensor) -> tuple[Group | None, TextPass | None]:
        """Of a reentrant checkpoint, whose second run's inputs are cut off from what made them; None of another."""
        for group in self._awaiting:
            for one in group.passes:
                first = one.prompts
                if first is not None and first.data_ptr() == prompts.data_ptr() and first.shape == prompts.shape:
                    return group, one
        return self._group, None

    # ---- what a pass holds ---------------------------------------------------------------------------------------

    def _trains(self, tensor: Tensor) -> bool:
        return self.regularizer.active and self.prompt_learner.training and tensor.requires_grad

    def _open_group(self) -> Group:
        before, awaited = self._group, max(riding(self.backward_pass))
        if before is not None and 0 < before.backward_passes < awaited:
            raise InputError(
                f"backward_pass: expected {awaited} backward passes through one forward pass, the term to ride on "
                f"the last; got {before.backward_passes}"
            )
        self._refuse_unjoined()
        self._joined = False
        if not in_backward():
            self._came_by = {}  # of a backward pass that did not reach the context: an attack on the images
            self._awaiting = [group for group in self._awaiting if not group.backward_passes]
        self._group = Group()
        return self._group

    def _next_pass(self, text_pass: TextPass) -> Group:
        """The group that a text pass belongs to: the model's forward pass, or, outside one, all since the last backward."""
        group = self._group
        if group is None or group.backward_passes:
            group = self._open_group()
        group.passes.append(text_pass)
        return group

    def _check_scaler(self, device: torch.device) -> None:
        if self.scaler is None and torch.is_autocast_enabled(device.type):
            if torch.get_autocast_dtype(device.type) == torch.float16:
                raise InputError(
                    "scaler: expected the GradScaler that goes with autocast to float16 (handle.scaler = …; False if there is "
                    "none): the term must be scaled as the loss is"
                )

    def _upright_states(self, hidden: Tensor, prompts: Prompts) -> Tensor:
        """The norm's output as (N, T, D)."""
        if hidden.shape[0] == hidden.shape[1]:
            return upright(hidden)
        return hidden if hidden.shape == prompts.rows.shape else hidden.transpose(0, 1)

    def _check_order(self, prompts: Prompts, hidden: Tensor, rows: Rows) -> None:
        """Once, of a tower whose code does not say so: that the state before a vector has not seen it."""
        if self._order_known:
            return
        row, place = int(rows.row[0]), int(rows.slot[0, 0]) - 1
        weights = torch.linspace(-1, 1, hidden.shape[2], device=hidden.device, dtype=hidden.dtype)  # a norm's sum is constant
        try:
            state = (hidden[row, place] * weights).sum()
            (seen,) = torch.autograd.grad(state, prompts.root, retain_graph=True)
        except RuntimeError as e:
            raise InputError(
                f"states: expected a tower whose order its gradient shows, got {str(e).splitlines()[0]!r}: attach "
                "before it is compiled or checkpointed"
            ) from e
        seen = seen if seen.shape == prompts.rows.shape else seen.transpose(0, 1)
        if seen[row, place + 1 :].any():
            raise InputError(
                f"states: expected a causal text tower for 'preceding', got {type(self.text_encoder).__name__}, whose states "
                "have seen the vectors that they would predict; states='own' needs no order"
            )
        self._order_known = True

    def _refuse_second_call(self, output: Tensor, again: bool) -> None:
        last = self._last_states
        if last is not None and output.requires_grad and not again and output.shape == last.shape:
            raise InputError(
                "final_norm: expected one call for each pass through the tower, got a second of "
                f"{type(self.final_norm).__name__}: which one the text features are read from cannot be told; name "
                "the last norm as final_norm="
            )

    # ---- the backward pass ---------------------------------------------------------------------------------------

    def passed(self, group: Group, carried: bool) -> None:
        """A backward pass came by the join of a text pass."""
        self._came_by[group] = carried or self._came_by.get(group, False)
        self.ever_joined |= carried
        self._last_states = None

    def tell(self, what: str, message: str) -> None:
        """Warn, of each ``what`` once."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(f"PLPP: {message}", stacklevel=3)

    def _watch_context(self) -> None:
        context = self.context
        if self._step_hook is None:
            self._step_hook = register_optimizer_step_pre_hook(functools.partial(_before_step, weakref.ref(self)))
            weakref.finalize(self, self._step_hook.remove)
        if self._hooked is not context and context.requires_grad:
            if self._context_hook is not None:
                self._context_hook.remove()
            self._context_hook = context.register_hook(functools.partial(_gradient_arrived, weakref.ref(self)))
            self._hooked = context

    def _arrived(self) -> None:
        """A backward pass has reached the context; it has been to all text passes that lie on its way."""
        met, self._came_by = self._came_by, {}
        if not self.regularizer.active:
            return
        if not self.prompt_learner.training and not met:
            self._evaluated = True
            return
        carried = sum(met.values())
        if carried:
            self._joined, self._unjoined, self._evaluated = True, False, False
            name = type(self.model).__name__
            if carried != self.forward_passes:
                self.tell(
                    f"{carried} forward passes",
                    f"{carried} forward passes of {name} met in one backward pass, forward_passes is {self.forward_passes}: "
                    f"the term counts {carried / self.forward_passes:g} times in this loss (attach's forward_passes= says how "
                    "many share one)",
                )
            for group in met:
                if group.carried < len(group.sharing):
                    self.tell(
                        "text passes",
                        f"a backward pass has met {group.carried} of the {len(group.sharing)} text passes of {name}'s forward "
                        "pass, the others' share of the term is not in it (one that no loss comes from belongs under "
                        "torch.no_grad())",
                    )
        elif not met and not self._joined:
            self._unjoined = True
            if self._group is not None and not self._group.passes:
                self._refuse_unjoined()

    def _refuse_unscaled(self) -> None:
        scaler = stepping_scaler()
        if self._joined and scaler is not None and scaler is not self.scaler:
            got = "another one" if self.scaler else repr(self.scaler)
            raise InputError(
                f"scaler: expected the GradScaler that scales the loss (attach's scaler=, or handle.scaler = …), got {got}: "
                "the term has joined a loss that is scaled by another factor than itself"
            )

    def _refuse_evaluated(self) -> None:
        evaluated, self._evaluated = self._evaluated, False
        if evaluated and not self._joined:
            raise InputError(
                f"prompt_learner: expected {type(self.prompt_learner).__name__} in training mode where {self._context.name} is "
                "trained, got evaluation mode, in which the term is off: call train() on it, or remove() on the handle"
            )

    def _refuse_unjoined(self) -> None:
        unjoined, self._unjoined = self._unjoined, False
        if not unjoined:
            return
        name, seen = self._context.name, self._group is not None and self._group.passes
        where = f"{type(self.text_encoder).__name__}'s {type(self.final_norm).__name__}"
        got = "such text passes that it did not come from" if seen else "no such text pass"
        raise InputError(
            f"model: a gradient reached {name} that the term did not join: expected a loss that comes from {where} after "
            f"prompts (N, T, {self.regularizer.width}) that depend on {name}, got {got}: name final_norm=, text_encoder= or "
            "context=; compile the model after attach"
        )


_NO_GRADIENT = (
    "text_encoder: expected its last norm's output to carry a gradient, got none: a part of it is checkpointed with "
    "use_reentrant=True; checkpoint the whole text encoder, or use use_reentrant=False"
)


def _gradient_arrived(handle: weakref.ref[Handle], gradient: Tensor) -> None:
    if (h := handle()) is not None:
        h._arrived()


def _before_step(handle: weakref.ref[Handle], optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    h = handle()
    if h is None or not h._hooks:
        return
    if h._unjoined or h._evaluated or h._joined:
        context = h.context
        if any(p is context for group in optimizer.param_groups for p in group["params"]):
            h._refuse_evaluated()
            h._refuse_unjoined()
            h._refuse_unscaled()
            h._joined, h._awaiting = False, []


def _mean(figures: Sequence[Tensor], group: Group) -> Tensor:
    """Of a figure of each text pass, over their prompts."""
    counts = [max(len(v), len(h)) for _, v, h in group.measured]
    return torch.stack([figure * (count / sum(counts)) for figure, count in zip(figures, counts, strict=True)]).sum()


def _perplexity(regularizer: PerplexityRegularizer, parts: Components, v: Tensor, h: Tensor) -> Tensor:
    """The figure where the losses had it at hand, else by one more look at the vocabulary."""
    return parts.perplexity if parts.perplexity.isfinite() else regularizer.components(v, h).perplexity
