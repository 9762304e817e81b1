"""Many seeds at once: each as the engine trains it alone, by the same draws, for every method that is taken."""

from __future__ import annotations

import pytest
import torch

from plpp_reg.data import sample_few_shot, subsample_classes
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Classes
from plpp_reg.engine.registry import find_trainer
from plpp_reg.engine.trainer import NonFiniteLoss, Trainer
from plpp_reg.errors import InputError
from plpp_reg.experiments import parallel_seeds
from plpp_reg.experiments.parallel_seeds import Images, ParallelSeeds, read_images
from plpp_reg.trainers.coop import CoOp

from helpers.engine import make_cfg, make_images, make_trainer, register, tiny_clip

SEEDS = [3, 7]
PLPP = ("TRAINER.PLPP.ENABLED", True, "TRAINER.PLPP.WEIGHT", 0.2, "TRAINER.PLPP.INVERSE_WEIGHT", 0.7)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    register()
    return make_images(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


def config(root, *opts, shots=4):
    opts = ("INPUT.VIEWS", 2, "DATASET.ROOT", str(root), "DATASET.NUM_SHOTS", shots, *opts)
    return make_cfg("OPTIM.MAX_EPOCH", 3, "OPTIM.LR", 0.02, *opts)


def images_of(cfg, model, root) -> Images:
    return read_images(cfg, model, SEEDS, "val")


def alone(method, cfg, model, images, seed) -> Trainer:
    """The engine's own trainer of one seed, whose features are those of ``images``."""
    own = cfg.clone()
    own.SEED = seed
    data = subsample_classes(sample_few_shot(images.data, cfg.DATASET.NUM_SHOTS, seed), "base")
    trainer = Trainer(method, own, data=data, clip_model=model, log=RunLog(quiet=True))
    rows = [images.rows[d.name] for d in data.train]

    class Kept:
        def of(self, split: str, epoch: int) -> torch.Tensor:
            return images.views[epoch % cfg.INPUT.VIEWS][rows]

    trainer.frozen_features = {"features": Kept()}
    return trainer


@pytest.mark.parametrize("opts", [(), PLPP, (*PLPP, "TRAINER.PLPP.STATES", "own")], ids=["plain", "plpp", "own"])
@pytest.mark.parametrize("name", ["CoOp", "KgCoOp", "ProGrad"])
def test_each_seed_is_as_the_engine_trains_it(name, opts, root, model):
    method, *_ = find_trainer(name)
    cfg = config(root, *opts)
    images = images_of(cfg, model, root)
    together = ParallelSeeds(method, cfg, model, images, SEEDS)
    starts = together.context.detach().clone()
    together.train()
    for g, seed in enumerate(SEEDS):
        trainer = alone(method, cfg, model, images, seed)
        context = trainer.method.prompt_learner.ctx
        assert torch.equal(context.detach(), starts[g])
        trainer.train()
        assert (context - starts[g]).abs().max() > 1e-3  # it has moved
        torch.testing.assert_close(together.context[g], context, rtol=0, atol=1e-5)


def test_the_losses_are_the_engines_on_the_same_draws(root, model):
    cfg = config(root, *PLPP)
    images = images_of(cfg, model, root)
    together = ParallelSeeds(CoOp, cfg, model, images, SEEDS)
    features, labels = next(together.batches(1))
    losses = together.losses(features, labels, epoch=1)
    sums = dict.fromkeys(losses, 0.0)
    for g, seed in enumerate(SEEDS):
        trainer = alone(CoOp, cfg, model, images, seed)
        trainer.state.epoch = 1
        batch = next(trainer.batches("train"))
        assert torch.equal(batch["features"], features[g]) and torch.equal(batch["label"], labels[g])
        for loss, value in trainer.losses(batch)[0].items():
            sums[loss] += value.item()
    assert set(losses) == {"ce", "ppl", "inverse_ppl"}
    for loss, value in losses.items():
        assert value.item() == pytest.approx(sums[loss], rel=1e-5)


def test_company_changes_nothing(root, model):
    cfg = config(root, *PLPP)
    images = images_of(cfg, model, root)
    contexts = {}
    for seeds in ([3], [7], [7, 5, 3]):
        together = ParallelSeeds(CoOp, cfg, model, read_images(cfg, model, [3, 5, 7], "val"), seeds)
        together.train()
        contexts |= {(seed, len(seeds)): context for seed, context in zip(seeds, together.context.detach(), strict=True)}
    assert images.views.shape[1] <= 25
    for seed in (3, 7):
        torch.testing.assert_close(contexts[seed, 1], contexts[seed, 3], rtol=0, atol=1e-5)
    assert (contexts[3, 3] - contexts[7, 3]).abs().max() > 1e-3


def test_fewer_images_than_a_batch_are_a_batch(root, model):
    cfg = config(root, shots=1)  # three images; a batch is six
    together = ParallelSeeds(CoOp, cfg, model, images_of(cfg, model, root), SEEDS)
    batches = list(together.batches(0))
    assert [tuple(labels.shape) for _, labels in batches] == [(2, 3)]
    before = together.context.detach().clone()
    together.train()
    assert not torch.equal(before, together.context)


def test_what_is_measured_is_what_the_engine_tests(root, model):
    cfg = config(root, *PLPP)
    images = images_of(cfg, model, root)
    together = ParallelSeeds(CoOp, cfg, model, images, SEEDS)
    together.train()
    found = together.measure()
    for g, seed in enumerate(SEEDS):
        for half in ("base", "new"):
            data = subsample_classes(images.data, half)
            trainer = make_trainer(data, clip_model=model)
            trainer.method.prompt_learner.ctx.data.copy_(together.context[g])
            part, where = together.measured_on(half)
            assert [d.name for d in part] == [d.name for d in data.val]
            batch = {"features": images.measured[where]}
            logits = trainer.method.logits(batch, trainer.method.encode_classes())
            hits = (logits.argmax(1) == torch.tensor([d.label for d in data.val])).sum().item()
            assert getattr(found, half)[g] == hits
        trainer = alone(CoOp, cfg, model, images, seed)
        trainer.method.prompt_learner.ctx.data.copy_(together.context[g])
        assert found.perplexity[g] == pytest.approx(trainer.measure_prompts().perplexity.item(), rel=1e-5)


def test_plpps_factor_of_an_epoch(root, model):
    cfg = config(root, *PLPP)
    images = images_of(cfg, model, root)
    together = ParallelSeeds(CoOp, cfg, model, images, SEEDS, plpp_factor=lambda epoch: epoch / 2)
    features, labels = next(together.batches(0))
    with torch.no_grad():
        at = [together.losses(features, labels, epoch) for epoch in (0, 2, 3)]
    assert at[0]["ppl"] == 0 and at[0]["ce"] == at[1]["ce"]
    assert at[2]["inverse_ppl"].item() == pytest.approx(1.5 * at[1]["inverse_ppl"].item())


@pytest.mark.parametrize("name", ["CoCoOp", "MaPLe", "IVLP", "PromptSRC", "VPT", "ZeroshotCLIP"])
def test_what_does_more_is_refused(name, root, model):
    cfg = config(root)
    with pytest.raises(InputError, match=f"{name}: expected a method .* \\(CoOp, KgCoOp, ProGrad"):
        ParallelSeeds(find_trainer(name)[0], cfg, model, None, SEEDS)
    assert {"CoOp", "KgCoOp", "ProGrad"} <= set(parallel_seeds.takes())


def test_a_context_that_sees_names_is_refused(root, model):
    for opts in (("TRAINER.COOP.CSC", True), ("TRAINER.COOP.CLASS_TOKEN_POSITION", "middle")):
        cfg = config(root, *opts)
        with pytest.raises(InputError, match="TRAINER.COOP: expected a context that all classes share"):
            ParallelSeeds(CoOp, cfg, model, images_of(cfg, model, root), SEEDS)


def test_no_views_are_refused(root, model):
    with pytest.raises(InputError, match="INPUT.VIEWS: expected an integer >= 1"):
        read_images(config(root, "INPUT.VIEWS", 0), model, SEEDS, "val")


def test_a_seed_that_is_lost_is_named(root, model):
    class Lost(CoOp):
        def losses(self, batch, classes: Classes):
            return {"ce": super().losses(batch, classes)["ce"] * torch.inf}

    cfg = config(root)
    with pytest.raises(NonFiniteLoss, match=r"seeds \[3, 7\] are not finite after epoch 1"):
        ParallelSeeds(Lost, cfg, model, images_of(cfg, model, root), SEEDS).train()
