"""Method: what one prompt-learning method gives. The loop that trains it is :mod:`plpp_reg.engine.trainer`.

A method says as data or return value what varies: what its batches hold, its classes, its named losses, its logits. It never
sums, steps, casts, moves, logs or saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.clip.load import without_autocast
from plpp_reg.clip.prompts import PromptLearner, encode_together
from plpp_reg.clip.text import TextOutput, TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.data import DataSplit
from plpp_reg.engine.distributed import Ranks, current
from plpp_reg.engine.frozen import FrozenEncoder, normalize
from plpp_reg.engine.settings import Settings, precision, setting
from plpp_reg.errors import InputError

if TYPE_CHECKING:
    from plpp_reg.engine.teacher import Teacher

__all__ = ["Backbone", "Classes", "ContextSet", "Inputs", "Method", "Settings", "precision", "setting"]

Batch = dict[str, Tensor]
UNDECLARED = "class_features: the method does not say that they classify the frozen tower's features by themselves"


class Backbone(NamedTuple):
    """A frozen CLIP and its two towers."""

    model: nn.Module
    text: TextTower
    image: ImageTower


class ContextSet(NamedTuple):
    """Context vectors that PLPP may read, and the states that it reads them by: those before them, or their own."""

    context: Tensor  # v (M, D) or (P, M, D)
    hidden: Tensor  # h (1 or P, M, D)
    weight: float | None = None  # of PLPP's term of this set; None: of several sets each counts the same, and their sum is 1
    name: str = ""  # in the log, of several sets: ppl_<name>; empty: its number
    share: float = 1.0  # of a mean over prompts that are split by rank: this rank's number over the ranks' mean number


class Classes(NamedTuple):
    """The classes as a classifier has them."""

    features: Tensor  # (C, embed_dim) normalised, or (B, C, embed_dim) where each image has its own
    contexts: tuple[ContextSet, ...] = ()
    others: tuple[Tensor, ...] = ()  # further class features (C, embed_dim), normalised, that a loss reads and no prediction


@dataclass(frozen=True)
class Inputs:
    """What a method's batches hold of each image."""

    pixels: bool = False  # "img" (B, 3, H, W)
    labels: bool = True  # "label" (B,) in training batches; without it no loss can have read one
    features: Mapping[str, FrozenEncoder] = field(default_factory=dict)  # by their names in a batch: computed ahead, and kept
    training_features: Mapping[str, FrozenEncoder] = field(default_factory=dict)  # the same, of training batches alone

    def of(self, split: str) -> dict[str, FrozenEncoder]:
        """The features in the batches of "train", "val" or "test"."""
        return {**self.features, **(self.training_features if split == "train" else {})}


