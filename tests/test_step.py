"""What one step asks of the device, and of the host: it waits once, and sees the figures that it saw before."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from plpp_reg.engine.distributed import Ranks

import counting
from counting import Operations, Waits
from helpers import engine as helpers
from helpers import methods as mh
from helpers.methods import METHODS, WITH_TEXT, build


def test_what_counts():
    assert doctest.testmod(counting, optionflags=doctest.ELLIPSIS).failed == 0


CASES = [(name, plpp) for name in METHODS for plpp in (False, True) if not plpp or name in WITH_TEXT]


@pytest.mark.parametrize(("name", "plpp"), CASES)
def test_the_host_waits_once(name, plpp):
    trainer = build(name, plpp=plpp)
    if plpp:  # as on an accelerator: what is remembered of nearest words is for a CPU
        trainer.regularizer.nearest.remembers = False
    for index, batch in enumerate(helpers.fixed_batches(2)):  # what is made once a run is made in the first
        with Waits() as waits:
            values = trainer.step(batch, index, with_perplexity=index == 1)
    assert waits.by_name == {"tolist": 1}, (name, waits.by_name)
    assert ("perplexity" in values) == plpp and all(map(math.isfinite, values.values()))


@pytest.mark.parametrize("name", ["CoOp", "PromptSRC"])
def test_the_figures_are_those_of_the_losses(name):
    trainer, batch = build(name, plpp=True), helpers.fixed_batches(1)[0]
    losses = helpers.losses_of(trainer, batch)
    acc = trainer.method.metrics["acc"].item()
    values = trainer.step(batch, with_perplexity=True)
    assert values["acc"] == acc and {n: values[n] for n in losses} == {n: loss.item() for n, loss in losses.items()}
    assert values["loss"] == sum(values[n] for n in trainer.state.loss_names[1:])
    assert set(values) == {"acc", "perplexity", *trainer.state.loss_names}


def test_scalars_of_several_types_come_over_exactly():
    scalars = {"a": torch.tensor(1 / 3, dtype=torch.float64), "b": torch.tensor([1 / 3]), "c": torch.tensor(7)}
    assert Ranks().mean_values(scalars) == {"a": 1 / 3, "b": scalars["b"].item(), "c": 7.0}


def test_operations_of_a_step_do_not_depend_on_the_batch_or_the_classes():
    """Nothing loops over images, classes or prompts."""
    counts = []
    for names, size in ((mh.NAMES, 6), (mh.NAMES[:3], 2)):
        trainer = build("MaPLe", data=mh.no_images(names))
        for batch in helpers.fixed_batches(2, size):
            batch["label"] %= len(names)
            with Operations() as operations:
                trainer.step(batch)
        counts.append(operations.total)
    assert counts[0] == counts[1]
