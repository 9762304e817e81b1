"""``plpp estimate``: what a run will cost, in seconds and MiB, before it is started.

The method's own step and test run on tensors without numbers, which tells the operations and the bytes that live at once
(trace.py). Each different operation is timed here and now (throughput.py); PLPP is timed as it is, on random
vectors against a vocabulary of the run's size. No weights are downloaded.

With the letters of plpp_reg/loss/functional.py, and ``t`` the seconds of a part, ``N`` training images, ``e`` epochs::

    step  = t(text) + t(image) + t(PLPP) + t(the losses, the update)        forward and backward
    run   = e * steps * step + views * N * t(image, frozen) + once
                                                              steps = floor(N / B), at least 1
    test  = t(text, forward) + images * t(image, forward)     the classes once (CoCoOp: once an image)
    peak  = model + libraries + max(a step, frozen features, a test)

``N * t(image, frozen)`` is there where a method reads the frozen tower's features: once a (view, image), and not at all where
another run left them (``plpp cache``); ``views`` is e, or ``INPUT.VIEWS`` where that is set and less and all of them fit into
``FEATURES.MAX_GIB``. A teacher's images are among them, and its class features are in ``once``; nothing of it is there where
another run left what it said. ``libraries`` is :data:`LIBRARIES_MIB`. Memory is what lives: an allocator may keep more
(docs/cost.md), and the process itself has some 700 MiB. Reading images from a disk and augmenting them is not counted.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from plpp_reg.clip.architectures import clip_without_weights
from plpp_reg.clip.prompts import tokenizer
from plpp_reg.data import DataSplit
from plpp_reg.data.loaders import load_data
from plpp_reg.engine.arguments import RunArguments, resolve
from plpp_reg.engine.features import canonical_batches
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.estimate.teacher import TeacherWithoutNumbers
from plpp_reg.estimate.throughput import Machine, operation_seconds, overhead, plpp_seconds
from plpp_reg.estimate.trace import ALL, FEW, IMAGE, PLPP, TEXT, Work, encoders_of, passes_of

MIB = 2**20
MOST_CLASSES = 100_000
LIBRARIES_MIB = {"cpu": 20.0, "cuda": 0.0}  # torch's own beside tensors; of a CPU by benchmarks/cost.py, of a GPU not measured
SHOTS, TEST_IMAGES = 16, 1000  # assumed where neither the configuration nor the data says
WORDS_A_NAME = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3)  # a typical data set's names: 1 to 3 words, 1.9 on average


class Part(NamedTuple):
    """Seconds, floating-point operations, and the most MiB that live at once."""

    seconds: float = 0.0
    operations: float = 0.0
    mib: float = 0.0


class Estimate(NamedTuple):
    """What a run will cost. ``text``, ``image``, ``plpp`` are parts of ``step``, beside losses and update.

    The ``mib`` of ``step``, ``ahead`` and ``test`` are what a process holds over the model, :data:`LIBRARIES_MIB` included;
    those of a step's parts need not be reached at the same time. ``plpp.operations`` are those of a step in which all context
    vectors meet all words, as in the first; most steps have fewer.
    """

    trainer: str
    backbone: str
    classes: int
    batch: int
    precision: str
    device: str
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
    gflop_a_second: dict[str, float]  # of each tower, over all that is timed of it
    assumed: list[str]
    views: int  # of each training image, passed through frozen encoders in the run
    kept_gib: float  # features of all its views, which FEATURES.MAX_GIB bounds
    max_gib: float


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
    clip_model = clip_model or clip_without_weights(cfg.MODEL.BACKBONE.NAME)
    with swapped_parameters():
        teacher = TeacherWithoutNumbers(cfg, data.classnames, clip_model) if cls.distils else None
        trainer = Trainer(cls, cfg, data=data, clip_model=clip_model, log=log, teacher=teacher)
    shots = cfg.DATASET.NUM_SHOTS
    if not data.train and shots < 1:
        shots = SHOTS
        assumed.append(f"{SHOTS} shots")
    if not data.test:
        assumed.append(f"{TEST_IMAGES:,} test images")
    images, test_images = len(data.train) or shots * len(data.classnames), len(data.test) or TEST_IMAGES
    machine = Machine(trainer.device, trainer.computing, clock)
    return _priced(trainer, machine, images, test_images, assumed)


@contextlib.contextmanager
def swapped_parameters() -> Iterator[None]:
    """``Module.to("meta")`` would make new parameters, and a method's list of its prompts would hold the old ones."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


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