class Method(nn.Module):
    """One method, over a frozen CLIP and the names of the classes. Its parameters are exactly what is trained.

    A subclass gives a ``Config``, :meth:`build`, and as far as they differ from here :attr:`inputs`, :meth:`encode_classes`,
    :meth:`losses`, :meth:`logits`; some need :meth:`gradients`, :meth:`end_epoch`, :meth:`split`. What else can be known of
    it is declared by the attributes below.

    Args:
        config: its settings.
        clip: the frozen CLIP, which is no part of the module.
        classnames: C names.
        say: where a line for the log goes.
        teacher: of a method that :attr:`distils`; nothing of it is loaded before it is read.
    """

    @dataclass(frozen=True)
    class Config(Settings):
        """What the method reads of the configuration."""

    #: the folder of its checkpoints
    model_name: ClassVar[str] = "prompt_learner"
    #: whether it learns anything
    learns: ClassVar[bool] = True
    #: whether PLPP has something to act on, and so whether there is an X_PLPP
    learns_text_context: ClassVar[bool] = False
    #: whether each image has class features of its own, and they are encoded a batch instead of once a model state
    classes_depend_on_image: ClassVar[bool] = False
    #: whether it learns from a teacher, which TEACHER names and :attr:`teacher` is
    distils: ClassVar[bool] = False
    #: whether its predictions read its teacher's class features, so that its checkpoints keep them
    predicts_by_teacher: ClassVar[bool] = False
    #: whether :meth:`encode` shares the classes out among several processes
    splits_classes: ClassVar[bool] = True
    #: names of the losses whose gradients come to :meth:`gradients` apart, each by a backward pass of its own
    apart: ClassVar[tuple[str, ...]] = ()
    #: beginnings of names that upstream's checkpoints hold beside what was learned
    not_loaded: ClassVar[tuple[str, ...]] = ()
    #: beginnings of names that a checkpoint which is evaluated or started from may lack, for no prediction reads them
    optional: ClassVar[tuple[str, ...]] = ()
    #: the way out in the refusal of X_PLPP of a method without text context, where it is not to use X
    instead_of_plpp: ClassVar[str] = ""
    #: why class features do not classify the frozen tower's image features by scaled cosines; empty where they do. A class
    #: with another ``logits`` or ``image_features`` than its base says it again
    not_exported: ClassVar[str] = UNDECLARED

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"logits", "image_features"} & vars(cls).keys() and "not_exported" not in vars(cls):
            cls.not_exported = UNDECLARED

    def __init__(
        self,
        config: Settings,
        clip: Backbone,
        classnames: Sequence[str],
        say: Callable[[str], object] = lambda line: None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.clip, self.classnames, self.say, self._teacher = clip, list(classnames), say, teacher
        self.ranks, self._reads_contexts = current(), False
        self.frozen = FrozenEncoder(clip.image)
        self.metrics: dict[str, Tensor] = {}  # scalars that the log shows beside the losses
        self.build()
        for module in self.modules():
            if isinstance(module, PromptLearner):
                module.states = self.config.states

    # ---- what a method gives -------------------------------------------------------------------------------------

    def build(self) -> None:
        """Make what is learned, parameters and modules of ``self``, from its ``config``, ``clip`` and ``classnames``."""

    @property
    def saved(self) -> nn.Module:
        """The module whose state_dict is the checkpoint; another than ``self`` where upstream's files have shorter names."""
        return self

    @property
    def inputs(self) -> Inputs:
        """What its batches hold, which is the frozen tower's features as "features" unless it says otherwise."""
        return Inputs(features={"features": self.frozen})

    def encode_classes(self, image_features: Tensor | None = None, with_states: bool = False) -> Classes:
        """The classes by one text pass: of ``self.prompt_learner`` unless a method says otherwise.

        Args:
            image_features: (B, embed_dim), where :attr:`classes_depend_on_image`; None: the context as no image moved it.
            with_states: whether ``contexts`` is wanted, for PLPP.
        """
        return self.encode(self.prompt_learner, with_states=with_states)

    def losses(self, batch: Batch, classes: Classes) -> dict[str, Tensor]:
        """Named, weighted scalars, each of which is logged; the trainer adds PLPP's and sums."""
        return self.fit(self.logits(batch, classes), batch)

    def fit(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss that draws logits (B, C) to what the batch says of its images: cross-entropy with their labels."""
        return {"ce": self.cross_entropy(logits, batch["label"])}

    def logits(self, batch: Batch, classes: Classes) -> Tensor:
        """(B, C): scaled cosines."""
        return self.cosines(self.image_features(batch), classes.features)

    def image_features(self, batch: Batch) -> Tensor:
        """(B, embed_dim), normalised; the frozen tower's where the method learns nothing of it."""
        return self.frozen_features(batch)

    def gradients(self, rest: list[Tensor], apart: dict[str, list[Tensor]]) -> list[Tensor]:
        """What the optimizer steps by, one tensor a parameter.

        Args:
            rest: of the sum of all losses that are not :attr:`apart`; PLPP's terms ride on this one.
            apart: of each loss that is.
        """
        return rest

    def end_epoch(self, epoch: int) -> None:
        """After the last step of epoch 1, 2, ..., before it is measured and saved."""

    def split(self, data: DataSplit) -> DataSplit:
        """The images that it trains, chooses and tests on, of those that the configuration names."""
        return data

    @classmethod
    def settings_of(cls, state: Mapping[str, Tensor]) -> dict[str, object]:
        """Fields of ``Config`` that a checkpoint's tensors tell by their names and shapes: how many prompts, how deep."""
        return {}

    def method_state(self) -> dict[str, Any]:
        """What exact resume needs beside the parameters; tensors and plain values."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` gave."""

    @property
    def bound_to_classes(self) -> str:
        """Why what was learned cannot be used for other classes; empty where it can, as prompts can."""
        return ""

    # ---- what a method uses --------------------------------------------------------------------------------------

    @property
    def teacher(self) -> Teacher:
        """Of a method that :attr:`distils`.

        Raises:
            InputError: it was built without one.
        """
        if self._teacher is None:
            raise InputError(f"{type(self).__name__}: expected a teacher, got none")
        return self._teacher

    def encode(self, learner: PromptLearner, deep: Sequence[Tensor] = (), with_states: bool = False) -> Classes:
        """One text pass over the prompts of ``learner``: its classes, and its context set where states are asked for.

        ``deep``: for layers 1, 2, ... of the text tower (M, D) rows that replace the context's. Each rank computes its share.
        """
        out = learner(self.clip.text, with_states, deep, self._share_of(learner))
        return self._gathered(learner, out, with_states)

    def encode_together(self, learners: Sequence[PromptLearner], with_states: bool = False) -> list[Classes]:
        """As :meth:`encode`, of several learners whose contexts alone differ, in one text pass.

        Raises:
            InputError: more than that differs.
        """
        outputs = encode_together(learners, self.clip.text, with_states, self._share_of(learners[0]))
        return [self._gathered(learner, out, with_states) for learner, out in zip(learners, outputs, strict=True)]

    def _share_of(self, learner: PromptLearner) -> slice:
        """The classes that this rank encodes; where only contexts are read, and what one class says all say, the first."""
        one = self._reads_contexts and not learner.sees_names
        return slice(1) if one else slice(self.ranks.rank, None, self.ranks.size)

    def _gathered(self, learner: PromptLearner, out: TextOutput, with_states: bool) -> Classes:
        """All classes, of the share that was encoded."""
        count, features = len(learner.classnames), normalize(out.features)
        if self._reads_contexts and not learner.sees_names:  # nobody reads these features
            return Classes(features.expand(count, -1), (ContextSet(out.context, out.hidden),))
        share = len(features) * self.ranks.size / count if learner.sees_names else 1.0
        features = self.ranks.gather_rows(features, count)
        return Classes(features, (ContextSet(out.context, out.hidden, share=share),) if with_states else ())

    @torch.no_grad()
    def contexts(self) -> tuple[ContextSet, ...]:
        """Every context set as it is, with all its states; of a context that has seen no name, by its first class alone."""
        ranks, self.ranks, self._reads_contexts = self.ranks, Ranks(), True
        try:
            return self.encode_classes(with_states=True).contexts
        finally:
            self.ranks, self._reads_contexts = ranks, False

    def frozen_features(self, batch: Batch) -> Tensor:
        """(B, embed_dim), normalised, no gradient: CLIP's own, computed ahead ("features") or of the pixels ("img")."""
        return batch["features"] if "features" in batch else self.frozen.encode(batch["img"])

    def cosines(self, images: Tensor, classes: Tensor) -> Tensor:
        """Cosines times CLIP's scale: images (B, E), classes (C, E) or (B, C, E) -> (B, C)."""
        with without_autocast(images.device):
            scale = self.clip.model.logit_scale.exp()
            if classes.dim() == 3:
                return scale * (classes @ images.unsqueeze(-1)).squeeze(-1)
            return scale * images @ classes.t()

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Mean cross-entropy in float32; notes the batch accuracy for the log."""
        self.metrics["acc"] = 100 * (logits.argmax(1) == label).float().mean()
        return F.cross_entropy(logits.float(), label)
