"""Each method against its slow, literal reference; what PLPP adds to it; what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from plpp_reg.clip.prompts import encode
from plpp_reg.commands import cli
from plpp_reg.data import DATASETS
from plpp_reg.engine import registry
from plpp_reg.engine.method import Method
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.errors import InputError
from plpp_reg.trainers import TRAINERS
from plpp_reg.trainers.coop import CoOp

from helpers import engine as helpers
from helpers import literal_methods as lm
from helpers import methods as mh
from helpers.clips import make_clip
from helpers.methods import CASES, METHODS, NAMES, WITH_TEXT, build, difference, gradient, leaves, with_gradients


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


# ---- parity with the references ------------------------------------------------------------------------------------------


ON_A_RESNET = ["CoOp", "CoCoOp", "KgCoOp", "ProGrad"]


@pytest.mark.parametrize(("name", "resnet"), [*((n, False) for n in CASES), *((n, True) for n in ON_A_RESNET)])
def test_every_loss_and_its_gradient_in_float64(name: str, resnet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mh.exact_clip(resnet)
    # Where the package says float32 it is given float64, so that rounding hides nothing: every parameter by itself.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    trainer, (batch,) = build(name, clip_model=model), helpers.fixed_batches(1, size=4)
    trainer.method.saved.double()
    p = mh.exact(leaves(trainer))
    passed, want = reference(name, p, batch, resnet=resnet)
    got = helpers.losses_of(trainer, mh.exact_batch(batch))
    assert tuple(got) == tuple(want) == CASES[name].losses
    for loss in got:
        assert difference(got[loss], want[loss]) < 1e-10
        for key, a, b in zip(p, gradient(got[loss], leaves(trainer)), gradient(want[loss], p), strict=True):
            assert (not a.any()) if not b.any() else difference(a, b) < 1e-9, (loss, key)
    with torch.no_grad():
        assert difference(helpers.logits_of(trainer, mh.exact_batch(batch)), passed.logits) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_losses_logits_and_gradients_in_float32(name: str) -> None:
    trainer, (batch,) = build(name), helpers.fixed_batches(1, size=4)
    p = mh.exact(leaves(trainer))
    passed, want = reference(name, p, batch)
    with torch.no_grad():
        logits = helpers.logits_of(trainer, batch)
    assert logits.dtype == torch.float32 and difference(logits, passed.logits) < 1e-5
    got = helpers.losses_of(trainer, batch)
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
    end_epoch = trainer.method.end_epoch

    def watched(epoch: int) -> None:
        before = {key: value.detach().clone() for key, value in leaves(trainer).items()}
        end_epoch(epoch)
        ours.append(before)
        if epoch < epochs:  # only the last epoch's end changes the parameters
            assert all(value.equal(before[key]) for key, value in leaves(trainer).items())

    trainer.method.end_epoch = watched
    trainer.train()
    after: list[lm.Parameters] = []
    for means in trainer.state.history:
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
    weights = trainer.method.epoch_weights
    assert weights == pytest.approx([0, 0, 1]) and math.isclose(sum(weights), 1)


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
    with pytest.raises(InputError, match=rf"^{key}: expected an integer <= {most} \(the tower's layers\), got {most + 1}$"):
        build(name, **{key: most + 1})
    least = 0 if name in ("IVLP", "PromptSRC") and key.endswith("VISION") else 1
    for bad in {-1, least - 1}:
        with pytest.raises(InputError, match=rf"{key}: expected an integer >= {least}, got {bad}$"):
            build(name, **{key: bad})


def test_maples_depth_is_bounded_by_the_shorter_tower() -> None:
    shallow = make_clip(width=64, layers=4, vision_layers=2)
    with pytest.raises(InputError, match=r"PROMPT_DEPTH: .* <= 2 "):
        build("MaPLe", clip_model=shallow)


@pytest.mark.parametrize(
    ("name", "key"),
    [("MaPLe", "N_CTX"), ("IVLP", "N_CTX_TEXT"), ("VPT", "N_CTX_VISION"), ("CoCoOp random", "N_CTX")],
)
@pytest.mark.parametrize("bad", [0, -2])
def test_no_prompts_at_all_are_refused(name: str, key: str, bad: int) -> None:
    with pytest.raises(InputError, match=rf"^TRAINER\.\w+\.{key}: expected an integer >= 1, got {bad}"):
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
    with_plpp = {"CoOp", "CoCoOp", "KgCoOp", "ProGrad", "MaPLe", "IVLP", "PromptSRC", "FDBPL"}
    with_plpp |= {f"{name}_KDPL" for name in ("CoOp", "KgCoOp", "MaPLe", "PromptSRC")}
    assert {name.removesuffix("_PLPP") for name in names if name.endswith("_PLPP")} == with_plpp
    for name in sorted(with_plpp):
        cls, plain, plpp = registry.find_trainer(f"{name}_PLPP")
        assert (cls.__name__, plain, plpp) == (name, name, True) and issubclass(cls, Method)
    assert registry.find_trainer("CoOp") == (CoOp, "CoOp", False)
