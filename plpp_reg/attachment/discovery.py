"""Where a model that somebody else wrote has its text encoder, its prompt learner and its context."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from plpp_reg.errors import InputError


def named_module(model: nn.Module, argument: str, given: nn.Module | str | None) -> nn.Module | None:
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


def find_learner(
    model: nn.Module, learner: nn.Module | None, given: nn.Parameter | str | None, width: int
) -> tuple[nn.Module, nn.Parameter]:
    if isinstance(given, str):
        owner, _, leaf = given.rpartition(".")
        holder = named_module(model, "context", owner) if owner else model
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
