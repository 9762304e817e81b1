"""``plpp estimate``: what a run will cost, in seconds and MiB, before it is started.

Operations and bytes are counted (operations.py) of the passes that the method itself makes (trace.py), over the
prompts as they are; a throughput that is measured here and now (throughput.py) turns them into seconds. PLPP is timed as
it is, on random vectors against a vocabulary of the run's size (plpp_cost.py). No weights are downloaded.

With the letters of DESIGN section 1, and ``t`` the seconds of a part of a step, ``N`` training images, ``e`` epochs::

    step  = t(text) + t(image) + t(PLPP)                      forward and backward; the optimizer's update is nothing beside it
    run   = e * steps * step + views * N * t(image, frozen) + once
                                                              steps = floor(N / B), at least 1
    test  = t(text, forward) + images * t(image, forward)     the classes once (CoCoOp: once an image)
    peak  = model + libraries + max(a step, frozen features, a test)
                                                              a step: kept(text, image, PLPP) + gradients + max(working);
                                                              the other two: max(working)

``N * t(image, frozen)`` is there where a method reads the frozen tower's features: once a (view, image), and not at all where
another run left them (``plpp cache``); ``views`` is e, or ``INPUT.VIEWS`` where that is set and less and all of them fit into
``FEATURES.MAX_GIB``.
``libraries`` is :data:`LIBRARIES_MIB`. Memory is what lives: an allocator may keep more (docs/cost.md), and the process itself
has some 700 MiB. Reading images from a disk and augmenting them is not counted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from plpp_reg.clip.architectures import clip_without_weights
from plpp_reg.clip.prompts import encode, eot_token, sos_token, tokenizer
from plpp_reg.data import DataSplit
from plpp_reg.data.loaders import load_data
from plpp_reg.engine.features import BATCH, canonical_batches
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError
from plpp_reg.estimate.operations import Cost, image_cost, most_kept
from plpp_reg.estimate.plpp_cost import plpp_cost, plpp_seconds
from plpp_reg.estimate.throughput import Machine, Throughput, image_throughput, text_throughput
from plpp_reg.estimate.trace import Pass, Passes, passes_of

MIB = 2**20
MOST_CLASSES = 100_000
LIBRARIES_MIB = {"cpu": 20.0, "cuda": 0.0}  # torch's own beside tensors; of a CPU by benchmarks/cost.py, of a GPU not measured
SHOTS, TEST_IMAGES = 16, 1000  # assumed where neither the configuration nor the data says
WORDS_A_NAME = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3)  # a typical data set's names: 1 to 3 words, 1.9 on average


class Part(NamedTuple):
    """Seconds, floating-point operations, and MiB: of a step's parts what is kept for backward, else the most that lives."""

    seconds: float = 0.0
    operations: float = 0.0
    mib: float = 0.0


class Estimate(NamedTuple):
    """What a run will cost. ``text``, ``image``, ``plpp`` are parts of ``step``.

    The ``mib`` of ``step``, ``ahead`` and ``test`` are what a process holds over the model, :data:`LIBRARIES_MIB` included.
    """

    trainer: str
    backbone: str
    classes: int
    batch: int
    precision: str
    device: str
    positions: int  # that the text tower computes in a step; upstream computes 77 a class, in CoCoOp a class and image
    step: Part
    text: Part
    image: Part
    plpp: Part
    ahead: Part  # an epoch's frozen image features; mib: while a batch of them is made
    steps: int  # an epoch
    epochs: int
    run_seconds: float
    test: Part
    test_images: int
    model_mib: float
    peak_mib: float  # the model, and the most of step, ahead and test over it
    gflop_a_second: dict[str, dict[str, float]]
    assumed: list[str]


