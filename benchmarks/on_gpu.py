"""What a training step takes on a GPU, beside the literal one: operations, waits, milliseconds, memory, agreement with a CPU.

    bash benchmarks/on_gpu.sh            # this, and the tests that need a card: under five minutes
    python benchmarks/on_gpu.py --json on_gpu.json

ViT-B/16's sizes, random weights, 100 and 1,000 classes, fp16, bf16 and amp: each method as it is and with PLPP, against what
its own code does (all 77 positions of every class, stock modules). ``ops``: operations that are not views, each a launch.
``launches``: kernels and graphs that were launched, by torch's profiler. ``waits``: how often the host waited. ``MiB``: the
most that lived at once, over what was there before the step. ``loss``, ``grad``: with 100 classes, how far they are from the
same step on this machine's CPU in float32, relative. Also with 100 classes in fp16, the towers and PLPP compiled with
"reduce-overhead" (CUDA graphs).

What does not fit the memory is said; what does not fit the time (``SECONDS``) is left out, and said. Without a GPU small towers
run on the CPU, and what is skipped is said. The columns of a GPU alone have never been seen filled: no card was at hand.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import PRECISIONS, set_precision
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers import NODES

from common import LiteralText, arguments, random_clip, write_rows
from compiled import compiled
from counting import Operations, Waits
from methods import FULL, QUICK, Size, give_image_features, learner_of, literal_losses, make_batch, make_trainer

SECONDS = 200.0
CUDA = torch.cuda.is_available()
METHODS = {"CoOp": 32, "CoCoOp": 4, "MaPLe": 4, "PromptSRC": 4}  # images of a batch
LITERAL, PLAIN, PLPP, COMPILED = "literal", "here", "with PLPP", "compiled"
Step = Callable[[], object]


class Case(NamedTuple):
    method: str
    precision: str
    classes: int
    which: str

    @property
    def trainer(self) -> str:
        return self.method + ("_PLPP" if self.which in (PLPP, COMPILED) else "")


def cases(methods: list[str]) -> Iterator[Case]:
    """What is worth most first."""
    for classes in (100, 1000) if CUDA else (QUICK.classes,):
        for precision in ("fp16", "bf16", "amp") if CUDA else ("fp32", "bf16", "amp"):
            for method in methods:
                for which in (LITERAL, PLAIN, PLPP):
                    yield Case(method, precision, classes, which)
        if CUDA and classes == 100:
            for method in methods:
                yield Case(method, "fp16", classes, COMPILED)


@functools.cache
def clip_of(precision: str, cuda: bool) -> nn.Module:
    model = set_precision(random_clip(size_of(0).model), PRECISIONS[precision])
    return model.cuda() if cuda else model


def size_of(classes: int) -> Size:
    return (FULL if CUDA else QUICK)._replace(classes=classes)


def prepare(case: Case, cuda: bool = CUDA) -> tuple[Trainer, Step]:
    """A trainer whose prompts stay as they are, and its step on one batch."""
    size, images = size_of(case.classes), METHODS[case.method]
    opts = ("USE_CUDA", str(cuda), f"TRAINER.{NODES[case.method]}.PREC", case.precision)
    trainer = make_trainer(case.trainer, size, opts, clip_of(case.precision, cuda))
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    batch = make_batch(size, images)
    if case.method in ("CoOp", "CoCoOp"):
        give_image_features(trainer, size, batch)
    if case.method == "PromptSRC":  # which it makes once a run, of 60 templates
        g = torch.Generator().manual_seed(2)
        features = torch.randn(size.classes, size.model.embed_dim, generator=g)
        trainer.method.frozen_class_features = normalize(features).to(trainer.device)
    batch = {name: t.to(trainer.device) for name, t in batch.items()}
    if case.which == LITERAL:
        return trainer, literal_step(trainer, batch)
    step = functools.partial(trainer.step, batch)
    if case.which == COMPILED:
        step()
        for tower in (trainer.method.clip.text, trainer.method.clip.image):
            tower.forward = compiled(tower.forward, "reduce-overhead")
        trainer.regularizer.weighted = compiled(trainer.regularizer.weighted, "reduce-overhead")
    return trainer, step


def literal_step(trainer: Trainer, batch: dict[str, Tensor]) -> Step:
    tower = LiteralText(trainer.clip_model, learner_of(trainer))

    def step() -> dict[str, float]:
        with trainer.computing():
            losses = literal_losses(trainer, tower, batch)
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.backward(losses)
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        return {"loss": sum(loss.item() for loss in losses.values())}

    return step


class Outcome(NamedTuple):
    loss: float
    gradient: Tensor  # of everything trained, in one vector on the CPU


def outcome(trainer: Trainer, step: Step) -> Outcome:
    """Of a first step; a gradient scaler's first ones may overflow, which it answers with a smaller scale."""
    for _ in range(10):
        loss = step()["loss"]
        gradient = torch.cat([p.grad.flatten() for p in trainer.parameters]).cpu()
        if gradient.isfinite().all():
            break
    return Outcome(loss, gradient)


