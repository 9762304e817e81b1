"""Each method against its slow, literal reference; what PLPP adds to it; what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plpp_reg import cli
from plpp_reg.clip.prompts import encode
from plpp_reg.clip.text import TextTower
from plpp_reg.datasets import DATASETS, DatasetEntry, templates
from plpp_reg.engine import registry
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError
from plpp_reg.trainers import TRAINERS
from plpp_reg.trainers.cocoop import CoCoOp
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.prograd import align
from plpp_reg.trainers.zeroshot import ZeroshotCLIP, ZeroshotCLIP2

import engine_helpers as helpers
import literal_methods as lm
import methods_helpers as mh
from methods_helpers import CASES, METHODS, NAMES, WITH_TEXT, build, difference, leaves, with_gradients


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", mh.ENTRY)


def reference(
    name: str, p: lm.Parameters, batch: lm.Batch, plpp: bool = False, resnet: bool = False
) -> tuple[lm.Pass, dict[str, Tensor]]:
    """The reference's pass, and all losses with PLPP's terms."""
    passed = CASES[name].reference(mh.exact_clip(resnet), NAMES, p, mh.exact_batch(batch))
    terms = mh.plpp_terms(passed) if plpp else {}
    return passed, {**passed.losses, **{key: terms[key] for key in terms if key != "perplexity"}}


def gradient(loss: Tensor, of: lm.Parameters) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(of.values()), retain_graph=True, allow_unused=True, materialize_grads=True))


# ---- parity with the references ------------------------------------------------------------------------------------------


ON_A_RESNET = ["CoOp", "CoCoOp", "KgCoOp", "ProGrad"]


@pytest.mark.parametrize(("name", "resnet"), [*((n, False) for n in CASES), *((n, True) for n in ON_A_RESNET)])
def test_every_loss_and_its_gradient_in_float64(name: str, resnet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the package says float32 it is given float64, so that rounding hides nothing: every parameter by itself.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    trainer, (batch,) = build(name, clip_model=mh.exact_clip(resnet)), helpers.fixed_batches(1, size=4)
    trainer.prompts.double()
    p = mh.exact(leaves(trainer))
    passed, want = reference(name, p, batch, resnet=resnet)
    got = trainer.compute_losses(mh.exact_batch(batch))
    assert tuple(got) == tuple(want) == CASES[name].losses
    for loss in got:
        assert difference(got[loss], want[loss]) < 1e-10
        for key, a, b in zip(p, gradient(got[loss], leaves(trainer)), gradient(want[loss], p), strict=True):
            assert (not a.any()) if not b.any() else difference(a, b) < 1e-9, (loss, key)
    with torch.no_grad():
        trainer.prepare_inference()
        assert difference(trainer.inference(mh.exact_batch(batch)), passed.logits) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_losses_logits_and_gradients_in_float32(name: str) -> None:
    trainer, (batch,) = build(name), helpers.fixed_batches(1, size=4)
    p = mh.exact(leaves(trainer))
    passed, want = reference(name, p, batch)
    with torch.no_grad():
        trainer.prepare_inference()
        logits = trainer.inference(batch)
    assert logits.dtype == torch.float32 and difference(logits, passed.logits) < 1e-5
    got = trainer.compute_losses(batch)
    for loss in got:
        assert difference(got[loss], want[loss]) < 1e-5
        a, b = mh.flat(gradient(got[loss], leaves(trainer))), mh.flat(gradient(want[loss], p))
        assert (a - b).norm() / b.norm() < 1e-5, loss


@pytest.mark.parametrize("name", WITH_TEXT)
def test_plpps_terms_are_the_references_on_the_references_states(name: str) -> None:
    trainer, (batch,) = build(name, plpp=True), helpers.fixed_batches(1, size=3)
    p = mh.exact(leaves(trainer))
    passed, want = reference(name, p, batch, plpp=True)
    values, grads = with_gradients(trainer, batch, with_perplexity=True)
    assert set(values) == {"loss", "acc", "perplexity", *CASES[name].losses, "ppl", "inverse_ppl"}
    for loss in want:
        assert values[loss] == pytest.approx(want[loss].item(), rel=1e-5)
    assert values["loss"] == pytest.approx(sum(want.values()).item(), rel=1e-5)
    assert values["perplexity"] == pytest.approx(mh.plpp_terms(passed)["perplexity"].item(), rel=1e-5)
    assert values["acc"] == pytest.approx(100 * (passed.logits.argmax(1) == batch["label"]).double().mean().item())
    stepped = lm.gradients(CASES[name].cls.__name__, want, p, strength=0.7)
    assert (mh.flat(grads.values()) - mh.flat(stepped)).norm() / mh.flat(stepped).norm() < 1e-5
    # the terms are a good part of what was compared
    plain = lm.gradients(CASES[name].cls.__name__, reference(name, p, batch)[1], p, strength=0.7)
    assert (mh.flat(plain) - mh.flat(stepped)).norm() / mh.flat(stepped).norm() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_measured_prompts_are_those_of_layer_0_with_the_deeper_ones_in_place(name: str) -> None:
    settings = {**mh.PLPP, "TRAINER.PLPP.ENABLED": False}  # whether or not it is part of the training
    trainer = build(name, *(x for item in settings.items() for x in item))
    (batch,) = helpers.fixed_batches(1, size=2)
    measured = trainer.measure_prompts()
    if name not in WITH_TEXT:
        assert measured is None
        return
    p = mh.exact(leaves(trainer))
    if name == "CoCoOp":  # no image, no shift: the context as it is learned
        passed = lm.coop(mh.exact_clip(), NAMES, p, mh.exact_batch(batch), words=mh.WORDS)
    else:
        passed, _ = reference(name, p, batch)
    want = mh.plpp_terms(passed)
    assert measured.perplexity_loss.item() == pytest.approx(want["ppl"].item() / 0.3, rel=1e-5)
    assert measured.inverse_loss.item() == pytest.approx(want["inverse_ppl"].item() / 0.7, rel=1e-5)
    assert measured.perplexity.item() == pytest.approx(want["perplexity"].item(), rel=1e-5)


TEN_STEPS = [(name, plpp) for name in METHODS for plpp in (False, True) if name in WITH_TEXT or not plpp]


@pytest.mark.parametrize(("name", "plpp"), [*TEN_STEPS, ("CoOp class-specific", True)])
def test_ten_steps_stay_together(name: str, plpp: bool) -> None:
    trainer = build(name, "OPTIM.WARMUP_EPOCH", -1, "OPTIM.LR", 0.01, plpp=plpp)
    start = {key: value.detach().clone() for key, value in leaves(trainer).items()}
    sgd = trainer.cfg.OPTIM
    their = lm.Training(
        start,
        CASES[name].cls.__name__,
        lambda p, batch: reference(name, p, batch, plpp)[1],
        strength=0.7,
        lr=sgd.LR,
        momentum=sgd.MOMENTUM,
        weight_decay=sgd.WEIGHT_DECAY,
    )
    assert sgd.LR > 0 and sgd.MOMENTUM > 0 and sgd.WEIGHT_DECAY > 0
    for batch in helpers.fixed_batches(10, size=2):
        want, values = their.step(batch), trainer.step(batch)
        for key in want:  # scl_logits compares distributions that are nearly equal: what is left of their digits is fewer
            assert values[key] == pytest.approx(want[key].item(), rel=1e-4 if key == "scl_logits" else 1e-5)
    for key, value in leaves(trainer).items():
        assert difference(value, their.p[key]) < 1e-5, key
        assert (their.p[key] - start[key]).abs().max() > 1e-3, key  # it went somewhere


def test_promptsrc_averages_its_epochs_by_a_gaussian() -> None:
    epochs = 3
    trainer = build("PromptSRC", "OPTIM.MAX_EPOCH", epochs, GPA_MEAN=2.2, GPA_STD=0.8)
    batches = mh.Batches(trainer, helpers.fixed_batches(2, size=2))
    their = lm.Training(
        leaves(trainer),
        "PromptSRC",
        lambda p, batch: reference("PromptSRC", p, batch)[1],
        lr=1.0,
        momentum=trainer.cfg.OPTIM.MOMENTUM,
        weight_decay=trainer.cfg.OPTIM.WEIGHT_DECAY,
    )
    ours: list[lm.Parameters] = []  # at the end of each epoch, before and after what the method does there
    end_epoch = trainer.end_epoch

    def watched() -> None:
        before = {key: value.detach().clone() for key, value in leaves(trainer).items()}
        end_epoch()
        ours.append(before)
        if trainer.epoch < epochs:  # only the last epoch's end changes the parameters
            assert all(value.equal(before[key]) for key, value in leaves(trainer).items())

    trainer.end_epoch = watched
    trainer.train()
    after: list[lm.Parameters] = []
    for means in trainer.history:
        their.optimizer.param_groups[0]["lr"] = means["lr"]
        for batch in batches:
            their.step(batch)
        after.append(their.copy())
    for mine, theirs in zip(ours, after, strict=True):
        assert all(difference(mine[key], theirs[key]) < 1e-5 for key in theirs)
    average = lm.gaussian_average(after, mean=2.2, std=0.8)
    for key, value in leaves(trainer).items():
        assert value.dtype == torch.float32 and difference(value, average[key]) < 1e-5
        assert difference(after[-1][key], average[key]) > 1e-4  # not simply the last epoch's


def test_a_gaussian_far_from_every_epoch_still_has_a_sum_of_one() -> None:
    # exp underflows for all of them; upstream divides 0 by 0
    trainer = build("PromptSRC", "OPTIM.MAX_EPOCH", 3, GPA_MEAN=500.0, GPA_STD=1.0)
    assert trainer.epoch_weights == pytest.approx([0, 0, 1]) and math.isclose(sum(trainer.epoch_weights), 1)


# ---- off is off, and what is trained -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*[m for m in METHODS if m in WITH_TEXT], "CoOp class-specific", "CoOp middle"])
def test_weights_of_zero_are_bit_identical_to_the_plain_method(name: str) -> None:
    def after_steps(*options: object) -> dict:
        trainer = build(name, *options)
        values = [trainer.step(batch) for batch in helpers.fixed_batches(3)]
        return {
            "values": values,
            "parameters": {key: p.detach() for key, p in leaves(trainer).items()},
            "gradients": {key: p.grad for key, p in leaves(trainer).items()},
            "optimizer": trainer.optimizer.state_dict(),
            "stream": torch.get_rng_state(),
        }

    off = ("TRAINER.PLPP.ENABLED", True, "TRAINER.PLPP.WEIGHT", 0.0, "TRAINER.PLPP.INVERSE_WEIGHT", 0.0)
    helpers.assert_same(after_steps(*off), after_steps())


D, VISION, EMBED, HIDDEN = mh.TEXT_WIDTH, mh.VISION_WIDTH, mh.EMBED, mh.EMBED // 16
TEXT_LAYER = "text_encoder.transformer.resblocks.{}.VPT_shallow"
IMAGE_LAYER = "image_encoder.transformer.resblocks.{}.VPT_shallow"
TRAINED = {
    "CoOp": {"ctx": (3, D)},
    "KgCoOp": {"ctx": (4, D)},
    "ProGrad": {"ctx": (3, D)},
    "CoCoOp": {
        "ctx": (4, D),
        "meta_net.linear1.weight": (HIDDEN, EMBED),
        "meta_net.linear1.bias": (HIDDEN,),
        "meta_net.linear2.weight": (D, HIDDEN),
        "meta_net.linear2.bias": (D,),
    },
    "MaPLe": {
        "prompt_learner.ctx": (2, D),
        "prompt_learner.proj.weight": (VISION, D),
        "prompt_learner.proj.bias": (VISION,),
        **{f"prompt_learner.compound_prompts_text.{i}": (2, D) for i in range(2)},
        **{f"prompt_learner.compound_prompt_projections.{i}.weight": (VISION, D) for i in range(2)},
        **{f"prompt_learner.compound_prompt_projections.{i}.bias": (VISION,) for i in range(2)},
    },
    "IVLP": {
        "image_encoder.VPT": (4, VISION),
        IMAGE_LAYER.format(1): (4, VISION),
        "prompt_learner.ctx": (3, D),
        **{TEXT_LAYER.format(i): (3, D) for i in (1, 2)},
    },
    "VPT": {"image_encoder.VPT": (4, VISION), **{IMAGE_LAYER.format(i): (4, VISION) for i in (1, 2)}},
    "PromptSRC": {
        "image_encoder.VPT": (3, VISION),
        IMAGE_LAYER.format(1): (3, VISION),
        "prompt_learner.ctx": (4, D),
        **{TEXT_LAYER.format(i): (4, D) for i in (1, 2)},
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_reaches_what_is_trained_and_nothing_else(name: str) -> None:
    assert set(TRAINED) == set(METHODS)
    trainer = build(name, plpp=name in WITH_TEXT)
    frozen = copy.deepcopy(trainer.clip_model.state_dict())
    start = {key: value.detach().clone() for key, value in leaves(trainer).items()}
    trainer.step(helpers.fixed_batches(1)[0])
    assert {key: tuple(p.shape) for key, p in leaves(trainer).items()} == TRAINED[name]
    for key, p in leaves(trainer).items():
        assert p.dtype == torch.float32 and not p.equal(start[key])
        rows = p.grad.abs().amax(-1) if p.dim() == 2 and p.shape[0] < 6 else p.grad.abs().amax()
        assert rows.gt(0).all(), key  # each vector, not only some
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in leaves(trainer).values()} and len(optimized) == len(TRAINED[name])
    helpers.assert_same(dict(trainer.clip_model.state_dict()), dict(frozen))
    assert all(p.grad is None and not p.requires_grad for p in trainer.clip_model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_what_training_starts_from(name: str) -> None:
    trainer = build(name, as_started=True)
    p = {key.removeprefix("prompt_learner."): value.detach() for key, value in leaves(trainer).items()}
    table = mh.clip_of().token_embedding.weight
    for key, value in p.items():
        if key == "ctx" and CASES[name].options.get("CTX_INIT"):
            assert value.equal(table[encode(mh.WORDS)[: len(value)]])
        elif "VPT" in key or "compound_prompts" in key or key == "ctx":
            assert abs(value.mean()) < 0.006 and value.std().item() == pytest.approx(0.02, rel=0.25), key
        elif key.endswith("weight"):  # nn.Linear's own start
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < value.abs().max() <= bound, key
    assert len({tuple(value.flatten()[:4].tolist()) for key, value in p.items() if "VPT" in key}) == sum("VPT" in k for k in p)
    if name == "MaPLe":  # one layer, copied
        first, second = (p[f"compound_prompt_projections.{i}.weight"] for i in range(2))
        assert first.equal(second) and not first.equal(p["proj.weight"])
        helpers.assert_same(p["compound_prompt_projections.0.bias"], p["compound_prompt_projections.1.bias"])


# ---- CoOp ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_any_number_of_context_vectors(position: str) -> None:
    (batch,) = helpers.fixed_batches(1, size=2)
    for n_ctx in range(1, 17) if position == "end" else (1, 2, 16):
        trainer = build("CoOp", N_CTX=n_ctx, CLASS_TOKEN_POSITION=position)
        want = lm.coop(mh.exact_clip(), NAMES, mh.exact(leaves(trainer)), mh.exact_batch(batch), position=position)
        with torch.no_grad():
            trainer.prepare_inference()
            assert difference(trainer.inference(batch), want.logits) < 1e-5, n_ctx


@pytest.mark.parametrize("name", ["CoOp", "KgCoOp", "CoCoOp"])
@pytest.mark.parametrize("words", ["a photo of a", "a close-up xylographic_photo of", "it's the"])
def test_init_words_start_at_zero_shot_clip_with_those_words(name: str, words: str) -> None:
    # as many vectors as tokens, however many words: nothing of the sentence is lost
    trainer = build(name, CTX_INIT=words, as_started=True)
    assert trainer.prompts.n_ctx == len(encode(words.replace("_", " ")))
    if name == "CoCoOp":  # whose meta-net shifts the words: not here
        torch.nn.init.zeros_(trainer.prompts.meta_net.linear2.weight)
        torch.nn.init.zeros_(trainer.prompts.meta_net.linear2.bias)
    (batch,) = helpers.fixed_batches(1, size=2)
    want = lm.zeroshot(mh.exact_clip(), NAMES, batch["img"], [words.replace("_", " ") + " {}."])
    with torch.no_grad():
        trainer.prepare_inference()
        assert difference(trainer.inference(batch), want) < 1e-5


def save_checkpoint(path, state_dict, classnames=None):
    """A checkpoint of ours, or of upstream's without class names."""
    extra = {} if classnames is None else {"plpp_reg": {"classnames": list(classnames)}}
    torch.save({"state_dict": state_dict, "epoch": 1, **extra}, path)
    return path


