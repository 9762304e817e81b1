"""What a method says of itself, and that the trainer takes it at its word: settings, inputs, context sets, encoders, export."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

import plpp_reg.engine.trainer
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.data import DataSplit
from plpp_reg.engine.frozen import FrozenEncoder, normalize
from plpp_reg.engine.method import UNDECLARED, Classes, ContextSet, Inputs, Method, Settings, setting
from plpp_reg.engine.plpp import measured
from plpp_reg.engine.registry import method_defaults
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.trainers import TRAINERS
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.ivlp import IVLP

from helpers import engine as helpers
from helpers.engine import Doubled

ROOT = Path(__file__).parents[1]
PLPP = ("TRAINER.PLPP.ENABLED", True, "TRAINER.PLPP.WEIGHT", 0.3, "TRAINER.PLPP.INVERSE_WEIGHT", 0.7)
KEPT = ("FEATURES.MAX_GIB", 1.0)


def example(name: str) -> dict[str, object]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplit:
    return helpers.read_tiny(helpers.make_images(tmp_path_factory.mktemp("images")))


# ---- settings ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranges(Settings, node="R"):
    count: int = setting(2, least=1, most=3)
    share: float = setting(0.5, above=0)
    word: str = setting("end", choices=("end", "front"))
    flag: bool = setting(True)
    foreign: float = setting(1.0, least=0, key="LOSS.T")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, r"^TRAINER\.R\.COUNT: expected an integer >= 1 and <= 3, got 0$"),
        ({"count": 4}, r"^TRAINER\.R\.COUNT: expected an integer >= 1 and <= 3, got 4$"),
        ({"count": 1.0}, r"^TRAINER\.R\.COUNT: expected an integer, got 1\.0$"),
        ({"count": True}, r"^TRAINER\.R\.COUNT: expected an integer, got True$"),
        ({"share": 0.0}, r"^TRAINER\.R\.SHARE: expected a number > 0, got 0\.0$"),
        ({"share": float("nan")}, r"^TRAINER\.R\.SHARE: expected a number > 0, got nan$"),
        ({"share": "1"}, r"^TRAINER\.R\.SHARE: expected a number, got '1'$"),
        ({"word": "fron"}, r"TRAINER\.R\.WORD 'fron': did you mean 'front'\?"),
        ({"flag": 1}, r"^TRAINER\.R\.FLAG: expected True or False, got 1$"),
        ({"foreign": -1.0}, r"^LOSS\.T: expected a number >= 0, got -1\.0$"),
        ({"prec": "fp23"}, r"TRAINER\.R\.PREC 'fp23': did you mean 'fp32'\?"),
    ],
)
def test_a_value_out_of_its_range_is_refused_wherever_it_comes_from(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ranges(**values)


def test_the_edges_of_a_range_are_values() -> None:
    assert [Ranges(count=n).count for n in (1, 3)] == [1, 3]
    assert Ranges(share=1).share == 1 and Ranges(foreign=0).foreign == 0  # an integer is a number


def test_the_configuration_is_derived_from_the_settings_and_read_back() -> None:
    defaults = method_defaults()
    assert defaults["TRAINER.COOP.N_CTX"] == 16 and defaults["TRAINER.COOP.W"] == 8.0 and defaults["LOSS.T"] == 1.0
    cfg = helpers.make_cfg("TRAINER.COOP.N_CTX", 5, "LOSS.LAMBDA", 0.25)
    assert CoOp.Config.read(cfg) == CoOp.Config(n_ctx=5, prec="fp32")
    for place in TRAINERS.values():
        module, _, name = place.partition(":")
        config = getattr(importlib.import_module(module), name).Config
        assert config.defaults() == {key: defaults[key] for key in config.defaults()}  # those that share a node agree


@pytest.mark.parametrize(
    ("trainer", "key", "value"),
    [("KgCoOp", "TRAINER.COOP.W", -1), ("ProGrad", "LOSS.T", 0), ("IVLP", "TRAINER.IVLP.N_CTX_VISION", -1)],
)
def test_a_run_is_refused_before_anything_is_loaded(trainer: str, key: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{key}: expected"):
        resolve(RunArguments(trainer=trainer, opts=(key, str(value))))


# ---- the trainer knows no method --------------------------------------------------------------------------------------


def test_the_trainer_names_no_method_and_asks_for_no_class() -> None:
    source = inspect.getsource(plpp_reg.engine.trainer)
    assert not [name for name in TRAINERS if name in source] and "isinstance" not in source and "hasattr" not in source


def test_the_files_of_methods_are_thin() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "trainers").glob("*.py")}
    assert len(lines) > 9 and max(lines.values()) <= 90, lines


# ---- published values at the edge ------------------------------------------------------------------------------------

LANGUAGE_ONLY = """
INPUT: {SIZE: "(32, 32)", INTERPOLATION: bicubic, TRANSFORMS: [random_resized_crop, random_flip, normalize]}
OPTIM: {NAME: sgd, LR: 0.0025, MAX_EPOCH: 2, LR_SCHEDULER: cosine, WARMUP_EPOCH: 1, WARMUP_TYPE: constant}
TRAINER:
  IVLP: {N_CTX_VISION: 0, N_CTX_TEXT: 4, CTX_INIT: "a photo of a", PREC: fp16, PROMPT_DEPTH_VISION: 0, PROMPT_DEPTH_TEXT: 2}