@functools.cache
def on_cpu(method: str, classes: int, plpp: bool) -> Outcome:
    case = Case(method, "fp32", classes, PLPP if plpp else PLAIN)
    return outcome(*prepare(case, cuda=False))


def milliseconds(step: Step, repeats: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        step()
        synchronize()
        return time.perf_counter() - start

    return 1000 * statistics.median(once() for _ in range(repeats))


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def waits(step: Step) -> int:
    """On a GPU those that happened; else those that :class:`counting.Waits` knows of."""
    if not CUDA:
        with Waits() as counted:
            step()
        return sum(counted.by_name.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def launches(step: Step) -> int | None:
    if not CUDA:
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize()
    return sum(event.count for event in profile.key_averages() if "Launch" in event.key)


def peak_mib(step: Step) -> float | None:
    if not CUDA:
        return None
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def operations(step: Step) -> int:
    with Operations() as counted:
        step()
    return counted.total


def measure(case: Case, repeats: int) -> dict[str, Any]:
    trainer, step = prepare(case)
    if trainer.regularizer is not None:
        trainer.regularizer.nearest.remembers = False  # as on an accelerator
    differences: dict[str, float | None] = {"loss_rel_diff": None, "grad_rel_diff": None}
    if case.classes <= FULL.classes:
        got, want = outcome(trainer, step), on_cpu(case.method, case.classes, case.which in (PLPP, COMPILED))
        differences["loss_rel_diff"] = abs(got.loss - want.loss) / abs(want.loss)
        differences["grad_rel_diff"] = ((got.gradient - want.gradient).norm() / want.gradient.norm()).item()
    for _ in range(2):  # what is made once, or compiled, or recorded as a graph
        step()
    return {
        **case._asdict(),
        "operations": None if case.which == COMPILED else operations(step),
        "launches": launches(step),
        "waits": waits(step),
        "milliseconds": milliseconds(step, repeats),
        "peak_mib": peak_mib(step),
        **differences,
    }


def said(row: dict[str, Any]) -> str:
    def cell(name: str, form: str, width: int) -> str:
        return f"{'-' if row[name] is None else format(row[name], form):>{width}}"

    return (
        f"{row['method']:10s}{row['precision']:6s}{row['classes']:5d} {row['which']:10s}{cell('operations', 'd', 6)}"
        f"{cell('launches', 'd', 9)}{cell('waits', 'd', 6)}{cell('milliseconds', '.1f', 9)}{cell('peak_mib', '.0f', 8)}"
        f"{cell('loss_rel_diff', '.0e', 8)}{cell('grad_rel_diff', '.0e', 8)}"
    )


def main() -> None:
    args, start = arguments(__doc__, METHODS), time.perf_counter()
    if CUDA:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ViT-B/16's sizes", flush=True)
    else:
        print(
            "No GPU: small towers on the CPU. Skipped: fp16, 1,000 classes, launches, peak memory, the compiled towers "
            "(benchmarks/compiled.py has those of a CPU)."
        )
    header = f"{'method':10s}{'PREC':6s}{'C':>5s} {'step':10s}{'ops':>6s}{'launches':>9s}{'waits':>6s}{'ms':>9s}{'MiB':>8s}"
    print(f"{header}{'loss':>8s}{'grad':>8s}")
    rows: list[dict[str, Any]] = []
    left_out = 0
    for case in cases(args.cases):
        if time.perf_counter() - start > SECONDS:
            left_out += 1
            continue
        try:
            rows.append(measure(case, args.repeats or (10 if CUDA else 3)))
            print(said(rows[-1]), flush=True)
        except Exception as e:
            if not isinstance(e, torch.OutOfMemoryError) and case.which != COMPILED:  # what compiles is the machine's
                raise
            rows.append({**case._asdict(), "failed": f"{type(e).__name__}: {e}".splitlines()[0]})
            print(
                f"{case.method:10s}{case.precision:6s}{case.classes:5d} {case.which:10s} {rows[-1]['failed']:.90s}", flush=True
            )
            torch.cuda.empty_cache()
    if left_out:
        print(f"{left_out} more steps were left out: {SECONDS:.0f} seconds were over")
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    write_rows(args.json, rows, device=device)


if __name__ == "__main__":
    main()