def test_class_specific_context_is_refused_for_other_classes(tmp_path) -> None:
    trainer = build("CoOp class-specific")
    state = trainer.prompts.state_dict()
    others = [*NAMES[:-1], "fox"]  # as many: the shapes fit
    refusal = "TRAINER.COOP.CSC: expected shared context.*the new classes have no vectors"
    with pytest.raises(InputError, match=refusal):
        trainer.saving.load_weights(save_checkpoint(tmp_path / "others", state, others))
    trainer.saving.load_weights(save_checkpoint(tmp_path / "ours", state, NAMES))
    unknown = save_checkpoint(tmp_path / "upstream", state)  # CoOp's own files do not say what they were trained on
    trainer.saving.load_weights(unknown)
    on_new = build("CoOp class-specific", "DATASET.SUBSAMPLE_CLASSES", "new")
    with pytest.raises(InputError, match=refusal):
        on_new.saving.load_weights(unknown)
    shared = build("CoOp", "DATASET.SUBSAMPLE_CLASSES", "new")
    shared.saving.load_weights(save_checkpoint(tmp_path / "shared", shared.prompts.state_dict(), others))


# ---- KgCoOp --------------------------------------------------------------------------------------------------------------


def test_kgcoops_weight_is_its_factor_and_nothing_else() -> None:
    (batch,) = helpers.fixed_batches(1)
    one, three, none = (build("KgCoOp", W=w).compute_losses(batch) for w in (1.0, 3.0, 0.0))
    assert 0 < one["kg"].item() < 2
    assert three["kg"].item() == pytest.approx(3 * one["kg"].item(), rel=1e-6) and none["kg"].item() == 0
    assert one["ce"].equal(three["ce"]) and one["ce"].equal(none["ce"])


