"""Where a model that somebody else wrote has its text tower's last norm, its prompt learner and its context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from plpp_reg.errors import InputError

FINAL_NORMS = ("ln_final", "final_layer_norm")  # OpenAI's and open_clip's name, Hugging Face's


class Context(NamedTuple):
    """A parameter, by the module that holds it: who puts another one in its place is followed."""

    name: str
    holder: nn.Module
    leaf: str

    @property
    def value(self) -> Tensor:
        return getattr(self.holder, self.leaf)


def named_module(model: nn.Module, argument: str, given: nn.Module | str | None) -> nn.Module | None:
    if given is None or isinstance(given, nn.Module):
        return given
    if not isinstance(given, str):
        raise InputError(f"{argument}: expected a submodule or its name, got {type(given).__name__}")
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


def find_context_parameter(
    model: nn.Module, learner: nn.Module | None, given: nn.Parameter | str | None, width: int
) -> tuple[nn.Module, Context]:
    """The prompt learner and the context that it holds."""
    if isinstance(given, str):
        owner, _, leaf = given.rpartition(".")
        holder = named_module(model, "context", owner) if owner else model
        value = getattr(holder, leaf, None)
        if not isinstance(value, Tensor):
            raise InputError(f"context: expected the name of a parameter, got {given!r}")
        if getattr(holder, leaf) is not value:
            raise InputError(
                f"context: expected the name of a parameter, got {given!r}, which is made anew each time (a parametrization): "
                "name what it is made of, and the positions (position=)"
            )
        found = Context(given, holder, leaf)
    elif isinstance(given, Tensor):
        places = ((n, m, leaf) for n, m in model.named_modules() for leaf, p in m._parameters.items() if p is given)
        place = next(places, None)
        if place is None:
            _check_width(given, width)
            raise InputError(f"context: expected a parameter of {type(model).__name__}, got a tensor that is none of its own")
        found = Context(f"{place[0]}.{place[2]}".lstrip("."), *place[1:])
    else:
        found = _only_context(model, learner, width)
    _check_width(found.value, width)
    return learner or found.holder, found


def _check_width(parameter: Tensor, width: int) -> None:
    if parameter.dim() not in (2, 3) or parameter.shape[-1] != width:
        raise InputError(f"context: expected (M, {width}) or (C, M, {width}), got {tuple(parameter.shape)}")


def _only_context(model: nn.Module, learner: nn.Module | None, width: int) -> Context:
    found = [Context(name, module, "ctx") for name, module, _ in contexts(learner or model)]
    fitting = [f for f in found if f.value.shape[-1] == width]
    if found and not fitting:
        shapes = ", ".join(f"{f.name} {tuple(f.value.shape)}" for f in found)
        raise InputError(f"context: expected width {width}, the vocabulary's, got {shapes}")
    if not fitting:  # soft prompts by another name: what alone is trained in such a shape
        fitting = [
            Context(f"{name}.{leaf}".lstrip("."), module, leaf)
            for name, module in (learner or model).named_modules()
            for leaf, p in module._parameters.items()
            if p is not None and p.requires_grad and p.dim() in (2, 3) and p.shape[-1] == width
        ]
        if len(fitting) > 1:
            fitting = [f for f in fitting if not _is_a_layers(f)] or fitting
        if len(fitting) == 1 and _is_a_layers(fitting[0]):
            fitting = []
    if len(fitting) != 1:
        names = ", ".join(f.name for f in fitting[:4]) + (f" and {len(fitting) - 4} more" if len(fitting) > 4 else "")
        got = f"got {names}" if fitting else "found none"
        raise InputError(
            f"context: looked in {type(model).__name__} for one parameter named ctx, or for the one that is trained, "
            f"(M, {width}) or (C, M, {width}), {got}: give it as context="
        )
    return fitting[0]


def _is_a_layers(context: Context) -> bool:
    """Whether it is the weight of a layer, and no table of vectors."""
    return isinstance(context.holder, (nn.Linear, nn.MultiheadAttention)) or context.leaf in (
        "positional_embedding",
        "text_projection",
    )


def find_final_norm(
    model: nn.Module, given: nn.Module | str | None, text_encoder: nn.Module | None, width: int
) -> tuple[str, nn.Module]:
    """The module whose output is the states that the text features are read from, and its name."""
    if given is not None:
        norm = named_module(model, "final_norm", given)
        return next((n for n, m in model.named_modules() if m is norm), "final_norm"), norm
    if text_encoder is not None:
        own = [(n, text_encoder._modules[n]) for n in FINAL_NORMS if isinstance(text_encoder._modules.get(n), nn.Module)]
        if not own:
            own = list(_norms(text_encoder))
        if len(own) != 1:
            which = f"{len(own)} of them" if own else f"{type(text_encoder).__name__} without it"
            raise InputError(
                f"text_encoder: expected a module that holds ln_final, got {which}: name the last norm as final_norm="
            )
        found = own
    else:
        found = list(_norms(model))
        fitting = [(n, m) for n, m in found if _width(m) in (None, width)]
        found = fitting or found
        if len({id(m) for _, m in found}) > 1:  # a whole CLIP, which embeds tokens itself, only where there is no other
            alone = [(n, m) for n, m in found if "token_embedding" not in model.get_submodule(n.rpartition(".")[0])._modules]
            found = alone or found
        if len({id(m) for _, m in found}) > 1:
            named = [(n, m) for n, m in found if n.split(".")[-2:-1] == ["text_encoder"]]
            found = named if len(named) == 1 else found
        if len({id(m) for _, m in found}) != 1:
            towers = ", ".join(n.rpartition(".")[0] or n for n, _ in found)
            got = f"got {towers}" if found else "found none"
            raise InputError(
                f"text_encoder: looked in {type(model).__name__} for one text tower by its last norm, "
                f"{' or '.join(FINAL_NORMS)}, {got}: give it as text_encoder=, or the norm as final_norm="
            )
    name, norm = found[0]
    if _width(norm) not in (None, width):
        raise InputError(
            f"text_encoder: expected width {width}, the vocabulary's, got {name.rpartition('.')[2]} of width {_width(norm)}"
        )
    return name, norm


def _norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, m in module.named_modules(remove_duplicate=False):
        if name.rpartition(".")[2] in FINAL_NORMS:
            yield name, m


def _width(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) else None


def holders(model: nn.Module, norm: nn.Module) -> list[nn.Module]:
    """Every module of which ``norm`` is a part by name."""
    return [m for m in model.modules() if any(child is norm for child in m._modules.values())]


def refuse_bidirectional(tower: nn.Module) -> None:
    """A state that has seen the vector cannot predict it."""
    kind = getattr(getattr(tower, "config", None), "model_type", "")
    sees_all = str(kind).startswith("siglip") or (hasattr(tower, "pool_type") and getattr(tower, "attn_mask", 0) is None)
    if sees_all:
        raise InputError(
            f"states: expected a causal text tower for 'preceding', got {type(tower).__name__}, whose every position sees all "
            "others: its states have seen the vectors that they would predict; states='own' needs no order"
        )


def is_causal(tower: nn.Module) -> bool:
    """Whether the tower's own code says so: CLIP's mask, or Hugging Face's CLIP, whose text tower is always causal."""
    masks = [getattr(m, "attn_mask", None) for m in tower.modules()]
    masks = [m for m in masks if isinstance(m, Tensor) and m.dim() == 2 and m.shape[0] > 1]
    kind = getattr(getattr(tower, "config", None), "model_type", "")
    return any(bool(m[0, 1] == float("-inf")) for m in masks) or kind in ("clip", "clip_text_model")
