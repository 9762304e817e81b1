"""What the parts of a run compute and hold: the method's own step and its own test, run on tensors without numbers.

A trainer is built on a CLIP without weights (plpp_reg/clip/architectures.py), and what it asks of torch is noted: each
operation with its shapes, and the bytes of the tensors that are alive at once. No formula says what a tower or a method costs,
so whatever they become, and methods that somebody else wrote, are read as they are.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from plpp_reg.clip.load import PRECISIONS, set_precision
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.evaluation import Classifier
from plpp_reg.engine.frozen import FrozenEncoder
from plpp_reg.engine.method import Batch, ContextSet
from plpp_reg.engine.plpp import ContextTerms, Terms
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.estimate.operation import ATTENTION, ATTENTION_BACKWARD, Operation, Shape

TEXT, IMAGE, PLPP, OTHER, ALL = "text", "image", "plpp", "other", "all"
FEW = 4  # images of the passes that are timed where more would take long: such a pass takes as long as it has images

REAL_ATTENTION = F.scaled_dot_product_attention


@dataclass
class Work:
    """What a part of a run does.

    ``operations``: how often it makes each, by tower (:data:`TEXT`, :data:`IMAGE`, :data:`PLPP`, :data:`OTHER`), forward and
    backward. ``most``: the most bytes of tensors that a tower has made, or :data:`ALL`, and that are alive at once.
    """

    operations: Counter[tuple[str, Operation]] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)

    def counts(self, *towers: str) -> Counter[Operation]:
        """How often each operation is made, by these towers, or by all."""
        counts: Counter[Operation] = Counter()
        for (tower, operation), count in self.operations.items():
            if not towers or tower in towers:
                counts[operation] += count
        return counts

    def flops(self, *towers: str) -> int:
        """Floating-point operations as torch's FlopCounterMode has it, of these towers, or of all."""
        return sum(count * operation.flops for operation, count in self.counts(*towers).items())


class Passes(NamedTuple):
    """What a run of a method is made of, on the shapes that it will have.

    ``step``: a training step with its update; ``once``: what the first step makes beside that and the method then keeps;
    ``frozen``: frozen features of a canonical batch of images, by split; ``classes``: what a test makes before its first batch;
    ``batch``: a test batch; ``few_frozen`` and ``few``: the same of :data:`FEW` images at most. ``plpp``: of each context set
    that PLPP reads in a step the shapes of the vectors and of the states.
    """

    step: Work
    once: Work
    frozen: dict[str, Work]
    few_frozen: dict[str, Work]
    classes: Work
    batch: Work
    few: Work
    plpp: list[tuple[torch.Size, torch.Size]]


class Known(NamedTuple):
    """A call that was made before.

    ``result``: the shapes of what it gives, where that is new tensors without numbers, each in memory of its own; None: it is
    to be made again. Where it is known torch is not asked: its functions that find shapes take longer than all else here.
    """

    operation: Operation
    result: Any


