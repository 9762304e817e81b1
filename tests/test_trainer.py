"""Steps and a test pass: what is trained, what is summed, what off means, and that it is CoOp."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.load import openai_clip
from plpp_reg.clip.text import TextTower
from plpp_reg.data import DataSplit
from plpp_reg.data.loaders import build_loader
from plpp_reg.engine.evaluation import Classification
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.zeroshot import ZeroshotCLIP

from helpers import engine as helpers

PLPP = ("TRAINER.PLPP.ENABLED", True)
# Every shape of the context: shared, split around the name, before it, one a class.
LAYOUTS = [
    {},
    {"TRAINER.COOP.CLASS_TOKEN_POSITION": "middle"},
    {"TRAINER.COOP.CLASS_TOKEN_POSITION": "front"},
    {"TRAINER.COOP.CSC": True},
]


def pairs(options: dict) -> list:
    return [x for item in options.items() for x in item]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplit:
    return helpers.read_tiny(helpers.make_images(tmp_path_factory.mktemp("world")))


# ---- what is trained -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("plpp", [False, True])
def test_the_gradient_reaches_the_context_and_nothing_else(data: DataSplit, layout: dict, plpp: bool) -> None:
    trainer = helpers.make_trainer(data, *pairs(layout), *(PLPP if plpp else ()))
    before = copy.deepcopy(trainer.clip_model.state_dict())
    context = trainer.method.saved.ctx.detach().clone()
    for batch in helpers.fixed_batches(2):
        trainer.step(batch)
    assert trainer.method.saved.ctx.grad.abs().amin(-1).gt(0).all()  # each vector, not only some
    assert not torch.equal(trainer.method.saved.ctx, context)
    helpers.assert_same(dict(trainer.clip_model.state_dict()), dict(before))
    assert all(p.grad is None and not p.requires_grad for p in trainer.clip_model.parameters())
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(optimized) == 1 and optimized[0] is trainer.method.saved.ctx
    assert [name for name, _ in trainer.method.saved.named_parameters()] == ["ctx"]


def test_perplexity_alone_moves_the_context(data: DataSplit) -> None:
    # Its gradient goes to the vectors and, through the states, to those before them.
    trainer = helpers.make_trainer(data, *PLPP)
    method = trainer.method
    method.losses = lambda batch, classes: {"ce": method.cross_entropy(classes.features, torch.arange(5)) * 0}
    trainer.step(helpers.fixed_batches(1)[0])
    assert trainer.method.saved.ctx.grad.abs().amax(-1).gt(0).all()


# ---- losses --------------------------------------------------------------------------------------------------------------


def plpp_by_itself(trainer: Trainer):
    """Unweighted components of the trainer's present prompts, by a regularizer of the test's own."""
    reg = PerplexityRegularizer(trainer.clip_model.token_embedding.weight, weight=1.0, inverse_weight=1.0)
    return reg.components(trainer.method.saved.ctx, trainer.method.saved(trainer.method.clip.text).hidden)


@pytest.mark.parametrize(
    ("weight", "inverse_weight", "names"),
    [
        (0.3, 0.7, {"ce", "ppl", "inverse_ppl"}),  # unequal: a mix-up of the two shows
        (0.7, 0.3, {"ce", "ppl", "inverse_ppl"}),
        (0.3, 0.0, {"ce", "ppl"}),
        (0.0, 0.7, {"ce", "inverse_ppl"}),
        (0.0, 0.0, {"ce"}),
    ],
)
def test_losses_are_named_weighted_and_summed_once(
    data: DataSplit, weight: float, inverse_weight: float, names: set[str]
) -> None:
    trainer = helpers.make_trainer(data, *PLPP, "TRAINER.PLPP.WEIGHT", weight, "TRAINER.PLPP.INVERSE_WEIGHT", inverse_weight)
    parts = plpp_by_itself(trainer)
    values = trainer.step(helpers.fixed_batches(1)[0], with_perplexity=True)
    assert names <= values.keys() and not ({"ppl", "inverse_ppl"} - names) & values.keys()
    assert values["loss"] == pytest.approx(sum(values[name] for name in names), rel=1e-6)
    assert abs(parts.perplexity_loss.item() - parts.inverse_loss.item()) > 0.01  # else the next lines prove nothing
    if weight:
        assert values["ppl"] == pytest.approx(weight * parts.perplexity_loss.item(), rel=1e-5)
    if inverse_weight:
        assert values["inverse_ppl"] == pytest.approx(inverse_weight * parts.inverse_loss.item(), rel=1e-5)
    if weight or inverse_weight:
        assert values["perplexity"] == pytest.approx(parts.perplexity.item(), rel=1e-5)


def test_the_step_descends_the_weighted_sum(data: DataSplit) -> None:
    # The gradient that SGD took is that of CE + 0.3 L_ppl + 0.7 L_inv, written out here.
    options = (*PLPP, "TRAINER.PLPP.WEIGHT", 0.3, "TRAINER.PLPP.INVERSE_WEIGHT", 0.7)
    batch = helpers.fixed_batches(1)[0]
    stepped, literal = (helpers.make_trainer(data, *options) for _ in range(2))
    stepped.step(batch)
    parts = plpp_by_itself(literal)
    logits = literal.method.logits(batch, literal.method.encode_classes())
    total = F.cross_entropy(logits, batch["label"]) + 0.3 * parts.perplexity_loss + 0.7 * parts.inverse_loss
    total.backward()
    torch.testing.assert_close(stepped.method.saved.ctx.grad, literal.method.saved.ctx.grad, rtol=1e-4, atol=1e-7)


def test_every_setting_of_the_configuration_reaches_the_regularizer(data: DataSplit) -> None:
    given = {
        "WEIGHT": 0.31,
        "INVERSE_WEIGHT": 0.17,
        "TOP_K": 7,
        "TEMPERATURE": 0.23,
        "LABEL": "soft",
        "NORMALIZE_OVER": "topk",
        "DETACH_LABEL": False,
        "MEMORY_MIB": 2.5,
    }
    trainer = helpers.make_trainer(data, *PLPP, *pairs({f"TRAINER.PLPP.{k}": v for k, v in given.items()}))
    assert set(given) == set(trainer.cfg.TRAINER.PLPP) - {"ENABLED", "STATES"}  # a new setting belongs in this table
    assert {k: getattr(trainer.regularizer, k.lower()) for k in given} == given


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_of_zero_are_bit_identical_to_coop(data: DataSplit, layout: dict) -> None:
    def after_steps(*options: object) -> tuple:
        trainer = helpers.make_trainer(data, *pairs(layout), *options)
        values = [trainer.step(batch) for batch in helpers.fixed_batches(5)]
        return (
            values,
            trainer.method.saved.ctx.detach(),
            trainer.method.saved.ctx.grad,
            trainer.optimizer.state_dict(),
            torch.get_rng_state(),
        )

    off = after_steps(*PLPP, "TRAINER.PLPP.WEIGHT", 0.0, "TRAINER.PLPP.INVERSE_WEIGHT", 0.0)
    helpers.assert_same(off, after_steps())


def test_measuring_the_prompts_changes_nothing(data: DataSplit) -> None:
    trainer = helpers.make_trainer(data)
    before, stream = trainer.method.saved.ctx.detach().clone(), torch.get_rng_state()
    measured = trainer.measure_prompts()
    expected = plpp_by_itself(trainer)
    assert measured.perplexity.item() == pytest.approx(expected.perplexity.item(), rel=1e-6)
    assert torch.equal(trainer.method.saved.ctx, before) and torch.equal(torch.get_rng_state(), stream)
    assert trainer.regularizer is None and trainer.method.saved.ctx.grad is None


# ---- parity with CoOp ----------------------------------------------------------------------------------------------------


def literal_coop(data: DataSplit, ctx: torch.Tensor, batches: list, lr: float, class_specific: bool = False) -> torch.Tensor:
    """CoOp as its paper's code has it: 77 positions of every class, stock modules, plain SGD."""
    clip, model = openai_clip(), helpers.tiny_clip()
    names = [name.replace("_", " ") for name in data.classnames]
    n_ctx = ctx.shape[-2]
    tokens = torch.cat([clip.tokenize(" ".join(["X"] * n_ctx) + " " + name + ".") for name in names])
    embedding = model.token_embedding(tokens)
    prefix, suffix = embedding[:, :1], embedding[:, 1 + n_ctx :]
    ctx = ctx.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([ctx], lr=lr, momentum=0.9, weight_decay=5e-4)
    for batch in batches:
        context = ctx if class_specific else ctx.unsqueeze(0).expand(len(names), -1, -1)
        x = torch.cat([prefix, context, suffix], dim=1) + model.positional_embedding
        x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = model.ln_final(x)
        text = x[torch.arange(len(names)), tokens.argmax(dim=-1)] @ model.text_projection
        image = model.encode_image(batch["img"])
        image, text = (f / f.norm(dim=-1, keepdim=True) for f in (image, text))
        loss = F.cross_entropy(model.logit_scale.exp() * image @ text.t(), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ctx.detach()


@pytest.mark.parametrize("class_specific", [False, True])
def test_ten_steps_equal_a_literal_coop(data: DataSplit, class_specific: bool) -> None:
    trainer = helpers.make_trainer(data, "TRAINER.COOP.CSC", class_specific, "OPTIM.WARMUP_EPOCH", -1)
    start = trainer.method.saved.ctx.detach().clone()
    batches = helpers.fixed_batches(10)
    expected = literal_coop(data, start, batches, trainer.cfg.OPTIM.LR, class_specific)
    for batch in batches:
        trainer.step(batch)
    assert (expected - start).abs().max() > 0.01  # it went a thousand times further than the tolerance
    torch.testing.assert_close(trainer.method.saved.ctx.detach(), expected, rtol=0, atol=1e-5)


def test_the_context_starts_as_normal_noise_of_the_seed_alone(data: DataSplit) -> None:
    torch.manual_seed(123)  # whatever was drawn before
    one = helpers.make_trainer(data, "SEED", 5).method.saved.ctx.detach()
    torch.manual_seed(5)
    expected = torch.empty(3, helpers.WIDTH).normal_(std=0.02)
    assert torch.equal(one, expected)
    assert not torch.equal(one, helpers.make_trainer(data, "SEED", 0).method.saved.ctx)


# ---- testing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CoOp, ZeroshotCLIP])
def test_classes_are_encoded_once_in_a_test_pass(data: DataSplit, monkeypatch: pytest.MonkeyPatch, cls: type) -> None:
    trainer = helpers.make_trainer(data, cls=cls)
    calls = []
    original = TextTower.forward
    monkeypatch.setattr(TextTower, "forward", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    trainer.test()
    assert len(calls) == 1 and len(trainer.loader("test")) == 4
    if cls is CoOp:  # and anew once the model has changed
        trainer.step(helpers.fixed_batches(1)[0])
        calls.clear()
        trainer.test()
        assert len(calls) == 1


def test_testing_changes_no_weight_and_no_stream(data: DataSplit) -> None:
    trainer = helpers.make_trainer(data, *PLPP)
    before, stream = trainer.method.saved.ctx.detach().clone(), torch.get_rng_state()
    assert trainer.test() == trainer.test()
    assert torch.equal(trainer.method.saved.ctx, before) and torch.equal(torch.get_rng_state(), stream)


def test_zeroshot_is_clip_with_the_template(data: DataSplit) -> None:
    trainer = helpers.make_trainer(data, cls=ZeroshotCLIP)
    clip, model = openai_clip(), helpers.tiny_clip()
    with torch.no_grad():
        text = model.encode_text(clip.tokenize([f"a photo of a {n.replace('_', ' ')}." for n in data.classnames]))
        text = text / text.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(trainer.method.encode_classes().features, text, rtol=0, atol=1e-5)
    with torch.no_grad():
        images = torch.cat([b["img"] for b in build_loader(trainer.cfg, data.test, train=False)])
        guess = (normalize(model.encode_image(images)) @ text.t()).argmax(1)
    truth = torch.tensor([d.label for d in data.test])
    assert trainer.test()["accuracy"] == pytest.approx(100 * (guess == truth).float().mean().item())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("classes", "occurring"), [(2, 2), (5, 5), (7, 4), (40, 25), (3, 1)])
def test_evaluator_is_scikit_learns(seed: int, classes: int, occurring: int) -> None:
    # Predictions may name classes that do not occur in the truth: Dassl leaves those out of the mean.
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(occurring, (57,), generator=generator)
    logits = torch.randn(57, classes, generator=generator)
    logits[torch.arange(30), truth[:30]] += 3
    evaluator = Classification(classes)
    for part in range(0, 57, 10):
        evaluator.process(logits[part : part + 10], truth[part : part + 10])
    guess = logits.argmax(1)
    result = evaluator.evaluate()
    assert result["accuracy"] == pytest.approx(100 * accuracy_score(truth, guess))
    assert result["error"] == pytest.approx(100 * (truth != guess).double().mean().item())
    assert result["macro_f1"] == pytest.approx(
        100 * f1_score(truth, guess, average="macro", labels=np.unique(truth.numpy()), zero_division=0)
    )


def test_evaluators_report_and_per_class_lines() -> None:
    evaluator = Classification(3)
    evaluator.process(torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 0, 0, 1]))
    assert evaluator.report()[1:4] == ["* total: 4", "* correct: 3", "* accuracy: 75.0%"]
    assert evaluator.per_class_report(["a", "b", "c"])[1:] == [
        "* class: 0 (a)\ttotal: 3\tcorrect: 2\tacc: 66.7%",
        "* class: 1 (b)\ttotal: 1\tcorrect: 1\tacc: 100.0%",
        "* average: 83.3%",
    ]
