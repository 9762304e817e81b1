"""Many seeds of one setting at once: their contexts pass the text tower together, and each is trained as if it were alone.

A run of a shared context over kept image features is little else than passes of the text tower over few rows. G contexts go
through it as they do for G images (:class:`plpp_reg.clip.text.TextTower`). Losses are the method's own, of each seed; their sum
is differentiated, in which a seed's context meets its own loss alone, and optimizers work element by element. So each seed's
context is what its single run would give, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from plpp_reg.clip.text import TextOutput, TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.data import DataSplit, Datum, load_dataset, sample_few_shot, subsample_classes
from plpp_reg.data.loaders import EpochBatches
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.features import FrozenFeatures
from plpp_reg.engine.frozen import FrozenEncoder, normalize
from plpp_reg.engine.method import Backbone, Classes, Method
from plpp_reg.engine.optim import build_lr_schedule, build_optimizer
from plpp_reg.engine.plpp import regularizer_for
from plpp_reg.engine.trainer import NonFiniteLoss
from plpp_reg.errors import InputError
from plpp_reg.trainers import TRAINERS

PRECISION = "fp32"  # one gradient scaler for all would skip a step of every seed where one seed's overflows
HALVES = ("base", "new")
# What a method may not change: the rest of it is one text pass over a shared context, and losses of given features
UNCHANGED = ("inputs", "encode_classes", "image_features", "logits", "end_epoch", "split", "method_state")


class Images(NamedTuple):
    """Features of a data set's images, normalised, each computed once."""

    data: DataSplit  # the whole data set, of which each seed samples its own images
    views: Tensor  # (V, n, embed_dim): of the training images that some seed sees, in each of V augmentations
    rows: dict[str, int]  # of each of those by name, its row of ``views``
    measured: Tensor  # (m, embed_dim): of the part that is measured on
    part: Sequence[Datum]  # that part


def read_images(cfg: CfgNode, clip_model: nn.Module, seeds: Iterable[int], split: str, data: DataSplit | None = None) -> Images:
    """The features that runs of ``seeds`` see, and those of the part ``split``, by the package's store.

    All seeds see the same augmentations, those of ``cfg.SEED``; ``cfg.INPUT.VIEWS`` is their number. ``data``: the whole data
    set; None: what ``cfg.DATASET`` names.

    Raises:
        InputError: no number of views, no images in that part, or what :func:`plpp_reg.data.load_dataset` refuses.
    """
    if cfg.INPUT.VIEWS < 1:
        raise InputError(f"INPUT.VIEWS: expected an integer >= 1 to train many seeds at once, got {cfg.INPUT.VIEWS}")
    node, seeds = cfg.DATASET, list(seeds)
    if data is None:
        load_dataset(node.NAME, node.ROOT, node.NUM_SHOTS, seeds[0])  # refuses a class of one's own with too few images
        data = load_dataset(node.NAME, node.ROOT)
    part = getattr(data, split)
    if not part:
        raise InputError(f"data set {node.NAME!r}: expected images in its {split} part, it has none")
    seen = {d.name for seed in seeds for d in sample_few_shot(data, node.NUM_SHOTS, seed).train}
    train = [d for d in data.train if d.name in seen]
    device = clip_model.text_projection.device
    encoder = FrozenEncoder(ImageTower(clip_model))
    kept = DataSplit(train, data.val, data.test, data.classnames)
    features = FrozenFeatures(encoder, cfg, kept, PRECISION, device, Ranks())
    views = torch.stack([features.of("train", view) for view in range(cfg.INPUT.VIEWS)])
    rows = {d.name: i for i, d in enumerate(train)}
    return Images(data, views.to(device), rows, features.of(split).to(device), part)


class Measured(NamedTuple):
    """How many images of each half each seed's prompts name rightly, and the perplexity of its context."""

    base: list[int]
    new: list[int]
    perplexity: list[float]


