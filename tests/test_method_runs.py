"""Whole runs of each method: other classes, resume, upstream's checkpoints, every precision on either kind of backbone."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from plpp_reg.data import DATASETS
from plpp_reg.data.loaders import build_loader
from plpp_reg.engine import checkpoint
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.trainers.ivlp import IVLP

from helpers import engine as helpers
from helpers import methods as mh
from helpers.methods import CASES, METHODS, NAMES, WITH_TEXT, build, difference, leaves

BASE, NEW = NAMES[:3], NAMES[3:]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", mh.ENTRY)


@pytest.fixture
def arguments(images: Path, tmp_path: Path):
    """RunArguments of a short run of a case: 2 epochs of 2 batches on the base classes."""

    def make(case: str, out: str, plpp: bool = False, opts: tuple = (), **more) -> RunArguments:
        options = {CASES[case].node(key): value for key, value in CASES[case].options.items()}
        options |= {"USE_CUDA": False, CASES[case].node("PREC"): "fp32", "DATASET.SUBSAMPLE_CLASSES": "base"}
        options |= mh.PLPP if plpp else {}
        pairs = [str(x) for item in options.items() for x in item]
        return RunArguments(
            trainer=CASES[case].cls.__name__,
            root=str(images),
            output_dir=str(tmp_path / out),
            config_file=str(helpers.write_recipe(tmp_path / "recipe.yaml", DATALOADER__TRAIN_X__BATCH_SIZE=7)),
            opts=(*pairs, *map(str, opts)),
            **more,
        )

    return make


def quietly(arguments: RunArguments) -> tuple[dict, Trainer]:
    return run(arguments, RunLog(quiet=True), clip_model=mh.clip_of())


def content(folder: str | Path, case: str, epoch: int = 2) -> dict:
    model = CASES[case].cls.model_name
    return torch.load(Path(folder) / model / f"model.pth.tar-{epoch}", weights_only=True)


# ---- train, save, load on other classes, evaluate ------------------------------------------------------------------------


@pytest.mark.parametrize("case", METHODS)
def test_what_was_trained_on_base_classes_evaluates_on_new_ones(case: str, arguments) -> None:
    trained, _ = quietly(arguments(case, "base", plpp=case in WITH_TEXT))
    saved = content(arguments(case, "base").output_dir, case)
    assert saved["plpp_reg"]["classnames"] == BASE
    assert set(trained["losses"]) == {"loss", *CASES[case].losses, *(("ppl", "inverse_ppl") if case in WITH_TEXT else ())}
    # The file is the host method's own: the plain method loads it.
    more = {"eval_only": True, "model_dir": arguments(case, "base").output_dir}
    result, trainer = quietly(arguments(case, "new", opts=("DATASET.SUBSAMPLE_CLASSES", "new"), **more))
    assert trainer.data.classnames == NEW and trainer.cfg.TRAINER.NAME == case
    assert all(p.equal(saved["state_dict"][key]) for key, p in leaves(trainer).items())
    batches = list(build_loader(trainer.cfg, trainer.data.test, train=False))
    test = {key: torch.cat([batch[key] for batch in batches]) for key in ("img", "label")}
    want = CASES[case].reference(mh.exact_clip(), NEW, mh.exact(leaves(trainer)), mh.exact_batch(test)).logits
    with torch.no_grad():
        assert difference(helpers.logits_of(trainer, test), want) < 1e-5
    assert result["metrics"]["accuracy"] == pytest.approx(100 * (want.argmax(1) == test["label"]).double().mean().item())
    assert json.loads((Path(arguments(case, "new").output_dir) / "result.json").read_text())["metrics"] == result["metrics"]


# ---- resume --------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@pytest.mark.parametrize("case", ["CoCoOp", "MaPLe", "PromptSRC"])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(case: str, arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs, opts = 3, ("OPTIM.MAX_EPOCH", 3)

    def make(out: str) -> RunArguments:
        return arguments(case, out, plpp=True, opts=opts)

    whole, _ = quietly(make("whole"))
    steps = [5]  # two of them an epoch: the first of the third
    original = Trainer.step

    def step(self, *args, **options):
        steps[0] -= 1
        if not steps[0]:
            raise Killed
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Killed):
            quietly(make("cut"))
    so_far = content(make("cut").output_dir, case)
    torch.manual_seed(999), random.seed(999), np.random.seed(999)  # a new process's streams hold something else
    resumed, _ = quietly(make("cut"))
    ends = [content(make(out).output_dir, case, epochs) for out in ("whole", "cut")]
    for end in ends:
        end["plpp_reg"].pop("seconds")
    helpers.assert_same(*ends)
    assert resumed["metrics"] == whole["metrics"] and resumed["losses"] == whole["losses"]
    if case == "PromptSRC":  # the average of two epochs was in the file, and is what the run ended with
        half, full = (c["plpp_reg"]["method"]["average"] for c in (so_far, ends[1]))
        assert half.keys() == full.keys() == ends[1]["state_dict"].keys()
        for key, value in full.items():
            assert half[key].any() and not half[key].equal(value) and value.equal(ends[1]["state_dict"][key])


def test_an_average_that_is_missing_or_misnamed_is_refused_at_resume(arguments) -> None:
    folder = Path(arguments("PromptSRC", "out").output_dir)
    quietly(arguments("PromptSRC", "out", opts=("TEST.NO_TEST", True)))
    path = folder / IVLP.model_name / "model.pth.tar-2"
    good = torch.load(path, weights_only=True)
    average = good["plpp_reg"]["method"]["average"]
    for bad in ({}, {"average": {}}, {"average": {key + "x": value for key, value in average.items()}}):
        torch.save({**good, "plpp_reg": {**good["plpp_reg"], "method": bad}}, path)
        with pytest.raises(InputError, match="expected the whole state of this run"):
            quietly(arguments("PromptSRC", "out", opts=("TEST.NO_TEST", True)))


# ---- upstream's checkpoints ----------------------------------------------------------------------------------------------


def frozen_clip() -> dict[str, Tensor]:
    """The parts of CLIP that upstream's CustomCLIP holds, by its names, in half precision."""
    state = mh.clip_of().state_dict()
    named = {f"image_encoder.{key.removeprefix('visual.')}": t for key, t in state.items() if key.startswith("visual.")}
    text = ("transformer.", "ln_final.", "positional_embedding", "text_projection")
    named |= {f"text_encoder.{key}": t for key, t in state.items() if key.startswith(text)}
    return {key: t.half() for key, t in named.items()} | {"logit_scale": state["logit_scale"]}


