"""Which passes through the towers a method makes, read from the method itself: its own step and its own test, on no numbers.

A trainer is built on a CLIP without weights (plpp_reg/clip/architectures.py), and its towers are replaced by ones that note
what they are asked and answer with tensors of the right shape. So a method that somebody else wrote is read as ours are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.clip.load import PRECISIONS, set_precision
from plpp_reg.clip.text import TextOutput, TextTower
from plpp_reg.clip.tree import PromptTree
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError
from plpp_reg.estimate.operations import Cost, image_cost, text_cost
from plpp_reg.estimate.plpp_cost import Rows


@dataclass
class Pass:
    """One forward pass through a tower, and how often its gradient was asked for."""

    tower: str  # "text" or "image"
    cost: Cost
    together: int  # contexts G, or images B
    positions: int  # of the tree that are computed, or an image's
    prompts: int = 0  # visual prompts a layer
    learns: bool = False
    backwards: int = 0

    def follow(self, output: Tensor) -> Tensor:
        """``output``, whose gradients are counted."""
        if output.requires_grad:
            output.register_hook(lambda _: setattr(self, "backwards", self.backwards + 1))
        return output


class Passes(NamedTuple):
    """What a run of a method is made of.

    ``step``: a training step; ``once``: what the first step makes beside that and the method then keeps; ``classes``: what a
    test makes before its first batch; ``batch``: a test batch; ``plpp``: what PLPP reads in a step, None where it does not act.
    """

    step: list[Pass]
    once: list[Pass]
    classes: list[Pass]
    batch: list[Pass]
    plpp: Rows | None


class _NotedText(TextTower):
    def __init__(self, clip_model: nn.Module, memory_mib: float, notes: list[Pass]) -> None:
        super().__init__(clip_model, memory_mib)
        self.notes = notes

    def forward(self, tree: PromptTree, context: Tensor, deep: Sequence[Tensor] = (), need_hidden: bool = True) -> TextOutput:
        groups, (prompts, count) = len(context), tree.before.shape
        state = _depends_on((context, *deep)).to(self.dtype)
        learns = state.requires_grad
        note = Pass("text", text_cost(self, tree, groups, need_hidden, learns), groups, tree.positions, learns=learns)
        self.notes.append(note)
        features = note.follow(state.expand(groups, len(tree.order), self.text_projection.shape[1]).clone())
        hidden = state.new_empty(groups * prompts, count, self.ln_final.weight.shape[0]) if need_hidden else None
        return TextOutput(features, hidden)


class _NotedImage(ImageTower):
    def __init__(self, clip_model: nn.Module, notes: list[Pass]) -> None:
        super().__init__(clip_model)
        self.notes = notes

    def forward(self, images: Tensor, prompts: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        if prompts is not None:
            self.require_transformer()
        state = _depends_on(() if prompts is None else (prompts, *deep)).to(self.dtype)
        count, learns = 0 if prompts is None else len(prompts), state.requires_grad
        positions = len(self.visual.positional_embedding) + count if self.is_transformer else 0
        cost = image_cost(self, len(images), count, learns)
        self.notes.append(Pass("image", cost, len(images), positions, count, learns))
        return self.notes[-1].follow(state.expand(len(images), self.visual.output_dim).clone())


def _depends_on(learned: Sequence[Tensor]) -> Tensor:
    """A scalar on "meta" through which gradients reach what is learned there, and which has one if anything learned has.

    Not all of it need be there: ``Module.to`` makes new parameters for "meta", and a method's list may hold the old ones.
    """
    learns = torch.is_grad_enabled() and any(rows.requires_grad for rows in learned)
    root = torch.zeros((), device="meta", requires_grad=learns)
    return sum((rows.sum() for rows in learned if rows.device.type == "meta"), root)


def passes_of(trainer: PromptTrainer, images: int, test_images: int) -> Passes:
    """Run a step and a test batch of ``trainer``, which was built on a CLIP without weights; its towers are replaced for good.

    Args:
        trainer: the method.
        images: of a training batch.
        test_images: of a test batch.

    Raises:
        InputError: the method reads numbers (``.item()``), which are not there. Its other errors pass as they are.
    """
    notes: list[Pass] = []
    set_precision(trainer.clip_model, PRECISIONS[trainer.precision])
    trainer.tower = _NotedText(trainer.clip_model, trainer.tower.memory_mib, notes)
    trainer.image_tower = _NotedImage(trainer.clip_model, notes)
    trainer.cross_entropy = lambda logits, label: F.cross_entropy(logits.float(), label)  # without the accuracy, a number
    trainer.scaler = torch.amp.GradScaler(enabled=False)

    def noted(work: Callable[[], object]) -> list[Pass]:
        notes.clear()
        try:
            work()
        except RuntimeError as e:  # torch says NotImplementedError, which is one, or names the device "meta"
            if not isinstance(e, NotImplementedError) and not re.search(r"\bmeta\b", str(e)):
                raise
            first = (str(e).splitlines() or [type(e).__name__])[0]
            name = type(trainer).__name__
            raise InputError(f"trainer {name!r}: expected one whose steps run on shapes alone, got: {first}") from e
        return list(notes)

    def step() -> None:
        trainer.backward(trainer.compute_losses(_batch(trainer, "train", images)))

    plpp, first, later = None, [], []
    if trainer.trained():
        first, later = noted(step), noted(step)
        if trainer.plpp_acts:
            context, hidden = (t if t.dim() == 3 else t.unsqueeze(0) for t in trainer.plpp_reads)
            places, count = max(len(context), len(hidden)), context.shape[1]
            plpp = Rows(len(context) * count, places * count, new_each_step=not trainer.splits_classes)
    with torch.no_grad():
        classes = noted(trainer.prepare_inference)
        batch = noted(lambda: trainer.inference(_batch(trainer, "test", test_images)))
    return Passes(later, _without(first, later), classes, batch, plpp)


def _batch(trainer: PromptTrainer, split: str, images: int) -> dict[str, Tensor]:
    """What the trainer's own loader would give, without numbers."""
    side, width = trainer.clip_model.visual.input_resolution, trainer.clip_model.text_projection.shape[1]
    batch = {"label": torch.zeros(images, dtype=torch.long, device="meta")}
    if trainer.sees_pixels:
        batch["img"] = torch.empty(images, 3, side, side, device="meta")
    if trainer.features_ahead(split):
        batch["features"] = torch.empty(images, width, device="meta")
    return batch


def _without(passes: list[Pass], others: list[Pass]) -> list[Pass]:
    left = list(passes)
    for other in others:
        if other in left:
            left.remove(other)
    return left