"""


def test_language_prompts_alone_leave_the_image_tower_frozen(data: DataSplit, tmp_path: Path) -> None:
    """As upstream's IVLP/vit_b16_c2_ep5_batch4_4ctx_language_only.yaml has it, of depth 2 instead of 12."""
    (tmp_path / "language_only.yaml").write_text(LANGUAGE_ONLY)
    cfg, cls = resolve(RunArguments(trainer="IVLP", config_file=str(tmp_path / "language_only.yaml"), backbone="tiny"))
    trainer = Trainer(cls, cfg, data=data, clip_model=helpers.tiny_clip(), log=helpers.RunLog(quiet=True))
    assert set(trainer.method.saved.state_dict()) == {
        "prompt_learner.ctx",
        "text_encoder.transformer.resblocks.1.VPT_shallow",
    }
    assert next(iter(trainer.batches("train"))).keys() == {"label", "index", "features"}  # nothing of a picture is needed
    trainer.train()
    assert trainer.state.epoch == 2 and all(p.grad.any() for p in trainer.parameters)


# ---- context sets ----------------------------------------------------------------------------------------------------


class Two(Method):
    """Two context sets of different lengths."""

    learns_text_context = True
    weights: tuple[float | None, float | None] = (None, None)

    def build(self) -> None:
        self.a = PromptLearner(self.clip.model, self.classnames, n_ctx=2)
        self.b = PromptLearner(self.clip.model, self.classnames, n_ctx=3)

    def encode_classes(self, image_features=None, with_states=False) -> Classes:
        a, b = (self.encode(learner, with_states=with_states) for learner in (self.a, self.b))
        sets = [c._replace(weight=w) for c, w in zip((*a.contexts, *b.contexts), self.weights, strict=False)]
        return Classes(normalize(a.features + b.features), tuple(sets))


@pytest.mark.parametrize(("weights", "factors"), [((None, None), (0.5, 0.5)), ((0.25, 2.0), (0.25, 2.0))])
def test_plpp_reads_every_context_set(data: DataSplit, monkeypatch, weights, factors) -> None:
    monkeypatch.setattr(Two, "weights", weights)
    trainer, batch = helpers.make_trainer(data, *PLPP, cls=Two), helpers.fixed_batches(1)[0]
    losses, logs = trainer.losses(batch, with_perplexity=True)
    assert set(losses) == {"ce", "ppl_1", "inverse_ppl_1", "ppl_2", "inverse_ppl_2"}
    for i, (learner, factor) in enumerate(zip((trainer.method.a, trainer.method.b), factors, strict=True), 1):
        parts = trainer.regularizer.components(learner.ctx, learner(trainer.method.clip.text).hidden)
        torch.testing.assert_close(losses[f"ppl_{i}"], factor * 0.3 * parts.perplexity_loss)
        torch.testing.assert_close(losses[f"inverse_ppl_{i}"], factor * 0.7 * parts.inverse_loss)
        torch.testing.assert_close(logs[f"perplexity_{i}"], parts.perplexity.log())
        # each set's vectors move by their own terms alone
        others = [losses[f"{term}_{3 - i}"] for term in ("ppl", "inverse_ppl")]
        assert torch.autograd.grad(losses[f"ppl_{i}"], learner.ctx, retain_graph=True)[0].any()
        assert torch.autograd.grad(sum(others), learner.ctx, retain_graph=True, allow_unused=True)[0] is None