def _priced(trainer: Trainer, machine: Machine, images: int, test_images: int, assumed: list[str]) -> Estimate:
    cfg, learns = trainer.cfg, trainer.method.learns
    batch = min(cfg.DATALOADER.TRAIN_X.BATCH_SIZE, images)
    test_batch = min(cfg.DATALOADER.TEST.BATCH_SIZE, test_images)
    for key, size in (("TRAIN_X", batch), ("TEST", test_batch)):
        if size < 1:
            raise InputError(f"DATALOADER.{key}.BATCH_SIZE: expected an integer >= 1, got {size}")
    first = {"train": batch, "test": test_batch}
    counts = {"train": images, "test": test_images}
    made = passes_of(trainer, first, {split: len(canonical_batches(count)[0]) for split, count in counts.items()})
    price = Price([made.step, made.once, *made.few_frozen.values(), made.classes, made.few], machine)
    text, image = price(made.step, TEXT), price(made.step, IMAGE)
    step, plpp = price(made.step), price(made.step, PLPP)
    if made.plpp:
        new_each_step = trainer.method.classes_depend_on_image
        seconds = sum(plpp_seconds(trainer.regularizer, *shapes, new_each_step, machine) for shapes in made.plpp)
        step, plpp = (part._replace(seconds=part.seconds - plpp.seconds + seconds) for part in (step, plpp))

    def held(*works: Work) -> float:
        return LIBRARIES_MIB[machine.device.type] + max(work.most[ALL] for work in works) / MIB

    def encoded(split: str) -> Part:
        """Frozen features of all its images, in canonical batches; nothing where its batches have none of it."""
        if not trainer.method.inputs.of(split):
            return Part()
        few = price(made.few_frozen[split])
        share = counts[split] / FEW
        return Part(share * few.seconds, share * few.operations, held(made.frozen[split]))

    ahead = encoded("train") if learns else Part()
    for_test, classes, few = encoded("test"), price(made.classes), price(made.few)
    share = test_images / min(FEW, test_batch)
    test = Part(
        classes.seconds + share * few.seconds + for_test.seconds,
        classes.operations + share * few.operations + for_test.operations,
        max(held(made.classes, made.batch), for_test.mib),
    )
    steps, epochs = (max(1, images // batch), cfg.OPTIM.MAX_EPOCH) if learns else (0, 0)
    views, kept_gib = _views(trainer, images, epochs)
    run_seconds = epochs * steps * step.seconds + views * ahead.seconds + price(made.once).seconds
    models = {trainer.clip_model} | ({trainer.teacher.loaded.method.clip.model} if trainer.teacher else set())
    model_mib = sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers())) / MIB
    step = step._replace(mib=held(made.step) if learns else 0.0)
    return Estimate(
        trainer=cfg.TRAINER.NAME,
        backbone=cfg.MODEL.BACKBONE.NAME,
        classes=len(trainer.data.classnames),
        batch=batch,
        precision=trainer.precision,
        device=_device(machine.device),
        step=step,
        text=text,
        image=image,
        plpp=plpp,
        ahead=ahead,
        steps=steps,
        epochs=epochs,
        run_seconds=run_seconds,
        test=test,
        test_images=test_images,
        model_mib=model_mib,
        peak_mib=model_mib + max(step.mib, ahead.mib, test.mib),
        gflop_a_second=price.gflop_a_second,
        assumed=assumed,
        views=views if ahead.operations else 0,
        kept_gib=kept_gib,
        max_gib=cfg.FEATURES.MAX_GIB,
    )


class Price:
    """What work takes on a machine, of one tower or of all."""

    def __init__(self, works: Sequence[Work], machine: Machine) -> None:
        self.every = Work(sum((work.operations for work in works), Counter()))
        self.beside = overhead(machine)
        self.alone = operation_seconds(self.every.counts(), machine)

    def __call__(self, work: Work, *towers: str) -> Part:
        return Part(self.seconds(work, *towers), work.flops(*towers), work.most[towers[0] if towers else ALL] / MIB)

    def seconds(self, work: Work, *towers: str) -> float:
        return sum(count * (self.alone[operation] + self.beside) for operation, count in work.counts(*towers).items())

    @property
    def gflop_a_second(self) -> dict[str, float]:
        flops = {tower: self.every.flops(tower) for tower in (TEXT, IMAGE)}
        return {tower: count / self.seconds(self.every, tower) / 1e9 for tower, count in flops.items() if count}


def _views(trainer: Trainer, images: int, epochs: int) -> tuple[int, float]:
    """How often a run passes its images through frozen encoders, once a view if the store has room for all views; and the GiB
    of all views' features.

    Else each epoch: views come in turn and the longest unused is the first to go, so each is gone when it comes again.
    """
    views = min(epochs, trainer.cfg.INPUT.VIEWS or epochs)
    a_view = 4 * images * sum(encoder.width for encoder in encoders_of(trainer, "train"))  # bytes of float32
    kept = views * a_view <= trainer.cfg.FEATURES.MAX_GIB * 2**30
    # the last one is at hand without a store
    return views if kept or views == 1 else epochs, views * a_view / 2**30


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}"
