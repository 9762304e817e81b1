"""FDBPL against a slow, literal reference; its two contexts in one text pass; PLPP on them; kept views; what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from plpp_reg.clip.text import TextTower
from plpp_reg.data import DATASETS
from plpp_reg.data.loaders import ImageDataset
from plpp_reg.engine import checkpoint, registry
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.trainers.fdbpl import FDBPL

from helpers import distilling as ds
from helpers import engine as helpers
from helpers import literal
from helpers import literal_methods as lm
from helpers import methods as mh

WORDS = {"ctx": "a photo of a", "negative.ctx": "a photo of no"}
SETTINGS = ("TRAINER.FDBPL.COSINE_WEIGHT", 0.4, "TRAINER.FDBPL.CASCADE_WEIGHT", 0.7, "TRAINER.FDBPL.MARGIN", 0.9)
Losses = dict[str, Tensor]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", mh.ENTRY)


def build(*opts: object, **more) -> Trainer:
    return ds.build(FDBPL, *SETTINGS, *opts, **more)


def batches(count: int, size: int = 6) -> list[dict[str, Tensor]]:
    return [b | {"features": ds.unit(size, mh.EMBED, seed=40 + i)} for i, b in enumerate(ds.batches(count, size))]


def reference(trainer: Trainer, p: lm.Parameters, batch: dict[str, Tensor]) -> tuple[Losses, list[Tensor], dict[str, Tensor]]:
    """As FDBPL's code computes it: two text passes, image by image. Losses, both logits, and the states of both contexts."""
    model, f = mh.exact_clip(), batch["features"].double()
    scale = model.logit_scale.exp()
    logits, w, states = [], [], {}
    for name, words in WORDS.items():
        features, states[name] = literal.text_tower(model, lm.worded_prompts(model, mh.NAMES, p[name], words))
        w.append(lm.unit(features))
        logits.append(scale * f @ w[-1].T)
    teacher = scale * batch["teacher_features"].double() @ trainer.teacher.class_features.double().T  # the student's scale
    classes, count = len(mh.NAMES), len(f)
    u, kd, entropy, cosine = [], 0.0, 0.0, 0.0
    for positive, negative, t in zip(*logits, teacher, strict=True):
        p_t, p_pos, p_neg = t.softmax(0), positive.softmax(0), negative.softmax(0)
        u.append(1 + sum(x * (x + 1e-6).log() for x in p_t) / math.log(classes))
        forward = sum(p_t * (p_t.log() - p_pos.log()))
        backward = sum(p_pos * (p_pos.log() - p_t.log()))
        kd = kd + u[-1] * (forward + backward) / 2
        entropy = entropy + (1 - u[-1]) * sum(p_neg * p_neg.log())
        cosine = cosine + u[-1] * positive @ negative / (positive.norm() * negative.norm())
    losses = {"kd": kd / count, "entropy": entropy / count, "cosine": 0.4 * cosine / count}
    if trainer.method.config.cascade == "margin":
        y, d = teacher.argmax(1).tolist(), w[0] - w[1]
        pairs = [(a, b) for a in range(count) for b in range(a + 1, count) if y[a] != y[b]]
        terms = [u[a] * u[b] * (0.9 - (f[a] - f[b]) @ (d[y[a]] - d[y[b]])).clamp(min=0) for a, b in pairs]
        losses["margin"] = 0.7 * sum(terms) / len(pairs)
    return losses, logits, states


