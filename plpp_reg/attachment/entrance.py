"""Where prompts enter a text tower: what its modules are called with, caught by hooks until its last norm is called.

The first of them that the tower's own input is made of are the prompts as they are: a text encoder's argument, Hugging Face's
``inputs_embeds``, what a token embedding was made to return. Where a tower is called inline there is only that input itself, to
which the positions have been added: they are taken off again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from plpp_reg.errors import InputError

ONE_DEVICE = (
    "model: expected a model on one device, got nn.DataParallel: show one GPU (CUDA_VISIBLE_DEVICES=0), "
    "or use DistributedDataParallel"
)
NEAR = 1e-2  # of a token's embedding: a start token that is there is there to the last bits of its dtype


class Caught(NamedTuple):
    """A tensor on its way into the tower."""

    tensor: Tensor
    inside: bool  # what a stack of layers was called with
    with_grad: bool  # whether operations were recorded when it came


class Prompts(NamedTuple):
    """What a text pass reads, (N, T, D), linked to the context."""

    rows: Tensor  # as it came: its bits tell prompts apart
    root: Tensor  # the very tensor that was caught
    positions: Tensor | None  # (T, D), part of ``rows``
    with_grad: bool


class Entrance:
    """The hooks.

    Args:
        model: which may add positions before it calls its tower.
        towers: modules that hold the last norm, or are called with prompts.
        width: D.
    """

    def __init__(self, model: nn.Module, towers: list[nn.Module], width: int) -> None:
        self.width = width
        self.places = [*towers, model]  # of positional embeddings, the likeliest first
        self.caught: list[Caught] = []
        self.hooks: list[Any] = []
        self._added: dict[bool, int | None] = {}  # inside or not -> which of the positional embeddings is part of the prompts
        for module, inside in _entered(towers):
            hook = self._entering_layers if inside else self._entering
            self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for tower in towers:
            for name, module in tower.named_modules():
                if isinstance(module, nn.Embedding) and module.embedding_dim == width and "position" not in name:
                    self.hooks.append(module.register_forward_hook(self._embedded))

    def __getstate__(self) -> dict[str, Any]:
        """What is on its way into the tower is not copied."""
        return {**self.__dict__, "caught": []}

    @torch.compiler.disable
    def _entering(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._catch(module, (*args, *kwargs.values()), False)

    @torch.compiler.disable
    def _entering_layers(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._catch(module, (*args, *kwargs.values()), True)

    @torch.compiler.disable
    def _embedded(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._catch(module, (output,), False)

    def _catch(self, module: nn.Module, values: tuple, inside: bool) -> None:
        if getattr(module, "_is_replica", False):
            raise InputError(ONE_DEVICE)
        flat = [t for v in values for t in (v if isinstance(v, (list, tuple)) else (v,))]
        for t in flat:
            if isinstance(t, Tensor) and t.dim() == 3 and t.is_floating_point() and t.shape[2] == self.width:
                if t.requires_grad:
                    self.caught.append(Caught(t, inside, torch.is_grad_enabled()))
                return

    def take(self, hidden: Tensor, embedding: Tensor) -> Prompts | None:
        """What made ``hidden``, the norm's output; None where nothing that carries a gradient was seen."""
        caught, self.caught = self.caught, []
        shape = hidden.shape
        turned = torch.Size((shape[1], shape[0], shape[2]))
        caught = [c for c in caught if c.tensor.shape in (shape, turned)]
        inputs = [c for c in caught if c.inside]
        others = [c for c in caught if not c.inside]
        made = inputs[-1].tensor if inputs else hidden
        entered = next((c for c in reversed(others) if _made_of(made, c.tensor)), inputs[-1] if inputs else None)
        if entered is None:
            return None
        rows = self._upright(entered, shape, embedding)
        return Prompts(rows, entered.tensor, self._positions(entered, rows, embedding), entered.with_grad)

    def _upright(self, entered: Caught, shape: torch.Size, embedding: Tensor) -> Tensor:
        """(N, T, D): a text encoder is called with it so; layers may be called with (T, N, D)."""
        x = entered.tensor
        if not entered.inside:
            return x
        if shape[0] != shape[1]:
            return x if x.shape == shape else x.transpose(0, 1)
        return upright(x)

    def _positions(self, entered: Caught, rows: Tensor, embedding: Tensor) -> Tensor | None:
        """(T, D) that are part of the prompts, told by their start token, which is a word; looked at once."""
        if entered.inside not in self._added:
            self._added[entered.inside] = self._which(entered, rows, embedding)
        number = self._added[entered.inside]
        return None if number is None else next(islice(self._tables(), number, None))[: rows.shape[1]]

    def _tables(self) -> Iterator[Tensor]:
        """The positional embeddings of this width: the tower's own, then the model's."""
        for place in self.places:
            for name, module in place.named_modules():
                own = getattr(module, "positional_embedding", None)
                own = module.weight if name.rpartition(".")[2] == "position_embedding" else own
                if isinstance(own, Tensor) and own.dim() == 2 and own.shape[1] == self.width:
                    yield own

    def _which(self, entered: Caught, rows: Tensor, embedding: Tensor) -> int | None:
        start = rows[0, 0].detach().to(embedding)
        if _is_word(start, embedding):
            return None
        for number, table in enumerate(self._tables()):
            if len(table) >= rows.shape[1] and _is_word(start - table[0].detach().to(embedding), embedding):
                return number
        if entered.inside:
            raise InputError(
                "text_encoder: expected a tower that is called with its prompts, or a start token that is one of the "
                "vocabulary once positional_embedding is taken off: what was added to the prompts cannot be told"
            )
        return None


