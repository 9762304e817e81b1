"""with_plpp on the trainers of a miniature checkout: whatever forward_backward does, its step is the host's plus the term's."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from plpp_reg import PerplexityRegularizer, with_plpp
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import settings_defaults

HOSTS = Path(__file__).parent / "hosts"
sys.path += [str(HOSTS), str(HOSTS / "checkout")]  # behind everything: the checkout has a package clip

from yacs.config import CfgNode

from plpp_reg.dassl import patches as mend  # also makes cfg.TRAINER.PLPP

import mini_trainers
from dassl.config import get_cfg_default

NAMES = ["MiniCoOp", "MiniCoCoOp", "MiniSRC", "MiniAmp"]
TRAINERS = {name: getattr(mini_trainers, name) for name in NAMES}


@pytest.fixture(scope="module", autouse=True)
def mended():
    mend.mend(mend.faults())


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.OPTIM.WARMUP_CONS_LR = 1.0  # a step is the gradient itself
    return cfg


def one_step(trainer):
    """The summary of the first batch, and how far each parameter moved, by the learning rate."""
    trainer.set_model_mode("train")
    trainer.num_batches, trainer.batch_idx = 2, 0
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    summary = trainer.forward_backward(trainer.train_loader_x[0])
    lr = trainer.optim.param_groups[0]["lr"]
    return summary, {n: (before[n] - p.detach()) / lr for n, p in trainer.model.named_parameters() if n in before}


def term_by_hand(trainer, regularizer):
    """The gradient of the regularizer, from text passes of our own on an untouched host (names at the end)."""
    model, batch = trainer.model, trainer.train_loader_x[0]
    learner, seen = model.prompt_learner, []
    hook = model.text_encoder.ln_final.register_forward_hook(lambda m, a, out: seen.append(out))
    biases = [learner.meta_net(x) for x in model.encode_image(batch["img"])] if "CoCo" in type(trainer).__name__ else [None]
    total = 0
    for bias in biases:
        prompts = learner(bias)
        model.text_encoder(prompts, model.tokenized_prompts, list(getattr(learner, "deep", [])))
        total = total + regularizer(prompts[0, 1:5], seen[-1][0, 0:4]) / len(biases)
    hook.remove()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, [dict(model.named_parameters())[n] for n in names], allow_unused=True)
    return {n: g for n, g in zip(names, grads, strict=True) if g is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_hosts_and_the_terms(cfg, name):
    cfg.TRAINER.PLPP.WEIGHT, cfg.TRAINER.PLPP.INVERSE_WEIGHT, cfg.TRAINER.PLPP.TOP_K = 0.7, 0.4, 5
    trainer, plain = with_plpp(TRAINERS[name])(cfg), TRAINERS[name](cfg)
    (summary, moved), (plain_summary, plain_moved) = one_step(trainer), one_step(plain)
    fresh = TRAINERS[name](cfg)
    embedding = trainer.plpp.regularizer.vocabulary
    added = term_by_hand(fresh, PerplexityRegularizer(embedding, weight=0.7, inverse_weight=0.4, top_k=5))
    tolerance = 2e-2 if name == "MiniAmp" else 1e-4  # differences of float32 parameters
    for n, g in added.items():
        assert (moved[n] - plain_moved[n] - g).norm() <= tolerance * g.norm() + 1e-6, n
    assert added["prompt_learner.ctx"].norm() > 1e-2
    if summary is None:
        assert plain_summary is None
        summary = {tag.removeprefix("train/"): value for tag, value, _ in trainer.scalars}
    else:
        assert {n: summary.pop(n) for n in plain_summary} == plain_summary
    last = trainer.plpp.last
    assert summary == pytest.approx(
        {
            "loss_ppl": 0.7 * last.perplexity_loss.item(),
            "loss_inverse_ppl": 0.4 * last.inverse_loss.item(),
            "perplexity": last.perplexity.item(),
        }
    )


class Distilled(mini_trainers.MiniCoOp):
    """Trains a student beside a teacher, calls neither ``model``, and registers the student's prompt learner, as KDPL does."""

    def build_model(self):
        super().build_model()
        self.teacher_model, self.student_model = copy.deepcopy(self.model).requires_grad_(False), self.model
        del self.model

    def forward_backward(self, batch):
        logits, target = self.student_model(batch["img"]), self.teacher_model(batch["img"])
        self.update(nn.functional.kl_div(logits.log_softmax(1), 0.5 * target.log_softmax(1), reduction="sum", log_target=True))
        return {}