def test_two_sets_that_are_the_same_are_one(data: DataSplit) -> None:
    """Half of each of two equal terms is the term."""
    trainer = helpers.make_trainer(data, *PLPP)
    classes = trainer.method.encode_classes(with_states=True)
    one, _ = trainer.plpp(classes.contexts, True)
    two, _ = trainer.plpp(classes.contexts * 2, True)
    for term in ("ppl", "inverse_ppl"):
        torch.testing.assert_close(two[f"{term}_1"] + two[f"{term}_2"], one[term])
    alone, both = (measured(trainer.regularizer, classes.contexts * n) for n in (1, 2))
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b)


def test_a_set_alone_may_weigh_less(data: DataSplit) -> None:
    trainer = helpers.make_trainer(data, *PLPP)
    (whole,) = trainer.method.encode_classes(with_states=True).contexts
    terms, quarter = (trainer.plpp([c], True).losses for c in (whole, whole._replace(weight=0.25)))
    assert quarter == {name: 0.25 * term for name, term in terms.items()}


def test_a_method_that_shows_no_context_is_told_so(data: DataSplit) -> None:
    class Hides(CoOp):
        def encode_classes(self, image_features=None, with_states=False) -> Classes:
            return Classes(super().encode_classes().features)

    with pytest.raises(InputError, match="expected context vectors and their states"):
        helpers.make_trainer(data, *PLPP, cls=Hides).step(helpers.fixed_batches(1)[0])


def test_states_are_computed_where_plpp_reads_them_alone(data: DataSplit) -> None:
    assert helpers.make_trainer(data).method.encode_classes().contexts == ()
    asked: list[bool] = []

    class Watches(CoOp):
        def encode_classes(self, image_features=None, with_states=False) -> Classes:
            asked.append(with_states)
            return super().encode_classes(image_features, with_states)

    for options in ((), (*PLPP, "TRAINER.PLPP.WEIGHT", 0.0, "TRAINER.PLPP.INVERSE_WEIGHT", 0.0), PLPP):
        helpers.make_trainer(data, *options, cls=Watches).step(helpers.fixed_batches(1)[0])
    assert asked == [False, False, True]


# ---- frozen encoders -------------------------------------------------------------------------------------------------


class SeesDoubled(CoOp):
    not_exported = "class_features: they belong with other image features"

    def build(self) -> None:
        super().build()
        self.frozen = Doubled(self.clip.image)


def test_a_subclass_that_overrides_the_encoder_is_never_served_anothers(data: DataSplit) -> None:
    """Even where its key says no more than the base class's: the class and its file are in what is kept."""
    plain, other = (
        helpers.make_trainer(data, *KEPT, cls=cls)
        for cls in (
            CoOp,
            SeesDoubled,
        )[:2]
    )
    first = plain.frozen_features["features"].of("test")
    second = other.frozen_features["features"].of("test")
    assert not torch.equal(first, second)
    batch = next(iter(other.batches("test")))
    images = torch.stack([helpers_image(other, i) for i in batch["index"].tolist()])
    torch.testing.assert_close(batch["features"], other.method.frozen.encode(images), rtol=0, atol=1e-6)
    again = helpers.make_trainer(data, *KEPT, cls=SeesDoubled).frozen_features["features"].of("test")
    assert torch.equal(again, second)


def helpers_image(trainer: Trainer, index: int) -> torch.Tensor:
    from plpp_reg.data.augmentation import build_transform
    from plpp_reg.data.loaders import ImageDataset

    return ImageDataset(trainer.data.test, build_transform(trainer.cfg, False), 1)[0, index]["img"]


def test_an_encoder_without_a_key_of_its_own_is_no_class() -> None:
    with pytest.raises(TypeError, match="Silent: expected a key beside its encode"):

        class Silent(FrozenEncoder):
            def encode(self, images: torch.Tensor) -> torch.Tensor:
                return images


