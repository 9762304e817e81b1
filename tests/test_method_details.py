"""What is particular to one method: CoOp's words and classes, KgCoOp's distance, ProGrad's gradients, CoCoOp's images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plpp_reg.clip.prompts import encode
from plpp_reg.clip.text import TextTower
from plpp_reg.data import DATASETS, DatasetEntry, templates
from plpp_reg.engine.method import Method
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.trainers.cocoop import CoCoOp
from plpp_reg.trainers.prograd import align
from plpp_reg.trainers.zeroshot import ZeroshotCLIP, ZeroshotCLIP2

from helpers import engine as helpers
from helpers import literal_methods as lm
from helpers import methods as mh
from helpers.methods import NAMES, build, difference, gradient, leaves, with_gradients


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", mh.ENTRY)


# ---- CoOp ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_any_number_of_context_vectors(position: str) -> None:
    (batch,) = helpers.fixed_batches(1, size=2)
    for n_ctx in range(1, 17) if position == "end" else (1, 2, 16):
        trainer = build("CoOp", N_CTX=n_ctx, CLASS_TOKEN_POSITION=position)
        want = lm.coop(mh.exact_clip(), NAMES, mh.exact(leaves(trainer)), mh.exact_batch(batch), position=position)
        with torch.no_grad():
            assert difference(helpers.logits_of(trainer, batch), want.logits) < 1e-5, n_ctx


@pytest.mark.parametrize("name", ["CoOp", "KgCoOp", "CoCoOp"])
@pytest.mark.parametrize("words", ["a photo of a", "a close-up xylographic_photo of", "it's the"])
def test_init_words_start_at_zero_shot_clip_with_those_words(name: str, words: str) -> None:
    # as many vectors as tokens, however many words: nothing of the sentence is lost
    trainer = build(name, CTX_INIT=words, as_started=True)
    assert trainer.method.saved.n_ctx == len(encode(words.replace("_", " ")))
    if name == "CoCoOp":  # whose meta-net shifts the words: not here
        torch.nn.init.zeros_(trainer.method.saved.meta_net.linear2.weight)
        torch.nn.init.zeros_(trainer.method.saved.meta_net.linear2.bias)
    (batch,) = helpers.fixed_batches(1, size=2)
    want = lm.zeroshot(mh.exact_clip(), NAMES, batch["img"], [words.replace("_", " ") + " {}."])
    with torch.no_grad():
        assert difference(helpers.logits_of(trainer, batch), want) < 1e-5


def save_checkpoint(path, state_dict, classnames=None):
    """A checkpoint of ours, or of upstream's without class names."""
    extra = {} if classnames is None else {"plpp_reg": {"classnames": list(classnames)}}
    torch.save({"state_dict": state_dict, "epoch": 1, **extra}, path)
    return path


def test_class_specific_context_is_refused_for_other_classes(tmp_path) -> None:
    trainer = build("CoOp class-specific")
    state = trainer.method.saved.state_dict()
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
    shared.saving.load_weights(save_checkpoint(tmp_path / "shared", shared.method.saved.state_dict(), others))


# ---- KgCoOp --------------------------------------------------------------------------------------------------------------


def test_kgcoops_weight_is_its_factor_and_nothing_else() -> None:
    (batch,) = helpers.fixed_batches(1)
    one, three, none = (helpers.losses_of(build("KgCoOp", W=w), batch) for w in (1.0, 3.0, 0.0))
    assert 0 < one["kg"].item() < 2
    assert three["kg"].item() == pytest.approx(3 * one["kg"].item(), rel=1e-6) and none["kg"].item() == 0
    assert one["ce"].equal(three["ce"]) and one["ce"].equal(none["ce"])


def test_kgcoop_starts_at_no_distance_from_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry(mh.ENTRY.reader, mh.WORDS + " {}."))
    losses = helpers.losses_of(build("KgCoOp", as_started=True), helpers.fixed_batches(1)[0])
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


def prograd_step(trainer: Trainer, conflict: bool) -> tuple[lm.Batch, Tensor, Tensor, Tensor]:
    """A batch whose gradients disagree (or do not), and those of all losses but kl, of ce alone, and of kl."""
    for batch in helpers.fixed_batches(20):
        losses, _ = trainer.losses(batch)
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
        together = helpers.logits_of(trainer, batch)
        alone = torch.cat([helpers.logits_of(trainer, {"img": image[None]}) for image in batch["img"]])
    assert difference(together, alone) < 1e-5