def test_kgcoop_starts_at_no_distance_from_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry(mh.ENTRY.reader, mh.WORDS + " {}."))
    losses = build("KgCoOp", as_started=True).compute_losses(helpers.fixed_batches(1)[0])
    assert abs(losses["kg"].item()) < 1e-5


# ---- ProGrad -------------------------------------------------------------------------------------------------------------

vectors = st.integers(0, 2**32 - 1).map(lambda seed: torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)))


@given(pair=vectors, strength=st.sampled_from([0.25, 1.0, 1.5]))
def test_alignment_takes_out_what_goes_against_the_general_gradient(pair: Tensor, strength: float) -> None:
    g, general = pair.double()
    if (g * general).sum() > 0:
        assert align(g, general, strength).equal(g)  # no conflict: not a bit changes
        g = -g
    aligned = align(g, general, strength)
    assert aligned.shape == g.shape
    torch.testing.assert_close(aligned, lm.prograd_gradient(g, general, strength), rtol=1e-12, atol=1e-12)
    # what is left against it is the part that `strength` leaves; across it nothing changes
    torch.testing.assert_close((aligned * general).sum(), (1 - strength) * (g * general).sum(), rtol=1e-9, atol=1e-12)
    across = torch.randn(g.shape, generator=torch.Generator().manual_seed(0)).double()
    across -= (across * general).sum() / general.square().sum() * general
    torch.testing.assert_close((aligned * across).sum(), (g * across).sum(), rtol=1e-9, atol=1e-12)
    # the general gradient's length is of no account
    torch.testing.assert_close(align(g, 1e-3 * general, strength), aligned, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_general_gradient_of_zero_changes_nothing(dtype: torch.dtype) -> None:
    g = torch.randn(3, 4, dtype=dtype)
    assert align(g, torch.zeros_like(g)).equal(g)
    opposite = align(g, -1e-20 * g)  # tiny is not zero
    assert opposite.isfinite().all() and opposite.abs().max() < 1e-5


def prograd_step(trainer: PromptTrainer, conflict: bool) -> tuple[lm.Batch, Tensor, Tensor, Tensor]:
    """A batch whose gradients disagree (or do not), and those of all losses but kl, of ce alone, and of kl."""
    for batch in helpers.fixed_batches(20):
        losses = {**trainer.compute_losses(batch), **trainer._plpp_losses(with_perplexity=False)}
        (general,) = gradient(losses.pop("kl"), leaves(trainer))
        (domain,) = gradient(sum(losses.values()), leaves(trainer))
        (ce,) = gradient(losses["ce"], leaves(trainer))
        if ((domain * general).sum() < 0) == conflict == ((ce * general).sum() < 0):
            return batch, domain, ce, general
    raise AssertionError("no such batch")


@pytest.mark.parametrize("conflict", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_prograd_aligns_the_sum_of_ce_and_plpp(conflict: bool, strength: float) -> None:
    trainer = build("ProGrad", "LOSS.LAMBDA", strength, plpp=True)
    batch, domain, ce, general = prograd_step(trainer, conflict)
    got = with_gradients(trainer, batch)[1]["ctx"]
    assert difference(got, lm.prograd_gradient(domain, general, strength)) < 1e-5
    if not conflict:
        assert difference(got, domain) < 1e-5
        return
    left = torch.nn.functional.cosine_similarity(got.flatten(), general.flatten(), dim=0)
    assert abs(left) < 1e-5 if strength == 1 else left < -1e-3
    joined_after = lm.prograd_gradient(ce, general, strength) + domain - ce
    assert difference(got, joined_after) > 1e-3  # the regularizer's own part against it is taken out too


def test_the_general_loss_never_moves_the_context_by_itself() -> None:
    # where there is no conflict the step is CoOp's to the bit
    trainer = build("ProGrad")
    batch, *_ = prograd_step(trainer, conflict=False)
    assert with_gradients(trainer, batch)[1]["ctx"].equal(with_gradients(build("CoOp"), batch)[1]["ctx"])


@pytest.mark.parametrize("t", [0.0, -1.0])
def test_prograds_temperature_is_above_zero(t: float) -> None:
    with pytest.raises(InputError, match=r"LOSS\.T: expected a number > 0, got"):
        build("ProGrad", "LOSS.T", t)


# ---- CoCoOp --------------------------------------------------------------------------------------------------------------


def one_by_one(batch: lm.Batch) -> list[lm.Batch]:
    return [{"img": image[None], "label": label[None]} for image, label in zip(batch["img"], batch["label"], strict=True)]


def assert_same_step(got: tuple[dict[str, float], dict[str, Tensor]], want: tuple[dict[str, float], dict[str, Tensor]]) -> None:
    for key in ("ce", "ppl", "inverse_ppl", "loss"):
        assert got[0][key] == pytest.approx(want[0][key], rel=1e-5)
    for key in want[1]:
        assert difference(got[1][key], want[1][key]) < 2e-5, key


def test_cocoop_gives_each_image_what_it_gets_alone() -> None:
    trainer, (batch,) = build("CoCoOp", plpp=True), helpers.fixed_batches(1, size=5)
    alone = [with_gradients(trainer, single) for single in one_by_one(batch)]
    assert len({round(values["ppl"], 6) for values, _ in alone}) == 5  # another context for each image
    mean_values = {key: sum(values[key] for values, _ in alone) / 5 for key in alone[0][0] if key != "perplexity"}
    mean_grads = {key: sum(grads[key] for _, grads in alone) / 5 for key in alone[0][1]}
    assert_same_step(with_gradients(trainer, batch), (mean_values, mean_grads))
    with torch.no_grad():
        together = trainer.inference(batch)
        alone = torch.cat([trainer.inference({"img": image[None]}) for image in batch["img"]])
    assert difference(together, alone) < 1e-5


def test_cocoop_in_chunks_of_classes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[int]] = []  # for each text pass the nodes of its chunks
    original = TextTower.forward

    def forward(self, tree, context, *args, **kwargs):
        ran.append([len(chunk.nodes.token) for chunk in tree.chunks])
        return original(self, tree, context, *args, **kwargs)

    monkeypatch.setattr(TextTower, "forward", forward)
    (batch,) = helpers.fixed_batches(1, size=5)
    whole, chunked = build("CoCoOp", plpp=True), build("CoCoOp", "MODEL.TEXT_MEMORY_MIB", 1, plpp=True)
    assert_same_step(with_gradients(chunked, batch), with_gradients(whole, batch))
    chunks, all_at_once = ran
    assert len(all_at_once) == 1 < len(chunks) and max(chunks) <= chunked.tower.max_nodes(5) < chunked.tower.max_nodes(1)
    assert max(chunks) < max(all_at_once)


def test_cocoop_tests_as_many_images_at_once_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = helpers.fixed_batches(1, size=5)
    sizes: list[int] = []
    original = CoCoOp.conditional_logits
    monkeypatch.setattr(
        CoCoOp, "conditional_logits", lambda self, f, need_hidden: sizes.append(len(f)) or original(self, f, need_hidden)
    )
    a_class = 4 * EMBED  # bytes of one class's features
    trainer = build("CoCoOp")
    with torch.no_grad():
        whole = trainer.inference(batch)
        assert sizes == [5]
        for images, want in ((2, [2, 2, 1]), (1, [1] * 5), (0.1, [1] * 5)):
            sizes.clear()
            trainer.tower.memory_mib = 8 * images * a_class * len(NAMES) / 2**20 * 1.01
            assert difference(trainer.inference(batch), whole) < 1e-5
            assert sizes == want


# ---- zero-shot CLIP ------------------------------------------------------------------------------------------------------


def zeroshot(cls: type[PromptTrainer], dataset: str) -> tuple[PromptTrainer, Tensor, Tensor]:
    """A trainer, images, and its logits."""
    cfg = helpers.make_cfg("DATASET.NAME", dataset, "USE_CUDA", False)
    trainer = cls(cfg, data=mh.no_images(NAMES), clip_model=mh.clip_of(), log=helpers.RunLog(quiet=True))
    images = helpers.fixed_batches(1)[0]["img"]
    with torch.no_grad():
        trainer.prepare_inference()
        return trainer, images, trainer.inference({"img": images})


@pytest.mark.parametrize(("dataset", "template"), [("tiny", mh.TEMPLATE), ("nobody knows it", "a photo of a {}.")])
def test_zeroshot_has_the_data_sets_template_or_the_fallback(dataset: str, template: str) -> None:
    trainer, images, logits = zeroshot(ZeroshotCLIP, dataset)
    assert difference(logits, lm.zeroshot(mh.exact_clip(), NAMES, images, [template])) < 1e-5
    assert trainer.trained() == [] and trainer.prompts is None


@pytest.mark.parametrize("dataset", ["tiny", "ImageNet"])
def test_zeroshot2_is_the_mean_of_several_templates_however_often_it_is_built(dataset: str) -> None:
    want = [
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ] + ([mh.TEMPLATE] if dataset == "tiny" else [])
    before = templates.SEVEN
    built = [zeroshot(ZeroshotCLIP2, dataset) for _ in range(3)]
    for trainer, images, logits in built:
        assert trainer.templates == want
        assert difference(logits, lm.zeroshot(mh.exact_clip(), NAMES, images, want)) < 1e-5
        assert logits.equal(built[0][2])
    assert templates.SEVEN == before and len(before) == 7


# ---- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MaPLe", "IVLP", "VPT", "PromptSRC"])
def test_visual_prompts_on_a_resnet_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^visual prompts: expected a backbone with a vision transformer .*got a ResNet$"):
        build(name, clip_model=mh.clip_of(resnet=True))


DEPTHS = {
    ("MaPLe", "PROMPT_DEPTH"): min(mh.TEXT_LAYERS, mh.VISION_LAYERS),
    ("IVLP", "PROMPT_DEPTH_TEXT"): mh.TEXT_LAYERS,
    ("IVLP", "PROMPT_DEPTH_VISION"): mh.VISION_LAYERS,
    ("VPT", "PROMPT_DEPTH_VISION"): mh.VISION_LAYERS,
    ("PromptSRC", "PROMPT_DEPTH_TEXT"): mh.TEXT_LAYERS,
    ("PromptSRC", "PROMPT_DEPTH_VISION"): mh.VISION_LAYERS,
}


@pytest.mark.parametrize(("name", "key"), DEPTHS)
def test_a_depth_beyond_the_towers_layers_is_refused(name: str, key: str) -> None:
    most = DEPTHS[name, key]
    build(name, **{key: most})
    for bad in (0, -1, most + 1):
        line = rf"^{key}: expected an integer >= 1 and <= {most} \(the tower's layers\), got {bad}$"
        with pytest.raises(InputError, match=line):
            build(name, **{key: bad})


def test_maples_depth_is_bounded_by_the_shorter_tower() -> None:
    from conftest import make_clip

    shallow = make_clip(width=64, layers=4, vision_layers=2)
    with pytest.raises(InputError, match=r"PROMPT_DEPTH: .* <= 2 "):
        build("MaPLe", clip_model=shallow)


@pytest.mark.parametrize(
    ("name", "key"),
    [("MaPLe", "N_CTX"), ("IVLP", "N_CTX_TEXT"), ("IVLP", "N_CTX_VISION"), ("VPT", "N_CTX_VISION"), ("CoCoOp random", "N_CTX")],
)
@pytest.mark.parametrize("bad", [0, -2])
def test_no_prompts_at_all_are_refused(name: str, key: str, bad: int) -> None:
    with pytest.raises(InputError, match=rf"(?i)^{key}: expected an integer >= 1.*, got {bad}"):
        build(name, **{key: bad})


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_gaussian_without_width_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match=r"GPA_STD: expected a number > 0, got"):
        build("PromptSRC", GPA_STD=bad)


