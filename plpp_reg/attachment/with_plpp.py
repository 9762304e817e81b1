"""``with_plpp``: any trainer of Dassl's kind (``build_model``, ``forward_backward``, ``cfg``) with PLPP added to its loss."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from plpp_reg.attachment.attaching import attach
from plpp_reg.attachment.discovery import contexts
from plpp_reg.attachment.handle import Handle
from plpp_reg.errors import InputError
from plpp_reg.loss import SUFFIX
from plpp_reg.loss.functional import STATES
from plpp_reg.loss.settings import regularizer_from

T = TypeVar("T")


def with_plpp(
    trainer_class: type[T],
    *,
    text_encoder: str | None = None,
    prompt_learner: str | None = None,
    context: str | None = None,
    position: str | Tensor | None = None,
    embedding: str | Callable[[Any], Tensor] | None = None,
    loss_scale: float = 1.0,
    backward_pass: int | tuple[int, ...] | None = None,
    forward_passes: int = 1,
    final_norm: str | None = None,
) -> type[T]:
    """A subclass of ``trainer_class`` that trains with PLPP, named ``<its name>_PLPP``; the same one for the same arguments.

    After ``build_model`` the term is attached to ``self.model``; ``self.plpp`` is the handle. ``forward_backward`` is the
    trainer's own; to the losses that it returns for the log, ``loss_ppl`` and ``loss_inverse_ppl`` (weighted, nats) and
    ``perplexity`` are added, which Dassl prints and writes to tensorboard. Its ``loss`` stays what the trainer computed: the
    task's alone. The settings are ``cfg.TRAINER.PLPP`` where there is such a node, else the defaults; the checkpoint is the
    trainer's own.

    ``class X_PLPP(with_plpp(X))`` and ``X_PLPP = with_plpp(X)`` are alike. A type checker takes the latter, and ``@with_plpp``
    above a class; mypy follows no base class that a call returns.

    Args:
        trainer_class: the trainer.
        text_encoder, prompt_learner, context, position, loss_scale, backward_pass, forward_passes, final_norm: as in
            :func:`plpp_reg.attach`.
        embedding: the token embedding: its name below ``self.model``, or a function of the trainer that returns its weight;
            None: the embedding that ``build_model`` looked its tokenised prompts up in.

    Raises:
        InputError: ``trainer_class`` is no such trainer; on building: what :func:`plpp_reg.attach` raises, no embedding found.
    """
    if not isinstance(trainer_class, type) or not all(hasattr(trainer_class, n) for n in ("build_model", "forward_backward")):
        raise InputError(f"trainer_class: expected a class with build_model and forward_backward, got {trainer_class!r}")
    if issubclass(trainer_class, _WithPLPP):
        raise InputError(f"trainer_class: {trainer_class.__name__} has PLPP already")
    arguments = {"text_encoder": text_encoder, "prompt_learner": prompt_learner, "context": context, "position": position}
    arguments |= {"loss_scale": loss_scale, "backward_pass": backward_pass, "forward_passes": forward_passes}
    return _subclass(trainer_class, embedding, (*arguments.items(), ("final_norm", final_norm)))


@functools.cache
def _subclass(trainer_class: type, embedding: Any, arguments: tuple) -> type:
    body = {
        "__doc__": f"{trainer_class.__name__} with PLPP (plpp_reg.with_plpp).",
        "__module__": trainer_class.__module__,
        "plpp_embedding": embedding if embedding is None or isinstance(embedding, str) else staticmethod(embedding),
        "plpp_arguments": dict(arguments),
    }
    return type(trainer_class.__name__ + SUFFIX, (_WithPLPP, trainer_class), body)


class _WithPLPP:
    """Stands before a trainer in a class's bases."""

    plpp: Handle
    plpp_embedding: Any = None
    plpp_arguments: dict[str, Any] = {}

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        with embeddings_used() as used:
            built = super().build_model(*args, **kwargs)
        model = self._plpp_model()
        weight = self._plpp_weight(model, used)
        node = getattr(getattr(self.cfg, "TRAINER", None), "PLPP", None) or {}
        regularizer, states = regularizer_from(node, weight), node.get("STATES", STATES[0])
        self.plpp = attach(model, regularizer, scaler=find_scaler(self), states=states, **self.plpp_arguments)
        settings = f"weight {regularizer.weight:g}, inverse weight {regularizer.inverse_weight:g}, top-k {regularizer.top_k}"
        print(f"PLPP: attached to {type(self.plpp.prompt_learner).__name__}.ctx {tuple(self.plpp.context.shape)} ({settings})")
        return built

    def forward_backward(self, *batch: Any) -> Any:
        self.plpp.scaler = find_scaler(self) or self.plpp.scaler
        summary = super().forward_backward(*batch)
        figures = self._plpp_figures()
        if isinstance(summary, dict):
            summary.update(figures)
        elif figures and callable(getattr(self, "write_scalar", None)):
            step = self.epoch * self.num_batches + self.batch_idx
            for name, value in figures.items():
                self.write_scalar(f"train/{name}", value, step)
        return summary

    def _plpp_figures(self) -> dict[str, float]:
        handle = self.plpp
        if not handle.regularizer.active:
            return {}
        last_batch = getattr(self, "batch_idx", 0) + 1 >= getattr(self, "num_batches", 1)
        if last_batch and not handle.ever_joined:
            raise InputError(
                f"{type(self).__name__}: expected forward_backward to call {type(handle.text_encoder).__name__} with prompts "
                "made of the context, and a backward pass through its features, got none so far"
            )
        if not handle.rows:
            return {}
        # where every class has vectors of its own, the perplexity costs a pass over the vocabulary for each: once an epoch
        parts = handle.last if handle.rows <= handle.regularizer.rows_at_once or last_batch else handle.losses
        figures = {f"loss_{name}": loss for name, loss in handle.regularizer.terms(parts).items()}
        figures["perplexity"] = parts.perplexity
        values = torch.stack([figure.detach() for figure in figures.values()]).tolist()  # in one transfer
        return {name: v for name, v in zip(figures, values, strict=True) if name != "perplexity" or math.isfinite(v)}

    def _plpp_model(self) -> nn.Module:
        model = getattr(self, "model", None)
        registered = list(getattr(self, "_models", {}).values())
        if not isinstance(model, nn.Module) and len(registered) == 1:  # of what the trainer holds, that which holds it (KDPL)
            whole = [
                m for m in vars(self).values() if isinstance(m, nn.Module) and any(p is registered[0] for p in m.modules())
            ]
            model = max(whole or registered, key=lambda m: len(list(m.modules())))
        if not isinstance(model, nn.Module):
            raise InputError(f"{type(self).__name__}: expected build_model to set self.model, got {type(model).__name__}")
        return model

    def _plpp_weight(self, model: nn.Module, used: list[nn.Embedding]) -> Tensor:
        """(V, D), on the model's device."""
        source = self.plpp_embedding
        if isinstance(source, str):
            try:
                found = functools.reduce(getattr, source.split("."), model)
            except AttributeError as e:
                raise InputError(f"embedding: expected a name below {type(model).__name__}, got {source!r} ({e})") from e
            return getattr(found, "weight", found)
        if source is not None:
            return source(self)
        inside = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        # the right width first, so that another one is refused with both widths named
        widths = {parameter.shape[-1] for _, _, parameter in contexts(model)}
        everything = [*inside, *used]
        fitting = [m for m in everything if m.embedding_dim in widths] or everything
        if not fitting:
            raise InputError(
                f"embedding: looked for the nn.Embedding in which build_model of {type(self).__name__} looks its prompts up, "
                "found none: give it as embedding="
            )
        first = fitting[0].weight
        if any(not _equal(first, m.weight) for m in fitting[1:]):
            sizes = ", ".join(f"{m.num_embeddings} x {m.embedding_dim}" for m in fitting)
            raise InputError(f"embedding: expected one token embedding, got different ones ({sizes}): give it as embedding=")
        return first if fitting[0] in inside else first.detach().to(next(model.parameters()).device)


def find_scaler(trainer: Any) -> torch.amp.GradScaler | None:
    """The trainer's gradient scaler, whatever it is called; one that is enabled before one that is not."""
    scalers = [v for v in vars(trainer).values() if isinstance(v, torch.amp.GradScaler)]
    return max(scalers, key=lambda s: s.is_enabled(), default=None)


@contextlib.contextmanager
def embeddings_used() -> Iterator[list[nn.Embedding]]:
    """The embeddings that are called inside, in order: hosts keep CLIP's towers, but not its token embedding."""
    used: list[nn.Embedding] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Embedding) and not any(module is m for m in used):
            used.append(module)

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        yield used
    finally:
        hook.remove()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a.detach().cpu().float(), b.detach().cpu().float()))