class ParallelSeeds:
    """Trains ``seeds`` of one method with one configuration on the base half of the classes.

    A seed's images, starting vectors and order of batches are those of ``plpp train --seed``; the augmentations are
    :func:`read_images`'s.

    Args:
        method: one that learns a shared context before the class name, over the frozen image tower: CoOp, KgCoOp, ProGrad.
        cfg: the configuration of each run.
        clip_model: the frozen CLIP, in float32 or float64.
        images: what the seeds see.
        seeds: G different ones.
        plpp_factor: of PLPP's weights in epoch 0, 1, 2, ...; None: 1.

    Raises:
        InputError: a method that does more than that, or a setting out of its range.
    """

    def __init__(
        self,
        method: type[Method],
        cfg: CfgNode,
        clip_model: nn.Module,
        images: Images,
        seeds: Sequence[int],
        plpp_factor: Callable[[int], float] | None = None,
    ) -> None:
        check_method(method)
        self.cfg, self.clip_model, self.images, self.seeds = cfg, clip_model, images, list(seeds)
        self.plpp_factor = plpp_factor or (lambda epoch: 1.0)
        self.clip = Backbone(clip_model, TextTower(clip_model, cfg.MODEL.TEXT_MEMORY_MIB), ImageTower(clip_model))
        samples = [subsample_classes(sample_few_shot(images.data, cfg.DATASET.NUM_SHOTS, s), "base") for s in self.seeds]
        device = images.views.device
        self.rows = torch.tensor([[images.rows[d.name] for d in sample.train] for sample in samples], device=device)  # (G, n)
        self.labels = torch.tensor([[d.label for d in sample.train] for sample in samples], device=device)
        self.methods = {half: self._built(method, half) for half in HALVES}
        starts = [self._built(method, "base", seed).prompt_learner.ctx.detach() for seed in self.seeds]
        self.context = nn.Parameter(torch.stack(starts))  # (G, M, D)
        self.regularizer = regularizer_for(cfg, clip_model) if cfg.TRAINER.PLPP.ENABLED else None
        self.optimizer = build_optimizer([self.context], cfg.OPTIM)
        self.schedule = build_lr_schedule(self.optimizer, cfg.OPTIM)

    def _built(self, method: type[Method], half: str, seed: int = 0) -> Any:
        """The method as the trainer makes it for ``seed``."""
        classnames = subsample_classes(self.images.data, half).classnames
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = method(method.Config.read(self.cfg), self.clip, classnames)
        if built.prompt_learner.sees_names:
            raise InputError(
                f"TRAINER.{method.Config.node}: expected a context that all classes share, before the class name "
                "(CSC False, CLASS_TOKEN_POSITION end), to train many seeds at once"
            )
        return built

    @property
    def plpp_acts(self) -> bool:
        return self.regularizer is not None and self.regularizer.active

    def train(self, after_epoch: Callable[[int], None] | None = None) -> None:
        """All epochs; ``after_epoch`` is called with 1, 2, ...

        Raises:
            NonFiniteLoss: a seed's context is not finite; the message names the seeds.
        """
        for epoch in range(self.cfg.OPTIM.MAX_EPOCH):
            for images, labels in self.batches(epoch):
                self.step(images, labels, epoch)
            if lost := [s for s, c in zip(self.seeds, self.context, strict=True) if not c.isfinite().all()]:
                raise NonFiniteLoss(f"the contexts of seeds {lost} are not finite after epoch {epoch + 1}")
            self.schedule.step()
            if after_epoch is not None:
                after_epoch(epoch + 1)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (G, B, embed_dim) and labels (G, B): of each seed the batch that its own run has."""
        size, views = self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE, self.cfg.INPUT.VIEWS
        samplers = [EpochBatches(self.rows.shape[1], size, seed, True, views=views) for seed in self.seeds]
        for sampler in samplers:
            sampler.epoch = epoch
        for batch in zip(*samplers, strict=True):
            view = batch[0][0][0]
            index = torch.tensor([[i for _, i in keys] for keys in batch], device=self.rows.device)
            yield self.images.views[view, self.rows.gather(1, index)], self.labels.gather(1, index)

    def step(self, images: Tensor, labels: Tensor, epoch: int) -> None:
        """One update of every seed's context."""
        losses = self.losses(images, labels, epoch)
        method = self.methods["base"]
        # (G, M, D) each
        apart = {name: torch.autograd.grad(losses.pop(name), self.context, retain_graph=True)[0] for name in method.apart}
        (rest,) = torch.autograd.grad(sum(losses.values()), self.context)
        if apart:
            each = [method.gradients([r], {n: [a[g]] for n, a in apart.items()})[0] for g, r in enumerate(rest)]
            rest = torch.stack(each)
        self.context.grad = rest
        self.optimizer.step()

    def losses(self, images: Tensor, labels: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """Named and weighted, each summed over the seeds: images (G, B, embed_dim), labels (G, B)."""
        out, method = self._text("base", self.plpp_acts), self.methods["base"]
        features = normalize(out.features)
        batches = [{"features": i, "label": label} for i, label in zip(images, labels, strict=True)]
        each = [method.losses(batch, Classes(f)) for batch, f in zip(batches, features, strict=True)]
        losses = {name: torch.stack([found[name] for found in each]).sum() for name in each[0]}
        if self.plpp_acts:
            factor = len(self.seeds) * self.plpp_factor(epoch)  # the regularizer's mean is over seeds too
            terms, _ = self.regularizer.weighted(self.context, out.hidden, with_perplexity=False)
            losses |= {name: factor * term for name, term in terms.items()}
        return losses

    def _text(self, half: str, need_hidden: bool) -> TextOutput:
        """One pass over the prompts of one half of the classes, with every seed's context."""
        tree = self.methods[half].prompt_learner.tree(self.clip.text.max_rows(len(self.seeds)))
        return self.clip.text(tree, self.context, need_hidden=need_hidden)

    @torch.no_grad()
    def measure(self) -> Measured:
        """The prompts as they are, on the part that ``images`` have for that."""
        hits = {}
        for half in HALVES:
            part, where = self.measured_on(half)
            images, labels = self.images.measured[where], torch.tensor([d.label for d in part], device=where.device)
            texts = normalize(self._text(half, need_hidden=False).features)
            hits[half] = [int((self.methods[half].cosines(images, text).argmax(1) == labels).sum()) for text in texts]
        regularizer = self.regularizer or regularizer_for(self.cfg, self.clip_model)
        hidden = self._text("base", need_hidden=True).hidden
        parts = [regularizer.components(v, h) for v, h in zip(self.context, hidden, strict=True)]
        return Measured(**hits, perplexity=[p.perplexity.item() for p in parts])

    def measured_on(self, half: str) -> tuple[list[Datum], Tensor]:
        """The images of one half that are measured on, relabelled, and their rows among those of both."""
        whole = DataSplit(self.images.data.train, [], self.images.part, self.images.data.classnames)
        part = list(subsample_classes(whole, half).test)
        place = {d.name: i for i, d in enumerate(self.images.part)}
        return part, torch.tensor([place[d.name] for d in part], device=self.images.measured.device)


def check_method(method: type[Method]) -> None:
    """
    Raises:
        InputError: it does more than losses of a shared context's class features.
    """
    if not taken(method):
        raise InputError(
            f"{method.__name__}: expected a method that learns a shared context over the frozen image tower "
            f"({', '.join(takes())}) to train many seeds at once"
        )


def taken(method: type[Method]) -> bool:
    """Whether a method is no more than losses of the class features that a shared context gives."""
    if not method.learns_text_context or method.classes_depend_on_image:
        return False
    return all(getattr(method, name) is getattr(Method, name) for name in UNCHANGED)


def takes() -> list[str]:
    """The package's methods of this kind."""
    from plpp_reg.engine import registry

    return [name for name in TRAINERS if taken(registry.find_trainer(name)[0])]