def _is_word(x: Tensor, embedding: Tensor) -> bool:
    with torch.no_grad():
        distance = (embedding - x).norm(dim=1)
        nearest = distance.argmin()
        return bool(distance[nearest] <= NEAR * embedding[nearest].norm())


def upright(x: Tensor) -> Tensor:
    """(N, T, D) of what is that or (T, N, D), where N is T: all prompts begin alike, before and behind a causal tower."""
    with torch.no_grad():
        begins_alike = (x[:, 0] - x[:1, 0]).abs().amax() <= (x[0] - x[0, :1]).abs().amax()
    return x if bool(begins_alike) else x.transpose(0, 1)


def _entered(towers: list[nn.Module]) -> Iterator[tuple[nn.Module, bool]]:
    """The towers, and the modules below them that prompts enter first: a stack of layers (inside), or what embeds."""
    seen: set[int] = set()
    for tower in towers:
        for module, inside in [(tower, False), *_below(tower)]:
            if id(module) not in seen:
                seen.add(id(module))
                yield module, inside


def _below(tower: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    for child in tower.children():
        if any(isinstance(m, (nn.Conv1d, nn.Conv2d)) for m in child.modules()):  # an image tower
            continue
        stacks = [m for m in child.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
        if stacks:
            yield child, True
            if not isinstance(stacks[0], nn.ModuleList):
                yield stacks[0], True
            yield stacks[0][0], True
        elif any(isinstance(m, nn.Embedding) for m in child.modules()) and not isinstance(child, nn.Embedding):
            yield child, False


def _made_of(x: Tensor, source: Tensor) -> bool:
    """Whether ``source`` is among what ``x`` was made of, by the graph."""
    if x is source or x.grad_fn is None:  # no graph: a checkpoint's first run
        return True
    wanted = source.grad_fn
    return any(n is wanted or (wanted is None and getattr(n, "variable", None) is source) for n in graph_of(x))


def graph_of(x: Tensor, beyond: Tensor | None = None) -> Iterator[Node]:
    """The nodes of what ``x`` was made of, the nearest first; not those of what ``beyond`` was made of."""
    stop = None if beyond is None else beyond.grad_fn
    seen, ahead = {None, stop, x.grad_fn}, deque([x.grad_fn])
    while ahead:
        node = ahead.popleft()
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                ahead.append(following)
