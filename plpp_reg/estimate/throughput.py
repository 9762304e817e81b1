"""Seconds of operations on this machine: each different one is run as it is, at its own shapes, a few times.

What an operation costs does not follow from its floating-point operations alone: a norm has hardly any, and a product of thin
matrices takes longer than one of square ones. So nothing is assumed of it. A step of a method has some hundred different
operations, because all layers of a tower are alike, and timing them takes about a second.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from plpp_reg.clip.architectures import OPENAI, random_clip, without_weights
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.estimate.operation import Operation
from plpp_reg.estimate.trace import Tracer
from plpp_reg.loss.regularizer import PerplexityRegularizer, settings_defaults

POOL_BYTES = 2**27  # more than a CPU's caches hold
MOST_SHAPES = 8  # of one operation that are timed, those that take most; the others are in proportion
LONG = 0.003  # seconds; what is shorter is repeated for as long
REPEATS = 3
PLPP_ROWS = 256  # context vectors that are timed; more are in proportion
TINY = OPENAI["ViT-B/32"]._replace(embed_dim=64, vision_layers=1, vision_width=64, width=64, heads=1, layers=3)


class Machine(NamedTuple):
    """What is timed: a device, the context under which it computes (autocast or nothing), a clock in seconds."""

    device: torch.device
    computing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    clock: Callable[[], float] = time.perf_counter

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of the fastest of a few times, after one to warm up: what else the machine does is not the run's."""

        def times(count: int) -> float:
            start = self.now()
            for _ in range(count):
                work()
            return (self.now() - start) / count

        first = times(1)
        count = max(1, min(1000, int(LONG / max(first, 1e-6))))
        return min(times(count) for _ in range(1 if first > 100 * LONG else REPEATS))


def operation_seconds(operations: Mapping[Operation, int], machine: Machine) -> dict[Operation, float]:
    """Seconds of each of them, once. ``operations``: how often each will run."""
    alike: dict[Callable, list[Operation]] = defaultdict(list)
    for operation in operations:
        alike[operation.function].append(operation)
    seconds: dict[Operation, float] = {}
    pool = torch.ones(POOL_BYTES // 4, device=machine.device).view(torch.uint8)
    with torch.no_grad(), machine.computing():
        for several in alike.values():
            several.sort(key=lambda operation: operations[operation] * operation.size, reverse=True)
            timed = several[:MOST_SHAPES]
            seconds |= {operation: machine.seconds(operation.on(machine.device, pool)) for operation in timed}
            for operation in several[MOST_SHAPES:]:
                nearest = min(timed, key=lambda t: abs(math.log(t.size / operation.size)))
                seconds[operation] = seconds[nearest] * operation.size / nearest.size
    return seconds


def overhead(machine: Machine) -> float:
    """Seconds that Python and autograd take beside an operation, on average: of a text tower that has hardly any arithmetic."""

    def step(model: nn.Module) -> Callable[[], None]:
        prompts, tower = PromptLearner(model, ["cat", "dog"], n_ctx=2), TextTower(model)
        return lambda: prompts(tower).features.sum().backward()

    operations = Tracer().of(step(without_weights(TINY))).counts()
    alone = operation_seconds(operations, machine)
    both = machine.seconds(step(random_clip(TINY).to(machine.device)))
    return max(0.0, both - sum(count * alone[operation] for operation, count in operations.items())) / operations.total()


def plpp_seconds(
    regularizer: PerplexityRegularizer, context: torch.Size, hidden: torch.Size, new_each_step: bool, machine: Machine
) -> float:
    """Of PLPP in a usual step, forward and backward: the regularizer with these settings, timed on random vectors.

    It is not timed operation by operation: what it does depends on numbers, for it remembers which words were near.

    Args:
        regularizer: the settings and the vocabulary's shape; its tensors need no numbers.
        context: (1 or P, M, D), the shape of what it reads.
        hidden: (1 or P, M, D).
        new_each_step: whether each step has other context vectors, as each image has its own in CoCoOp.
        machine: what is timed.
    """
    settings = {name: getattr(regularizer, name) for name in settings_defaults()}
    timed = PerplexityRegularizer(torch.rand(regularizer.vocabulary.shape, device=machine.device) - 0.5, **settings)
    prompts = max(context[0], hidden[0])
    at_once = min(prompts, max(1, PLPP_ROWS // context[1]))
    v, h = (
        torch.randn(min(shape[0], at_once), *shape[1:], device=machine.device, requires_grad=True)
        for shape in (context, hidden)
    )

    def term() -> None:
        if new_each_step:
            v.data.normal_()
        timed.components(v, h, with_perplexity=False).total.backward()

    return machine.seconds(term) * prompts / at_once