class Tracer(TorchDispatchMode):
    """Notes in ``work`` what is asked of torch while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.work, self.tower = Work(), OTHER
        self.alive: dict[int, tuple[str, int]] = {}  # storages that were made here: of which tower, and how large
        self.bytes: Counter[str] = Counter()
        self.nodes: set[object] = set()
        self.known: dict[tuple, Known] = {}

    def __enter__(self) -> Tracer:
        F.scaled_dot_product_attention = _attend  # not by a TorchFunctionMode, which is not there in backward
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = REAL_ATTENTION

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, given = kwargs or {}, set()
        called = func, self._frozen(args, given), tuple((name, self._frozen(v, given)) for name, v in kwargs.items())
        key = called, tuple(map(_kind, (*args, *kwargs.values())))  # 1 == 1.0 == True, which make different tensors
        known = self.known.get(key)
        if known is None:
            out = func(*args, **kwargs)
            formula = FORMULAS.get(func.overloadpacket)
            operation = Operation(*called, formula(*args, **kwargs, out_val=out) if formula else 0)
            known = self.known[key] = Known(operation, _new(out, given))
        else:
            out = func(*args, **kwargs) if known.result is None else _made(known.result)
        self.work.operations[self.tower, known.operation] += 1
        for storage in {_storage(t) for t in ([out] if isinstance(out, Tensor) else tree_leaves(out)) if isinstance(t, Tensor)}:
            if storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = self.tower, storage.nbytes()
                self._add(self.tower, storage.nbytes())
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _frozen(self, value: Any, given: set[int]) -> Any:
        """An operation's argument, fit to be a key; the storages of its tensors join those that are ``given``."""
        if isinstance(value, Tensor):
            storage = _storage(value)._cdata
            given.add(storage)
            return Shape(tuple(value.shape), value.stride(), value.dtype, storage not in self.alive)
        return tuple(self._frozen(v, given) for v in value) if isinstance(value, (list, tuple)) else value

    def _freed(self, key: int) -> None:
        tower, size = self.alive.pop(key)
        self._add(tower, -size)

    def _add(self, tower: str, size: int) -> None:
        for what in (tower, ALL):
            self.bytes[what] += size
            self.work.most[what] = max(self.work.most[what], self.bytes[what])

    def watch(self, module: torch.nn.Module, tower: str) -> None:
        """What ``module`` does, in either direction, is the tower's."""
        module.register_forward_pre_hook(lambda *_: setattr(self, "tower", tower))

        def after(_module, _args, out) -> None:
            self.follow(out, tower)
            self.tower = OTHER

        module.register_forward_hook(after)

    def follow(self, outputs: Any, tower: str) -> None:
        """The way back from ``outputs`` is the tower's, as far as it is not another's already."""
        nodes = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self.nodes:
                self.nodes.add(node)
                node.register_prehook(lambda _: setattr(self, "tower", tower))
                nodes += [before for before, _ in node.next_functions]

    def of(self, work: Callable[[], object]) -> Work:
        """What one call of ``work`` does. What it leaves alive counts among the bytes of the next."""
        self.work, self.tower = Work(most=Counter(self.bytes)), OTHER
        with self:
            work()
        self.nodes.clear()
        return self.work


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    """Attention in one kernel that keeps no weights, as CPUs and GPUs have it; without numbers torch would take another."""
    mask = attn_mask if attn_mask is None or attn_mask.is_floating_point() else attn_mask.to(q.dtype)
    return ATTENTION(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


# torch has formulas of a GPU's fused attention alone
FORMULAS = {**flop_registry, ATTENTION: _attention_flops, ATTENTION_BACKWARD: _attention_backward_flops}


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _kind(value: Any) -> object:
    """What an argument's :class:`Shape` or value does not say of it."""
    return value.device if isinstance(value, Tensor) else type(value)


def _new(out: Any, given: set[int]) -> Any:
    """:attr:`Known.result` of what a call gave."""
    tensors = [t for t in (out if isinstance(out, tuple) else [out]) if t is not None]  # None: a gradient that nobody asks for
    if not tensors or not all(isinstance(t, Tensor) and t.is_meta for t in tensors):
        return None
    storages = {_storage(t)._cdata: _storage(t).nbytes() for t in tensors}
    shapes = [Shape(tuple(t.shape), t.stride(), t.dtype, False) for t in tensors]
    if storages.keys() & given or list(storages.values()) != [shape.nbytes for shape in shapes]:
        return None
    each = iter(shapes)
    return tuple(None if t is None else next(each) for t in out) if isinstance(out, tuple) else next(each)


def _made(result: Any) -> Any:
    """New tensors without numbers."""
    if isinstance(result, Shape):
        return torch.empty_strided(result.size, result.stride, dtype=result.dtype, device="meta")
    return None if result is None else tuple(map(_made, result))


def passes_of(trainer: Trainer, images: dict[str, int], canonical: dict[str, int]) -> Passes:
    """Run two steps and a test batch of ``trainer``, which was built on a CLIP without weights.

    Args:
        trainer: the method; it is of no further use.
        images: of a batch, of "train" and of "test".
        canonical: of a canonical batch of each.

    Raises:
        InputError: the method reads numbers (``.item()``), which are not there. Its other errors pass as they are.
    """
    tracer = Tracer()
    method = trainer.method
    teacher = trainer.teacher.loaded.method if trainer.teacher else None
    for tower in {method.clip.text, *([teacher.clip.text] if teacher else [])}:
        tracer.watch(tower, TEXT)
    for tower in {method.clip.image, *(encoder.tower for encoder in method.inputs.of("train").values())}:
        tracer.watch(tower, IMAGE)
    for model in {trainer.clip_model, *([teacher.clip.model] if teacher else [])}:
        set_precision(model, PRECISIONS[trainer.precision])
    trainer.scaler = torch.amp.GradScaler(enabled=False)
    reads: list[tuple[torch.Size, torch.Size]] = []
    if trainer.plpp is not None:
        trainer.plpp = _TracedTerms(trainer, tracer, reads)

    def step() -> None:
        reads.clear()
        losses, _ = trainer.losses(_batch(trainer, "train", images["train"]))
        tracer.follow(losses, OTHER)
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.backward(losses)
        tracer.tower = OTHER
        trainer.optimizer.step()

    def noted(work: Callable[[], object]) -> Work:
        try:
            return tracer.of(work)
        except RuntimeError as e:  # torch says NotImplementedError, which is one, or names the device "meta"
            if not isinstance(e, NotImplementedError) and not re.search(r"\bmeta\b", str(e)):
                raise
            first = (str(e).splitlines() or [type(e).__name__])[0]
            name = type(method).__name__
            raise InputError(f"trainer {name!r}: expected one whose steps run on shapes alone, got: {first}") from e

    classifiers: list[Classifier] = []

    def test(count: int) -> Work:
        return noted(lambda: classifiers[0](_batch(trainer, "test", count)))

    @functools.cache  # training and test images often meet the same encoders in batches of the same size
    def encoded_by(encoders: tuple[FrozenEncoder, ...], count: int) -> Work:
        return noted(lambda: [e.encode(_pixels(e.tower, count)) for e in encoders])

    def encoded(split: str, count: int) -> Work:
        return encoded_by(tuple(encoders_of(trainer, split)), count)

    first, later = (noted(step), noted(step)) if method.learns else (Work(), Work())
    with torch.no_grad():
        said = noted(teacher.encode_classes) if teacher else Work()
        return Passes(
            step=later,
            once=Work(first.operations - later.operations + said.operations),
            frozen={split: encoded(split, count) for split, count in canonical.items()},
            few_frozen={split: encoded(split, FEW) for split in canonical},
            classes=noted(lambda: classifiers.append(Classifier(method))),
            batch=test(images["test"]),
            few=test(min(FEW, images["test"])),
            plpp=reads,
        )


def encoders_of(trainer: Trainer, split: str) -> list[FrozenEncoder]:
    """What encodes the images of a split ahead; where there is a store, each of those that say the same once."""
    found: dict[object, FrozenEncoder] = {}
    for encoder in trainer.method.inputs.of(split).values():
        own = trainer.teacher.loaded.encoder if trainer.teacher and encoder is trainer.teacher.encoder else encoder
        shared = type(own) is FrozenEncoder and trainer.cfg.FEATURES.MAX_GIB > 0
        found.setdefault(own.tower.visual if shared else own, own)
    return list(found.values())


def _pixels(tower: ImageTower, images: int) -> Tensor:
    side = tower.visual.input_resolution
    return torch.empty(images, 3, side, side, device="meta")


def _batch(trainer: Trainer, split: str, images: int) -> Batch:
    """What the trainer's own loader would give, without numbers."""
    inputs, batch = trainer.method.inputs, {}
    if inputs.labels or split != "train":
        batch["label"] = torch.zeros(images, dtype=torch.long, device="meta")
    if inputs.pixels:
        batch["img"] = _pixels(trainer.method.clip.image, images)
    return {
        **batch,
        **{name: torch.empty(images, encoder.width, device="meta") for name, encoder in inputs.of(split).items()},
    }


class _TracedTerms(ContextTerms):
    """PLPP's terms, noted as PLPP's."""

    def __init__(self, trainer: Trainer, tracer: Tracer, reads: list[tuple[torch.Size, torch.Size]]) -> None:
        super().__init__(trainer.cfg, trainer.clip_model)
        self.tracer, self.reads = tracer, reads

    def __call__(self, contexts: Sequence[ContextSet], with_perplexity: bool) -> Terms:
        for context, hidden, *_ in contexts:
            self.reads.append(tuple((t if t.dim() == 3 else t.unsqueeze(0)).shape for t in (context, hidden)))
        self.tracer.tower = PLPP
        terms = super().__call__(contexts, with_perplexity=False)
        self.tracer.follow(terms, PLPP)
        self.tracer.tower = OTHER
        return terms