@pytest.mark.parametrize("cascade", ["none", "margin"])
def test_three_steps_are_upstreams_losses_gradients_and_contexts(cascade: str) -> None:
    trainer = build("TRAINER.FDBPL.CASCADE", cascade, "OPTIM.WARMUP_EPOCH", -1, "OPTIM.LR", 0.01)
    p, sgd = mh.exact(mh.leaves(trainer)), trainer.cfg.OPTIM
    assert set(p) == set(WORDS)
    optimizer = torch.optim.SGD(p.values(), lr=sgd.LR, momentum=sgd.MOMENTUM, weight_decay=sgd.WEIGHT_DECAY)
    for batch in batches(3):
        want, *_ = reference(trainer, p, batch)
        optimizer.zero_grad()
        sum(want.values()).backward()
        values = trainer.step(batch)
        assert set(values) == {"loss", "confidence", *want} and len(want) == (4 if cascade == "margin" else 3)
        for name, loss in want.items():
            assert values[name] == pytest.approx(loss.item(), rel=1e-4), name
        for name, leaf in mh.leaves(trainer).items():
            assert mh.difference(leaf.grad, p[name].grad) < 1e-4, name
        optimizer.step()
        for name, leaf in mh.leaves(trainer).items():
            assert mh.difference(leaf.detach(), p[name].detach()) < 1e-4, name


@pytest.mark.parametrize("cascade", ["none", "margin"])
def test_each_loss_moves_its_own_contexts(cascade: str) -> None:
    trainer, (batch,) = build("TRAINER.FDBPL.CASCADE", cascade), batches(1)
    losses = helpers.losses_of(trainer, batch)
    moved = {"kd": [True, False], "entropy": [False, True], "cosine": [True, True], "margin": [True, True]}
    for name, loss in losses.items():
        assert [bool(g.any()) for g in mh.gradient(loss, mh.leaves(trainer))] == moved[name], name


def test_the_cosines_weight_is_the_published_one_unless_told() -> None:
    config = FDBPL.Config()
    assert (config.cosine_weight, config.cascade, config.cascade_weight, config.margin) == (0.001, "none", 0.1, 0.2)
    assert (config.ctx_init, config.negative_init) == tuple(WORDS.values())


def test_both_contexts_go_through_the_text_tower_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, (batch,), calls, forward = build(), batches(1), [], TextTower.forward

    def counted(self, tree, context, *args, **kwargs):
        calls.append(len(context))
        return forward(self, tree, context, *args, **kwargs)

    monkeypatch.setattr(TextTower, "forward", counted)
    trainer.step(batch)
    assert calls == [2]
    both, learner = trainer.method.encode_classes(with_states=True), trainer.method.prompt_learner
    for features, one in ((both.features, learner), (both.others[0], learner.negative)):
        torch.testing.assert_close(features, trainer.method.encode(one).features, rtol=1e-5, atol=1e-6)
    alone = trainer.method.encode(learner, with_states=True).contexts[0]
    torch.testing.assert_close(both.contexts[0].hidden, alone.hidden, rtol=1e-5, atol=1e-5)
    assert both.contexts[0].context.equal(learner.ctx)


def test_the_positive_context_alone_predicts() -> None:
    trainer, (batch,) = build(), batches(1)
    logits = helpers.logits_of(trainer, batch)
    with torch.no_grad():
        trainer.method.prompt_learner.negative.ctx.add_(1)
    assert helpers.logits_of(trainer, batch).equal(logits)
    with torch.no_grad():
        want = reference(trainer, mh.exact(mh.leaves(trainer)), batch)[1][0]
    assert mh.difference(logits.detach(), want) < 1e-5


# ---- PLPP ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["positive", "both"])
def test_plpp_is_the_references_on_one_context_or_the_mean_over_both(on: str) -> None:
    trainer, (batch,) = build(*(x for item in mh.PLPP.items() for x in item), "TRAINER.FDBPL.PLPP_ON", on), batches(1)
    p = mh.exact(mh.leaves(trainer))
    want, logits, states = reference(trainer, p, batch)
    each = {n: mh.plpp_terms(lm.Pass(logits[0], want, p[n].unsqueeze(0), states[n])) for n in WORDS}
    if on == "positive":
        want |= {name: each["ctx"][name] for name in ("ppl", "inverse_ppl")}
    else:
        named = {"positive": each["ctx"], "negative": each["negative.ctx"]}
        want |= {f"{name}_{n}": terms[name] / 2 for n, terms in named.items() for name in ("ppl", "inverse_ppl")}
    losses, _ = trainer.losses(batch)
    assert set(losses) == set(want)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(want[name].item(), rel=1e-4), name
    got = mh.gradient(sum(losses.values()), mh.leaves(trainer))
    for a, b in zip(got, mh.gradient(sum(want.values()), p), strict=True):
        assert mh.difference(a, b) < 1e-4