def test_an_encoder_that_is_replaced_on_the_object_is_refused(data: DataSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = helpers.make_trainer(data, *KEPT)
    monkeypatch.setattr(trainer.method.frozen, "encode", lambda images: torch.zeros(len(images), 32))
    with pytest.raises(InputError, match="expected a subclass with its own encode and key"):
        trainer.frozen_features["features"].of("test")


def test_features_of_several_encoders_stand_in_a_batch_by_their_names(data: DataSplit) -> None:
    class Several(CoOp):
        @property
        def inputs(self) -> Inputs:
            return Inputs(features={"features": self.frozen}, training_features={"doubled": Doubled(self.clip.image)})

    trainer = helpers.make_trainer(data, cls=Several)
    assert next(iter(trainer.batches("train"))).keys() == {"label", "index", "features", "doubled"}
    assert next(iter(trainer.batches("test"))).keys() == {"label", "index", "features"}


# ---- what is declared ------------------------------------------------------------------------------------------------


def test_other_logits_are_not_exported_unless_it_is_said_again() -> None:
    class Sharper(CoOp):
        def logits(self, batch, classes):
            return 2 * super().logits(batch, classes)

    class Same(CoOp):
        def losses(self, batch, classes):
            return super().losses(batch, classes)

    class Said(CoOp):
        not_exported = ""

        def logits(self, batch, classes):
            return super().logits(batch, classes)

    assert (CoOp.not_exported, Same.not_exported, Said.not_exported) == ("", "", "")
    assert Sharper.not_exported == Method.not_exported == UNDECLARED


def test_gradients_come_apart_where_a_method_says_so(data: DataSplit) -> None:
    seen = {}

    class Apart(CoOp):
        apart = ("second",)

        def losses(self, batch, classes):
            ce = super().losses(batch, classes)["ce"]
            return {"ce": ce, "second": 3 * ce}

        def gradients(self, rest, apart):
            seen.update(rest=rest[0].clone(), apart=apart["second"][0].clone())
            return [-g for g in rest]

    trainer, plain = (helpers.make_trainer(data, cls=cls) for cls in (Apart, CoOp))
    batch = helpers.fixed_batches(1)[0]
    values = trainer.step(batch)
    plain.step(batch)
    want = plain.method.prompt_learner.ctx.grad
    torch.testing.assert_close(seen["rest"], want)
    torch.testing.assert_close(seen["apart"], 3 * want)
    torch.testing.assert_close(trainer.method.prompt_learner.ctx.grad, -want)
    assert values["loss"] == pytest.approx(4 * values["ce"])


def test_a_method_may_split_the_images_otherwise(data: DataSplit) -> None:
    class Few(CoOp):
        def split(self, data: DataSplit) -> DataSplit:
            return dataclasses.replace(data, train=data.train[:7])

    trainer = helpers.make_trainer(data, cls=Few)
    assert len(trainer.data.train) == 7 and len(trainer.loader("train")) == 1 and len(trainer.data.test) == len(data.test)


def test_parameters_are_what_is_trained(data: DataSplit) -> None:
    for cls in (CoOp, IVLP):
        options = ("TRAINER.IVLP.PROMPT_DEPTH_VISION", 1, "TRAINER.IVLP.PROMPT_DEPTH_TEXT", 2, "TRAINER.IVLP.PREC", "fp32")
        trainer = helpers.make_trainer(data, *options, cls=cls)
        assert trainer.parameters and set(trainer.parameters) == set(trainer.method.parameters())
        assert not set(trainer.parameters) & set(trainer.clip_model.parameters())


# ---- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls", "most"), [("own_method", "Smooth", 50), ("two_contexts", "Contrast", 70)])
def test_an_example_trains_and_plpp_acts_on_it(data: DataSplit, name: str, cls: str, most: int) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < most
    method = example(name)[cls]
    cfg = helpers.config.get_cfg_default(method)
    for key, value in helpers.config.flat(helpers.make_cfg(*PLPP)).items():
        helpers.config.set_value(cfg, key, value)
    cfg.OPTIM.MAX_EPOCH = 6
    trainer = Trainer(method, cfg, data=data, clip_model=helpers.tiny_clip(), log=helpers.RunLog(quiet=True))
    before = trainer.measure_prompts()
    trainer.train()
    first, last = trainer.state.history[0], trainer.state.history[-1]
    names = ["ppl"] if name == "own_method" else ["ppl_shows", "ppl_shows_not"]
    assert all(last[n] < first[n] for n in names) and trainer.measure_prompts().perplexity < before.perplexity
    assert last["loss"] < first["loss"] and trainer.test()["accuracy"] > 0


def test_a_context_set_is_a_name_for_its_parts() -> None:
    v, h = torch.zeros(2, 3), torch.zeros(1, 2, 3)
    assert ContextSet(v, h) == (v, h, None, "", 1.0)
