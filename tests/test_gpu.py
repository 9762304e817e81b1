"""What needs a card: each method there is what it is on a CPU, and the host waits once a step.

``bash benchmarks/on_gpu.sh`` runs these after its table; without a card they are skipped.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.trainer import Trainer
from plpp_reg.loss.nearest import NearestWords
from plpp_reg.loss.regularizer import PerplexityRegularizer

from common import LiteralText
from helpers import engine as helpers
from helpers import methods as mh
from helpers.clips import make_clip
from helpers.methods import METHODS, WITH_TEXT, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {"fp32": 1e-3, "fp16": 0.05, "amp": 0.05, "bf16": 0.1}  # of the gradient, relative; bf16 on a CPU: 0.03


def on_device(name: str, precision: str) -> Trainer:
    """With PLPP, where the method has text to act on; on a model of its own."""
    model = copy.deepcopy(mh.clip_of(precision))
    trainer = build(name, "USE_CUDA", True, plpp=name in WITH_TEXT, clip_model=model, PREC=precision)
    if trainer.scaler.is_enabled():  # one that starts so small that no gradient of the first step overflows
        trainer.scaler = torch.amp.GradScaler(init_scale=2.0**10)
    return trainer


def two_steps(trainer: Trainer) -> tuple[list[dict[str, float]], Tensor]:
    """What they log, and the first one's gradient, in one vector."""
    first, second = ({key: t.to(trainer.device) for key, t in batch.items()} for batch in helpers.fixed_batches(2))
    row = trainer.step(first, with_perplexity=True)
    gradient = torch.cat([p.grad.flatten() for p in trainer.parameters]).cpu()
    return [row, trainer.step(second, with_perplexity=True)], gradient


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", METHODS)
def test_two_steps_are_those_of_a_cpu(name: str, precision: str):
    trainer = on_device(name, precision)
    assert trainer.precision == precision and trainer.device.type == "cuda"
    assert trainer.scaler.is_enabled() == (precision == "amp")
    rows, gradient = two_steps(trainer)
    rows_of_cpu, gradient_of_cpu = two_steps(build(name, plpp=name in WITH_TEXT))
    for row, want in zip(rows, rows_of_cpu, strict=True):
        assert set(row) == set(want)
        for key in trainer.state.loss_names:
            assert row[key] == pytest.approx(want[key], rel=1e-4 if precision == "fp32" else 0.05, abs=0.02), key
    assert (gradient - gradient_of_cpu).norm() < TOLERANCE[precision] * gradient_of_cpu.norm()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])  # amp's gradient scaler waits for a verdict of its own
@pytest.mark.parametrize("name", METHODS)
def test_the_host_waits_once_a_step(name: str, precision: str, monkeypatch: pytest.MonkeyPatch):
    """Each wait is an error, but for the one transfer of what is logged."""
    trainer, mean_values, transfers = on_device(name, precision), Ranks.mean_values, []

    def one_transfer(self: Ranks, scalars: dict[str, Tensor]) -> dict[str, float]:
        torch.cuda.set_sync_debug_mode("default")
        values = mean_values(self, scalars)
        transfers.append(len(values))
        torch.cuda.set_sync_debug_mode("error")
        return values

    batches = [{key: t.to(DEVICE) for key, t in batch.items()} for batch in helpers.fixed_batches(3)]
    trainer.step(batches[0], with_perplexity=True)  # makes what is made once a run
    monkeypatch.setattr(Ranks, "mean_values", one_transfer)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches[1:]:
            trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(transfers) == 2


def test_the_nearest_words_are_those_of_a_cpu():
    g = torch.Generator().manual_seed(3)
    E, v = torch.randn(49408, 64, generator=g), torch.randn(16, 64, generator=g) * 0.02
    inverse = E.norm(dim=1).reciprocal()
    here, there = NearestWords(), NearestWords()
    cosines, ids = here(v, E, inverse, 10, 2**26)
    assert (cosines[:, :-1] - cosines[:, 1:]).min() > 1e-6  # so that rounding cannot exchange two
    found = there(*(t.to(DEVICE) for t in (v, E, inverse)), 10, 2**20)
    assert there.looked_up == 0  # nothing was remembered
    assert found[1].cpu().equal(ids)
    torch.testing.assert_close(found[0].cpu(), cosines, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("position", "class_specific"), [("end", False), ("middle", False), ("front", False), ("end", True)])
def test_the_text_tower_is_the_literal_one(position: str, class_specific: bool):
    """In chunks as an accelerator has them: features and gradient as the literal tower's on the CPU, PLPP as on the CPU."""
    model = make_clip(layers=4, vision_layers=1)
    prompts = PromptLearner(model, mh.NAMES, n_ctx=4, position=position, class_specific=class_specific)
    want = LiteralText(model, prompts)(prompts.ctx)
    (gradient,) = torch.autograd.grad(want.square().sum(), prompts.ctx)
    there = copy.deepcopy(model).to(DEVICE)
    learner = copy.deepcopy(prompts).to(DEVICE)
    tower = TextTower(there)
    assert all(part.token.shape[1] % 8 == 0 for part in learner.tree(tower.max_rows()).parts)
    out = learner(tower)
    (found,) = torch.autograd.grad(out.features.square().sum(), learner.ctx, retain_graph=True)
    torch.testing.assert_close(out.features.cpu(), want, rtol=1e-4, atol=1e-5)
    assert (found.cpu() - gradient).norm() < 1e-4 * gradient.norm()
    loss = PerplexityRegularizer(there.token_embedding)(out.context, out.hidden)
    loss_of_cpu = PerplexityRegularizer(model.token_embedding)(prompts.ctx, prompts(TextTower(model)).hidden)
    assert loss.item() == pytest.approx(loss_of_cpu.item(), rel=1e-4)