def linear(name: str, out: int, inside: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


D, VISION, EMBED, CLASSES = mh.TEXT_WIDTH, mh.VISION_WIDTH, mh.EMBED, len(NAMES)


def tokens(n_ctx: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The fixed token vectors of the classes that it was trained on; not as many as here."""
    return {f"{prefix}token_prefix": (CLASSES + 2, 1, D), f"{prefix}token_suffix": (CLASSES + 2, 76 - n_ctx, D)}


def layers(name: str, last: int, count: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.transformer.resblocks.{i}.VPT_shallow": (count, width) for i in range(1, last)}


# What each method's own code saves beside the frozen CLIP: names and shapes as its modules make them, the learned ones first.
UPSTREAM: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "CoOp": ({"ctx": (3, D)}, tokens(3)),
    "KgCoOp": ({"ctx": (4, D)}, {**tokens(4), "bias_vectors": (1, 512), **linear("meta_net.linear1", 512, 512)}),
    "ProGrad": ({"ctx": (3, D)}, tokens(3)),
    "CoCoOp": (
        {"ctx": (4, D), **linear("meta_net.linear1", EMBED // 16, EMBED), **linear("meta_net.linear2", D, EMBED // 16)},
        tokens(4),
    ),
    "MaPLe": (
        {
            "prompt_learner.ctx": (2, D),
            **linear("prompt_learner.proj", VISION, D),
            **{f"prompt_learner.compound_prompts_text.{i}": (2, D) for i in (0, 1)},
            **linear("prompt_learner.compound_prompt_projections.0", VISION, D),
            **linear("prompt_learner.compound_prompt_projections.1", VISION, D),
        },
        tokens(2, "prompt_learner."),
    ),
    "IVLP": (
        {
            "prompt_learner.ctx": (3, D),
            "image_encoder.VPT": (4, VISION),
            **layers("image_encoder", 2, 4, VISION),
            **layers("text_encoder", 3, 3, D),
        },
        tokens(3, "prompt_learner."),
    ),
    "VPT": ({"image_encoder.VPT": (4, VISION), **layers("image_encoder", 3, 4, VISION)}, {}),
    "PromptSRC": (
        {
            "prompt_learner.ctx": (4, D),
            "image_encoder.VPT": (3, VISION),
            **layers("image_encoder", 2, 3, VISION),
            **layers("text_encoder", 3, 4, D),
        },
        tokens(4, "prompt_learner."),
    ),
}
WHOLE_CLIP = ("MaPLe", "IVLP", "VPT", "PromptSRC")  # their code registers the whole model
FOLDERS = {"MaPLe": "MultiModalPromptLearner", "IVLP": "VLPromptLearner", "PromptSRC": "VLPromptLearner"}


def upstream_state(case: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    learned, fixed = UPSTREAM[case]
    state = {key: torch.randn(shape, generator=generator).mul(0.3).half() for key, shape in {**learned, **fixed}.items()}
    if case in WHOLE_CLIP:
        state |= frozen_clip()
    if case == "PromptSRC":
        images = {key: t for key, t in frozen_clip().items() if key.startswith("image_encoder.")}
        state |= {f"prompt_learner.ZS_{key}": t for key, t in images.items()}
    return state


def save_upstream(state: dict[str, Tensor], folder: Path, case: str) -> Path:
    """As Dassl's save_model names and fills it."""
    path = folder / FOLDERS.get(case, "prompt_learner") / "model.pth.tar-5"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "epoch": 5, "optimizer": None, "scheduler": None, "val_result": None}, path)
    return path