@pytest.mark.parametrize("name", ["VPT", "ZeroshotCLIP", "ZeroshotCLIP2"])
def test_plpp_without_text_context_is_refused_by_name_and_by_flag(name: str, capsys: pytest.CaptureFixture) -> None:
    sentence = f"{name}_PLPP: {name} learns no text context, so PLPP has nothing to act on: use {name}"
    for arguments in (
        RunArguments(trainer=f"{name}_PLPP"),
        RunArguments(trainer=name, opts=("TRAINER.PLPP.ENABLED", "True")),
    ):
        with pytest.raises(InputError) as raised:
            resolve(arguments)
        assert str(raised.value) == sentence
    for flags in (["--trainer", f"{name}_PLPP"], ["--trainer", name, "TRAINER.PLPP.ENABLED", "True"]):
        assert cli.main(["train", *flags]) == 2
        assert capsys.readouterr().err.strip().endswith(sentence)
    assert f"{name}_PLPP" not in registry.trainer_names()


def test_every_method_that_learns_text_context_has_its_plpp() -> None:
    names = registry.trainer_names()
    assert set(TRAINERS) <= set(names)
    with_plpp = {"CoOp", "CoCoOp", "KgCoOp", "ProGrad", "MaPLe", "IVLP", "PromptSRC"}
    assert {name.removesuffix("_PLPP") for name in names if name.endswith("_PLPP")} == with_plpp
    for name in sorted(with_plpp):
        cls, plain, plpp = registry.find_trainer(f"{name}_PLPP")
        assert (cls.__name__, plain, plpp) == (name, name, True) and issubclass(cls, PromptTrainer)
    assert registry.find_trainer("CoOp") == (CoOp, "CoOp", False)