def test_cocoop_of_32_images_is_the_mean_of_two_of_16() -> None:
    trainer, (batch,) = build("CoCoOp", plpp=True), helpers.fixed_batches(1, size=32)
    halves = [with_gradients(trainer, {key: t[part] for key, t in batch.items()}) for part in (slice(16), slice(16, None))]
    mean_values = {key: sum(values[key] for values, _ in halves) / 2 for key in halves[0][0] if key != "perplexity"}
    mean_grads = {key: sum(grads[key] for _, grads in halves) / 2 for key in halves[0][1]}
    assert halves[0][0]["ppl"] != pytest.approx(halves[1][0]["ppl"], rel=1e-4)  # other images
    assert_same_step(with_gradients(trainer, batch), (mean_values, mean_grads))


def test_cocoop_in_parts_of_the_classes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[int]] = []  # for each text pass the rows of its parts
    original = TextTower.forward

    def forward(self, tree, context, *args, **kwargs):
        ran.append([part.token.numel() for part in tree.parts])
        return original(self, tree, context, *args, **kwargs)

    monkeypatch.setattr(TextTower, "forward", forward)
    (batch,) = helpers.fixed_batches(1, size=5)
    whole, parted = build("CoCoOp", plpp=True), build("CoCoOp", "MODEL.TEXT_MEMORY_MIB", 1, plpp=True)
    assert_same_step(with_gradients(parted, batch), with_gradients(whole, batch))
    parts, all_at_once = ran
    tower = parted.method.clip.text
    assert len(all_at_once) == 1 < len(parts) and max(parts) <= tower.max_rows(5) < tower.max_rows(1)
    assert max(parts) < max(all_at_once)


def test_cocoop_tests_as_many_images_at_once_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = helpers.fixed_batches(1, size=5)
    sizes: list[int] = []
    original = CoCoOp.encode_classes
    monkeypatch.setattr(CoCoOp, "encode_classes", lambda self, f: sizes.append(len(f)) or original(self, f))
    a_class = 4 * mh.EMBED  # bytes of one class's features
    trainer = build("CoCoOp")
    with torch.no_grad():
        whole = helpers.logits_of(trainer, batch)
        assert sizes == [5]
        for images, want in ((2, [2, 2, 1]), (1, [1] * 5), (0.1, [1] * 5)):
            sizes.clear()
            trainer.method.clip.text.memory_mib = 8 * images * a_class * len(NAMES) / 2**20 * 1.01
            assert difference(helpers.logits_of(trainer, batch), whole) < 1e-5
            assert sizes == want


# ---- PLPP where prompts are deep ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "deeper"), [("CoOp", 0), ("MaPLe", 2), ("IVLP", 2), ("PromptSRC", 2)])
def test_what_each_term_of_plpp_reaches(name: str, deeper: int) -> None:
    """Deep prompts stand in the context's place from layer 1 on: the last of them predict the words of layer 0."""
    trainer, (batch,) = build(name, plpp=True), helpers.fixed_batches(1)
    losses, _ = trainer.losses(batch)
    terms = {term: losses[term] for term in ("ppl", "inverse_ppl")}
    parameters = leaves(trainer)
    deep = [n for n in parameters if "compound_prompts_text" in n or n.startswith("text_encoder.")]
    assert len(deep) == deeper
    (context,) = (n for n in parameters if n.endswith("ctx"))
    (*_, deepest) = [context, *deep]
    reached = {
        term: {n for n, g in zip(parameters, gradient(loss, parameters), strict=True) if g.any()}
        for term, loss in terms.items()
    }
    assert reached == {"ppl": {deepest}, "inverse_ppl": {context}}  # of anything else exactly 0
    assert (deepest == context) == (deeper == 0)


# ---- zero-shot CLIP ------------------------------------------------------------------------------------------------------


def zeroshot(cls: type[Method], dataset: str) -> tuple[Trainer, Tensor, Tensor]:
    """A trainer, images, and its logits."""
    cfg = helpers.make_cfg("DATASET.NAME", dataset, "USE_CUDA", False)
    trainer = Trainer(cls, cfg, data=mh.no_images(NAMES), clip_model=mh.clip_of(), log=helpers.RunLog(quiet=True))
    images = helpers.fixed_batches(1)[0]["img"]
    with torch.no_grad():
        return trainer, images, helpers.logits_of(trainer, {"img": images})


@pytest.mark.parametrize(("dataset", "template"), [("tiny", mh.TEMPLATE), ("nobody knows it", "a photo of a {}.")])
def test_zeroshot_has_the_data_sets_template_or_the_fallback(dataset: str, template: str) -> None:
    trainer, images, logits = zeroshot(ZeroshotCLIP, dataset)
    assert difference(logits, lm.zeroshot(mh.exact_clip(), NAMES, images, [template])) < 1e-5
    assert trainer.parameters == [] and not trainer.method.learns and not trainer.method.saved.state_dict()


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
        assert trainer.method.templates == want
        assert difference(logits, lm.zeroshot(mh.exact_clip(), NAMES, images, want)) < 1e-5
        assert logits.equal(built[0][2])
    assert templates.SEVEN == before and len(before) == 7