def estimate(
    args: RunArguments,
    classes: int | None = None,
    data: DataSplit | None = None,
    clip_model: nn.Module | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Estimate the whole run that ``plpp train`` with the same arguments would make, from its first epoch to its test.

    Args:
        args: what to train.
        classes: number C of classes, with names of typical length; None: those of the configured data set, which is read.
        data: class names and images that are known already.
        clip_model: a CLIP without weights (on "meta") that is made already; None: what ``args`` name.
        clock: seconds; another one than the wall's for a machine that others use too.

    Raises:
        InputError: what ``plpp train`` would refuse; no data set and no ``classes``.
    """
    cfg, cls = resolve(args)
    cfg.MODEL.INIT_WEIGHTS = ""  # numbers alone
    assumed: list[str] = []
    if data is None and classes is None:
        try:
            data = load_data(cfg)
        except InputError as e:
            raise InputError(f"{e}; or name a number of classes: --classes N") from e
    elif data is None:
        data = DataSplit([], [], [], typical_names(classes))
        assumed.append(f"{classes} class names of typical length")
    log = RunLog(quiet=True)
    trainer = cls(cfg, data=data, clip_model=clip_model or clip_without_weights(cfg.MODEL.BACKBONE.NAME), log=log)
    shots = cfg.DATASET.NUM_SHOTS
    if not data.train and shots < 1:
        shots = SHOTS
        assumed.append(f"{SHOTS} shots")
    if not data.test:
        assumed.append(f"{TEST_IMAGES:,} test images")
    images, test_images = len(data.train) or shots * len(data.classnames), len(data.test) or TEST_IMAGES
    machine = Machine(trainer.device, trainer.computing, clock)
    return _priced(trainer, machine, images, test_images, assumed)


def typical_names(classes: int) -> list[str]:
    """``classes`` different names of one to three common words, always the same ones.

    Raises:
        InputError: ``classes`` is below 1 or above what any data set has.
    """
    if not 1 <= classes <= MOST_CLASSES:
        raise InputError(f"--classes: expected an integer from 1 to {MOST_CLASSES}, got {classes}")
    entries = (token.removesuffix("</w>") for token in tokenizer().encoder if token.endswith("</w>"))
    words = [word for word in entries if len(word) > 2 and word.isascii() and word.isalpha()]
    rng, names = random.Random(0), {}
    while len(names) < classes:
        names[" ".join(rng.sample(words, WORDS_A_NAME[len(names) % len(WORDS_A_NAME)]))] = None
    return list(names)


def _priced(trainer: PromptTrainer, machine: Machine, images: int, test_images: int, assumed: list[str]) -> Estimate:
    cfg, learns = trainer.cfg, bool(trainer.trained())
    batch = min(cfg.DATALOADER.TRAIN_X.BATCH_SIZE, images)
    test_batch = min(cfg.DATALOADER.TEST.BATCH_SIZE, test_images)
    for key, size in (("TRAIN_X", batch), ("TEST", test_batch)):
        if size < 1:
            raise InputError(f"DATALOADER.{key}.BATCH_SIZE: expected an integer >= 1, got {size}")
    made = passes_of(trainer, batch, test_batch)
    rates = _rates(trainer, made, machine)
    text, image = (_part(rates, [p for p in made.step if p.tower == tower]) for tower in ("text", "image"))
    plpp, costs = Part(), [p.cost for p in made.step]
    if made.plpp:
        costs.append(cost := plpp_cost(trainer.regularizer, made.plpp))
        seconds = plpp_seconds(trainer.regularizer, made.plpp, machine)
        plpp = Part(seconds, cost.forward + cost.backward, cost.kept / MIB)
    gradients = 2 * 4 * sum(p.numel() for p in trainer.trained())  # the gradient and the momentum, float32
    libraries = LIBRARIES_MIB[machine.device.type]
    step = Part(
        text.seconds + image.seconds + plpp.seconds,
        text.operations + image.operations + plpp.operations,
        libraries + (most_kept(costs) + gradients + max(c.working for c in costs)) / MIB if learns else 0.0,
    )
    ahead, for_test = (_features(trainer, split, n, rates) for split, n in (("train", images), ("test", test_images)))
    ahead = ahead._replace(mib=ahead.mib + libraries) if learns and ahead.mib else Part()
    steps, epochs = (max(1, images // batch), cfg.OPTIM.MAX_EPOCH) if learns else (0, 0)
    once = _part(rates, made.once)
    classes, a_batch = _part(rates, made.classes), _part(rates, made.batch)
    batches = test_images / test_batch
    test = Part(
        classes.seconds + batches * a_batch.seconds + for_test.seconds,
        classes.operations + batches * a_batch.operations + for_test.operations,
        libraries + max([for_test.mib, *(p.cost.working / MIB for p in made.classes + made.batch)]),
    )
    model_mib = sum(t.nbytes for t in (*trainer.clip_model.parameters(), *trainer.clip_model.buffers())) / MIB
    return Estimate(
        trainer=cfg.TRAINER.NAME,
        backbone=cfg.MODEL.BACKBONE.NAME,
        classes=len(trainer.data.classnames),
        batch=batch,
        precision=trainer.precision,
        device=_device(machine.device),
        positions=sum(p.together * p.positions for p in made.step if p.tower == "text"),
        step=step,
        text=text,
        image=image,
        plpp=plpp,
        ahead=ahead,
        steps=steps,
        epochs=epochs,
        run_seconds=epochs * steps * step.seconds + _views(trainer, images, epochs) * ahead.seconds + once.seconds,
        test=test,
        test_images=test_images,
        model_mib=model_mib,
        peak_mib=model_mib + max(step.mib, ahead.mib, test.mib),
        gflop_a_second={
            name: {what: v / 1e9 for what, v in rate._asdict().items() if v != float("inf")} for name, rate in rates.items()
        },
        assumed=assumed,
    )


def _features(trainer: PromptTrainer, split: str, images: int, rates: dict[str, Throughput]) -> Part:
    """Of the frozen tower, in its canonical batches; nothing where the split's batches have none of it."""
    if not trainer.features_ahead(split):
        return Part()
    sizes = Counter(map(len, canonical_batches(images)))
    costs = {size: image_cost(trainer.image_tower, size) for size in sizes}
    operations = sum(count * costs[size].forward for size, count in sizes.items())
    return Part(operations / rates["image"].inference, operations, max(cost.working for cost in costs.values()) / MIB)


def _views(trainer: PromptTrainer, images: int, epochs: int) -> int:
    """How often a run passes its images through the frozen tower: once a view, if the store has room for all views.

    Else each epoch: views come in turn and the longest unused is the first to go, so each is gone when it comes again.
    """
    views = min(epochs, trainer.cfg.INPUT.VIEWS or epochs)
    a_view = 4 * images * trainer.clip_model.text_projection.shape[1]  # bytes of float32
    kept = views * a_view <= trainer.cfg.FEATURES.MAX_GIB * 2**30
    return views if kept or views == 1 else epochs  # the last one is at hand without a store


def _part(rates: dict[str, Throughput], passes: Sequence[Pass]) -> Part:
    """A step's passes through one tower, or through both."""
    total = sum((p.cost for p in passes), Cost())
    operations = sum(p.cost.forward + p.backwards * p.cost.backward for p in passes)
    seconds = sum(rates[p.tower].seconds(p.cost, p.backwards) for p in passes)
    return Part(seconds, operations, (total.kept + total.again) / MIB)


def _rates(trainer: PromptTrainer, made: Passes, machine: Machine) -> dict[str, Throughput]:
    """Of the towers that the run passes through, at the shapes of its training step (without one, of its test)."""
    every = [*made.step, *made.once, *made.classes, *made.batch]
    rates = {}
    if text := [p for p in every if p.tower == "text"]:
        shape = _timed_shape(text)
        if trainer.learns_text_context:
            prompts, n_ctx = trainer.learner.prompts, trainer.learner.n_ctx
        else:
            prompts, n_ctx = [[sos_token(), *encode(f"{n}."), eot_token()] for n in trainer.data.classnames], 0
        rates["text"] = text_throughput(trainer.tower, prompts, n_ctx, machine, shape.together, shape.learns)
    image = [p for p in every if p.tower == "image"]
    if image or trainer.sees_frozen_features:
        shape = _timed_shape(image) if image else Pass("image", Cost(), BATCH, 0)
        rates["image"] = image_throughput(trainer.image_tower, machine, shape.together, shape.prompts, shape.learns)
    return rates


def _timed_shape(passes: Sequence[Pass]) -> Pass:
    """The first that learns, if any does: only then are a training step's forward and backward timed as well."""
    return next((p for p in passes if p.learns), passes[0])


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}"