def test_weights_of_zero_are_bit_identical_to_the_plain_method() -> None:
    def after_steps(*options: object) -> dict:
        trainer = build(*options, "TRAINER.FDBPL.PLPP_ON", "both")
        values = [trainer.step(batch) for batch in batches(3)]
        return {"values": values, "contexts": {n: p.detach() for n, p in mh.leaves(trainer).items()}}

    off = ("TRAINER.PLPP.ENABLED", True, "TRAINER.PLPP.WEIGHT", 0.0, "TRAINER.PLPP.INVERSE_WEIGHT", 0.0)
    helpers.assert_same(after_steps(*off), after_steps())


def test_there_is_an_fdbpl_with_plpp() -> None:
    assert {"FDBPL", "FDBPL_PLPP"} <= set(registry.trainer_names())


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


def test_upstreams_file_without_the_negative_context_can_be_evaluated_and_said(tmp_path) -> None:
    ours, said = build(), []
    shape = tuple(ours.method.prompt_learner.ctx.shape)
    assert {n: tuple(v.shape) for n, v in ours.method.saved.state_dict().items()} == dict.fromkeys(WORDS, shape)
    upstream = {"ctx": ds.unit(*shape, seed=8), "token_prefix": torch.zeros(5, 1, 64), "token_suffix": torch.zeros(5, 72, 64)}
    torch.save({"state_dict": upstream, "epoch": 50}, tmp_path / "model.pth.tar-50")
    before = ours.method.prompt_learner.negative.ctx.detach().clone()
    ours.saving.say = said.append
    ours.saving.load_weights(tmp_path / "model.pth.tar-50")
    assert ours.method.prompt_learner.ctx.equal(upstream["ctx"]) and ours.method.prompt_learner.negative.ctx.equal(before)
    assert said[-1] == "Not in there, and as before training: negative.ctx"
    with pytest.raises(InputError, match=r"expected \['ctx', 'negative.ctx'\], got \['negative.ctx'\]"):
        checkpoint.load_weights(ours.method.saved, {"negative.ctx": before}, "file", optional=FDBPL.optional)
    with pytest.raises(InputError, match=r"expected \['ctx', 'negative.ctx'\], got \['ctx'\]"):  # as a resumed run loads
        checkpoint.load_weights(ours.method.saved, {"ctx": before}, "file")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    return helpers.make_images(tmp_path_factory.mktemp("images"))


def trained(images, *opts: object) -> Trainer:
    """On the tiny data set's pictures, from a teacher of templates on the same backbone."""
    fixed = ("USE_CUDA", False, "TRAINER.FDBPL.PREC", "fp32", "DATASET.ROOT", str(images), "TEACHER.TRAINER", "ZeroshotCLIP2")
    cfg = helpers.make_cfg(*fixed, *opts)
    cfg.TRAINER.NAME, cfg.MODEL.BACKBONE.NAME = "FDBPL", "the student's"
    return Trainer(FDBPL, cfg, data=helpers.read_tiny(images), clip_model=mh.clip_of(), log=helpers.RunLog(quiet=True))