def test_a_model_by_another_name_is_found_by_what_is_registered(cfg):
    trainer, plain = with_plpp(Distilled)(cfg), Distilled(cfg)
    assert trainer.plpp.model is trainer.student_model
    gradients = []
    for each in (trainer, plain):
        each.set_model_mode("train")
        each.num_batches, each.batch_idx = 2, 0
        each.forward_backward(each.train_loader_x[0])
        gradients.append(each.student_model.prompt_learner.ctx.grad)
    fresh = Distilled(cfg)
    fresh.model = fresh.student_model
    added = term_by_hand(fresh, PerplexityRegularizer(trainer.plpp.regularizer.vocabulary))["prompt_learner.ctx"]
    assert added.norm() > 1e-3
    assert (gradients[0] - gradients[1] - added).norm() <= 1e-6 * gradients[1].norm()  # of float32 numbers


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_zero_are_the_host_to_the_bit(cfg, name):
    cfg.TRAINER.PLPP.WEIGHT = cfg.TRAINER.PLPP.INVERSE_WEIGHT = 0.0
    trainers = [with_plpp(TRAINERS[name])(cfg), TRAINERS[name](cfg)]
    summaries = []
    for trainer in trainers:
        torch.manual_seed(3)
        trainer.train()
        summaries.append((trainer.scalars, torch.rand(1).item()))
    assert summaries[0] == summaries[1]
    for (n, a), b in zip(trainers[0].model.state_dict().items(), trainers[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), n


def test_one_weight_of_zero_is_not_logged(cfg):
    cfg.TRAINER.PLPP.INVERSE_WEIGHT = 0.0
    summary, _ = one_step(with_plpp(TRAINERS["MiniCoOp"])(cfg))
    assert set(summary) == {"loss", "loss_ppl", "perplexity"}


def test_settings_are_the_configurations_and_have_defaults(cfg):
    cls = with_plpp(TRAINERS["MiniCoOp"])
    cfg.TRAINER.PLPP.LABEL, cfg.TRAINER.PLPP.NORMALIZE_OVER = "hard", "vocabulary"
    assert cls(cfg).plpp.regularizer.label == "hard"
    cfg.TRAINER.PLPP = CfgNode({"TOP_K": 3})
    regularizer = cls(cfg).plpp.regularizer
    defaults = settings_defaults()
    weights = (defaults["weight"], defaults["inverse_weight"])
    assert regularizer.top_k == 3 != defaults["top_k"]
    assert (regularizer.weight, regularizer.inverse_weight) == weights
    del cfg.TRAINER["PLPP"]
    assert cls(cfg).plpp.regularizer.top_k == 10
    cfg.TRAINER.PLPP = CfgNode({"TOP_K": 0})
    with pytest.raises(InputError, match="^TRAINER.PLPP: top_k: expected an integer >= 1"):
        cls(cfg)


def test_the_embedding_is_the_one_that_the_prompts_were_looked_up_in(cfg):
    class Two(TRAINERS["MiniCoOp"]):
        def build_model(self):
            super().build_model()
            self.other = nn.Embedding(10, 8)(torch.tensor([1]))  # of another width: not CLIP's

    trainer = with_plpp(Two)(cfg)
    embedding = mini_trainers.make_clip(width=64, layers=2).token_embedding.weight
    assert torch.equal(trainer.plpp.regularizer.vocabulary, embedding)


def test_an_embedding_that_cannot_be_found_is_asked_for(cfg):
    class Quiet(TRAINERS["MiniCoOp"]):
        def build_model(self):
            self.model = trainer.model
            self.optim = trainer.optim

    trainer = TRAINERS["MiniCoOp"](cfg)
    with pytest.raises(InputError, match=r"^embedding: looked for the nn.Embedding .* found none: give it as embedding="):
        with_plpp(Quiet)(cfg)
    with pytest.raises(InputError, match=r"^embedding: expected a name below LossInTrainer, got 'words.weight'"):
        with_plpp(Quiet, embedding="words.weight")(cfg)
    weight = torch.randn(50, 64)
    given = with_plpp(Quiet, embedding=lambda self: weight, position="end", loss_scale=0.5)(cfg)
    assert given.plpp.regularizer.vocabulary.shape == (50, 64) and given.plpp.loss_scale == 0.5


def test_two_embeddings_of_one_width_are_not_guessed_between(cfg):
    class Two(TRAINERS["MiniCoOp"]):
        def build_model(self):
            super().build_model()
            nn.Embedding(10, 64)(torch.tensor([1]))

    with pytest.raises(InputError, match="expected one token embedding, got different ones .49408 x 64, 10 x 64"):
        with_plpp(Two)(cfg)


def test_a_scaler_that_is_off_or_is_said_not_to_be(cfg):
    class Scaled(TRAINERS["MiniCoOp"]):
        def build_model(self):
            super().build_model()
            self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    trainer = with_plpp(Scaled)(cfg)
    one_step(trainer)
    assert trainer.plpp.scaler is trainer.scaler
    trainer.spare, trainer.scaler = trainer.scaler, torch.amp.GradScaler("cpu")
    one_step(trainer)
    assert trainer.plpp.scaler is trainer.scaler
    trainer = with_plpp(TRAINERS["MiniCoOp"])(cfg)
    trainer.plpp.scaler = False
    one_step(trainer)
    assert trainer.plpp.scaler is False


def test_several_gpus(cfg):
    class Parallel(TRAINERS["MiniCoOp"]):
        def build_model(self):
            super().build_model()
            self.model = nn.DataParallel(self.model)

    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=0"):
        with_plpp(Parallel)(cfg)


def test_a_loss_that_never_goes_through_the_text_features(cfg):
    class Detached(TRAINERS["MiniCoOp"]):
        def forward_backward(self, batch):
            self.update(self.model.prompt_learner.ctx.square().sum())
            return {"loss": 0.0}

    class Idle(TRAINERS["MiniCoOp"]):
        def forward_backward(self, batch):
            return {"loss": 0.0}

    with pytest.raises(InputError, match="a gradient reached prompt_learner.ctx that the term did not join"):
        with_plpp(Detached)(cfg).train()
    with pytest.raises(InputError, match="expected forward_backward to call TextEncoder with prompts made of the context"):
        with_plpp(Idle)(cfg).train()


def test_the_class(cfg):
    cls = with_plpp(TRAINERS["MiniCoOp"])
    assert cls is with_plpp(TRAINERS["MiniCoOp"]) and cls.__name__ == "MiniCoOp_PLPP" and issubclass(cls, TRAINERS["MiniCoOp"])
    assert with_plpp(TRAINERS["MiniCoOp"], backward_pass=2) is not cls
    named = with_plpp(TRAINERS["MiniCoOp"], forward_passes=2, final_norm="text_encoder.ln_final")(cfg)
    assert named.plpp.forward_passes == 2 and named.plpp.final_norm is named.model.text_encoder.ln_final
    with pytest.raises(InputError, match="MiniCoOp_PLPP has PLPP already"):
        with_plpp(cls)
    for wrong in (nn.Linear, cfg):
        with pytest.raises(InputError, match="^trainer_class: expected a class with build_model and forward_backward"):
            with_plpp(wrong)

    class Own_PLPP(with_plpp(TRAINERS["MiniCoOp"])):
        def forward_backward(self, batch):
            return {**super().forward_backward(batch), "own": 1.0}

    summary, _ = one_step(Own_PLPP(cfg))
    assert set(summary) == {"loss", "loss_ppl", "loss_inverse_ppl", "perplexity", "own"}


def test_class_specific_perplexity_is_logged_once_an_epoch(cfg):
    """Where every class has vectors of its own it costs a look at the vocabulary for each."""

    class Specific(TRAINERS["MiniCoOp"]):
        def host(self, clip_model):
            return mini_trainers.LossInTrainer(clip_model, class_specific=True)

    cfg.TRAINER.PLPP.MEMORY_MIB = (5 * 4 - 1) * 4 * 49408 / 2**20
    trainer = with_plpp(Specific)(cfg)
    assert "perplexity" not in one_step(trainer)[0]
    trainer.batch_idx = 1
    assert "perplexity" in trainer.forward_backward(trainer.train_loader_x[1])