@pytest.mark.parametrize("case", METHODS)
def test_an_upstream_checkpoint_is_found_and_loaded(case: str, tmp_path: Path) -> None:
    state, trainer = upstream_state(case), build(case)
    save_upstream(state, tmp_path, case)
    trainer.saving.load_model(tmp_path, 5)
    assert set(leaves(trainer)) == set(UPSTREAM[case][0])
    for key, p in leaves(trainer).items():
        assert p.dtype == torch.float32 and p.equal(state[key].float()), key
    # and it is what the method computes with from here on
    (batch,) = helpers.fixed_batches(1, size=2)
    want = CASES[case].reference(mh.exact_clip(), NAMES, mh.exact(leaves(trainer)), mh.exact_batch(batch)).logits
    with torch.no_grad():
        assert difference(helpers.logits_of(trainer, batch), want) < 1e-5


@pytest.mark.parametrize("case", METHODS)
def test_our_names_are_upstreams(case: str) -> None:
    # so that ours load there with strict=False, which its code uses: what is learned is there, and nothing unknown
    ours, theirs = build(case).method.saved.state_dict(), upstream_state(case)
    assert set(ours) == set(UPSTREAM[case][0]) <= set(theirs)
    assert {key: t.shape for key, t in ours.items()} == {key: theirs[key].shape for key in ours}


@pytest.mark.parametrize("case", METHODS)
def test_a_missing_or_misnamed_or_misshapen_tensor_is_refused(case: str, tmp_path: Path) -> None:
    trainer, good = build(case), upstream_state(case)
    before = {key: p.detach().clone() for key, p in leaves(trainer).items()}
    for key in UPSTREAM[case][0]:
        without = {k: t for k, t in good.items() if k != key}
        head, _, leaf = key.rpartition(".")
        misnamed = f"{head}.my_{leaf}".lstrip(".")
        for bad in (without, {**without, misnamed: good[key]}, {**good, key: good[key][..., :-1]}):
            path = save_upstream(bad, tmp_path, case)
            with pytest.raises(InputError, match=r"^checkpoint .*: expected ") as raised:
                trainer.saving.load_weights(path)
            assert key in str(raised.value) and "\n" not in str(raised.value)
    path = save_upstream({**good, "prompt_learner.surplus": torch.zeros(3)}, tmp_path, case)
    with pytest.raises(InputError, match="surplus"):
        trainer.saving.load_weights(path)
    assert all(p.equal(before[key]) for key, p in leaves(trainer).items())  # nothing is half loaded


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("IVLP", layers("image_encoder", 3, 4, VISION)),
        ("IVLP", layers("text_encoder", 4, 3, D)),
        ("VPT", layers("image_encoder", 4, 4, VISION)),
        ("PromptSRC", layers("image_encoder", 5, 3, VISION)),
        ("PromptSRC", layers("text_encoder", 4, 4, D)),
        ("MaPLe", {"prompt_learner.compound_prompts_text.2": (2, D)}),
    ],
)
def test_prompts_of_more_layers_than_the_configuration_has_are_refused(case: str, more: dict, tmp_path: Path) -> None:
    # Trained with 9 layers of prompts, evaluated with 3: another model, and no error anywhere else would say so.
    state = {**{key: torch.zeros(shape) for key, shape in more.items()}, **upstream_state(case)}
    with pytest.raises(InputError, match=r"checkpoint .*: expected \["):
        build(case).saving.load_weights(save_upstream(state, tmp_path, case))


@functools.cache
def learner_of(case: str) -> Trainer:
    return build(case)


@pytest.mark.parametrize("theirs", METHODS)
@pytest.mark.parametrize("ours", METHODS)
def test_another_methods_checkpoint_is_refused_unless_it_holds_the_same(ours: str, theirs: str) -> None:
    trainer, state = learner_of(ours), upstream_state(theirs)
    load = functools.partial(checkpoint.load_weights, trainer.method.saved, state, "theirs", trainer.method.not_loaded)
    if UPSTREAM[ours][0] == UPSTREAM[theirs][0]:  # CoOp's and ProGrad's: one context vector is like another
        assert not load() and {ours, theirs} in ({ours}, {"CoOp", "ProGrad"})
    else:
        with pytest.raises(InputError, match=r"^checkpoint 'theirs': expected "):
            load()