def test_a_resumed_run_ends_as_one_that_was_never_interrupted(tmp_path, images) -> None:
    whole = trained(images, "OPTIM.MAX_EPOCH", 3)
    whole.train(tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(trainer: Trainer) -> None:
        if trainer.state.epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        trained(images, "OPTIM.MAX_EPOCH", 3).train(tmp_path / "halved", after_epoch=kill)
    resumed = trained(images, "OPTIM.MAX_EPOCH", 3)
    assert resumed.saving.resume(tmp_path / "halved") and resumed.state.epoch == 2
    resumed.train(tmp_path / "halved")
    contents = [checkpoint.load(tmp_path / name / "prompt_learner" / "model.pth.tar-3") for name in ("whole", "halved")]
    for content in contents:
        content["plpp_reg"].pop("seconds")
    helpers.assert_same(*contents)


def test_after_the_kept_views_no_image_tower_runs_and_no_picture_is_opened(tmp_path, images, monkeypatch) -> None:
    monkeypatch.setattr("plpp_reg.engine.features.cache_folder", lambda: tmp_path)
    pictures, pixels = [], ImageDataset.pixels
    monkeypatch.setattr(ImageDataset, "pixels", lambda self, view, i: pictures.append(view) or pixels(self, view, i))

    def views_encoded() -> list[set[int]]:
        """The views that each of five epochs has made of a picture, and passed through an image tower."""
        trainer, epochs, passes = trained(images, "INPUT.VIEWS", 2, "OPTIM.MAX_EPOCH", 5, "FEATURES.MAX_GIB", 1.0), [], []
        hook = trainer.clip_model.visual.conv1.register_forward_hook(lambda *_: passes.append(1))

        def after_epoch(_: Trainer) -> None:
            assert bool(passes) == bool(pictures)
            epochs.append(set(pictures))
            pictures.clear(), passes.clear()

        trainer.train(after_epoch=after_epoch)
        hook.remove()
        return epochs

    assert views_encoded() == [{0}, {1}, set(), set(), set()]
    assert views_encoded() == [set()] * 5  # a second run finds all of it


@pytest.mark.parametrize("precision", ["bf16", "amp"])
def test_half_precision_is_near_float32_and_what_is_trained_stays_float32(precision: str) -> None:
    def made(asked: str) -> Trainer:
        return build("TRAINER.FDBPL.PREC", asked, "OPTIM.LR", 0.002, clip_model=mh.clip_of(asked))

    ds.assert_half_precision_is_near_float32(made, batches(3), precision)


# ---- refusals ------------------------------------------------------------------------------------------------------------


def test_contexts_of_different_lengths_are_refused() -> None:
    with pytest.raises(InputError, match=r"^TRAINER\.FDBPL\.NEGATIVE_INIT: expected 4 tokens, .*got 5$"):
        build("TRAINER.FDBPL.NEGATIVE_INIT", "not a photo of a")
    with pytest.raises(InputError, match=r"NEGATIVE_INIT: expected 4 .*got 3$"):
        build("TRAINER.FDBPL.NEGATIVE_INIT", "", "TRAINER.FDBPL.N_CTX", 3)
    assert build("TRAINER.FDBPL.NEGATIVE_INIT", "", "TRAINER.FDBPL.CTX_INIT", "", "TRAINER.FDBPL.N_CTX", 3)


def test_one_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"^FDBPL: expected at least 2 classes, .*got 1$"):
        build(names=["cat"])


def test_pairs_that_a_process_does_not_see_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plpp_reg.engine.method.current", lambda: Ranks(0, 2))
    with pytest.raises(InputError, match=r"CASCADE margin: expected one process .*got 2$"):
        build("TRAINER.FDBPL.CASCADE", "margin")


@pytest.mark.parametrize(
    ("key", "bad"),
    [("CASCADE", "third"), ("PLPP_ON", "negative"), ("COSINE_WEIGHT", -0.1), ("CASCADE_WEIGHT", -1.0), ("MARGIN", -0.1)],
)
def test_settings_out_of_their_range_are_refused(key: str, bad: object) -> None:
    with pytest.raises(InputError, match=rf"TRAINER\.FDBPL\.{key}\b.*{bad}"):
        build(f"TRAINER.FDBPL.{key}", bad)
