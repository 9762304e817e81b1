"""A teacher: any method of ours with its weights, read as it was left, loaded once, refused where it cannot teach."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plpp_reg.clip.vision import ImageTower
from plpp_reg.data import DataSplit
from plpp_reg.engine import teacher as module
from plpp_reg.engine.method import Classes
from plpp_reg.engine.teacher import Teacher
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.prompts.loading import load_run
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.ivlp import IVLP
from plpp_reg.trainers.maple import MaPLe
from plpp_reg.trainers.vpt import VPT
from plpp_reg.trainers.zeroshot import ZeroshotCLIP

from helpers import engine as helpers
from helpers.engine import quietly
from helpers.teaching import KEPT, STUDENT, ZERO_SHOT, arguments, pixels, student, teacher_of

pytestmark = pytest.mark.usefixtures("kept_apart")


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_zero_shot_teacher_on_the_students_backbone_says_what_the_method_says(taught_data: DataSplit) -> None:
    teacher = teacher_of(taught_data, *ZERO_SHOT)
    alone = helpers.make_trainer(taught_data, cls=ZeroshotCLIP).method
    images = alone.frozen.encode(pixels())
    torch.testing.assert_close(teacher.class_features, alone.encode_classes().features, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.logits(images), alone.logits({"features": images}, alone.encode_classes()))
    assert teacher.encoder.described() == alone.frozen.described()  # its features are those of every run on that backbone


@pytest.mark.parametrize("name", ["coop", "ivlp"])
def test_a_runs_teacher_says_what_the_run_predicts(taught: Path, taught_data: DataSplit, name: str) -> None:
    """After its weights: encoded before they were in, the class features would be those of its initial words."""
    teacher = teacher_of(taught_data, "TEACHER.RUN", str(taught / name))
    run = load_run(taught / name)
    with torch.no_grad():
        predicted = helpers.logits_of(run, {"img": pixels()})
    said = teacher.logits(teacher.encoder.encode(pixels()))
    torch.testing.assert_close(said, predicted, rtol=0, atol=1e-5)
    untrained = Trainer(type(run.method), run.cfg, data=taught_data, clip_model=run.clip_model).method.encode_classes().features
    assert (teacher.class_features - untrained).abs().max() > 1e-3
    assert teacher.identity["classnames"] == helpers.CLASSNAMES and not teacher.class_features.requires_grad


def test_a_teacher_of_another_class_list_speaks_of_the_students(taught: Path, taught_data: DataSplit) -> None:
    """Its prompts stand around whatever names the student has."""
    teacher = teacher_of(taught_data, "TEACHER.RUN", str(taught / "base"))
    assert teacher.identity["classnames"] == helpers.CLASSNAMES[:3]
    assert teacher.class_features.shape == (5, 32)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (IVLP, {"N_CTX_VISION": 3, "N_CTX_TEXT": 4, "PROMPT_DEPTH_VISION": 1, "PROMPT_DEPTH_TEXT": 2}),
        (IVLP, {"N_CTX_VISION": 0, "N_CTX_TEXT": 2, "PROMPT_DEPTH_VISION": 0, "PROMPT_DEPTH_TEXT": 1}),
        (MaPLe, {"N_CTX": 3, "PROMPT_DEPTH": 1}),
        (VPT, {"N_CTX_VISION": 3, "PROMPT_DEPTH_VISION": 1}),
        (CoOp, {"N_CTX": 5}),
        (CoOp, {"N_CTX": 2, "CSC": True}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_how_many_prompts_and_how_deep_is_read_off_the_file(
    taught_data: DataSplit, tmp_path: Path, cls: type, settings: dict[str, object]
) -> None:
    """As upstream's files are: the frozen CLIP and the fixed tokens beside what was learned, and no word of the settings."""
    opts = [part for key, value in settings.items() for part in (f"TRAINER.{cls.Config.node}.{key}", value)]
    method = helpers.make_trainer(taught_data, *opts, "SEED", 9, cls=cls).method
    state = dict(method.saved.state_dict())
    if cls.not_loaded:
        state["image_encoder.conv1.weight"] = torch.ones(1)
    state["token_prefix"] = torch.ones(1)
    torch.save({"state_dict": state, "epoch": 20}, file := tmp_path / "model-best.pth.tar")
    teacher = teacher_of(taught_data, "TEACHER.TRAINER", cls.__name__, "TEACHER.WEIGHTS", str(file))
    found = dict(zip(opts[::2], opts[1::2], strict=True))
    read = module.config.flat(teacher.named.cfg)
    assert {key: read[key] for key in found} == found
    torch.testing.assert_close(teacher.class_features, method.encode_classes().features, rtol=0, atol=1e-6)
    images = pixels()
    expected = method.image_features({"img": images})
    torch.testing.assert_close(teacher.encoder.encode(images), expected, rtol=0, atol=1e-6)
    assert teacher.identity["classnames"] is None  # the file does not say


def test_loading_a_teacher_leaves_the_random_streams(taught_data: DataSplit, taught: Path) -> None:
    teacher = teacher_of(taught_data, "TEACHER.RUN", str(taught / "ivlp"))
    before = torch.get_rng_state()
    _ = teacher.class_features
    assert torch.equal(torch.get_rng_state(), before)


def test_its_images_are_as_its_own_backbone_has_them(
    taught_data: DataSplit, tmp_path: Path, make_clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_clip(width=64, layers=1, image_resolution=48)
    large.pixel_mean, large.pixel_std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    monkeypatch.setattr(module, "load_clip", lambda name, *_: large)
    trainer = student(taught_data, *ZERO_SHOT, "TEACHER.BACKBONE", "ViT-B/16")
    ours, theirs = (trainer.frozen_features[name] for name in ("features", "teacher_features"))
    assert ours.cfg.INPUT.SIZE == (32, 32) and theirs.cfg.INPUT.SIZE == (48, 48)
    assert theirs.cfg.INPUT.PIXEL_MEAN == [0.5, 0.5, 0.5] and theirs.cfg.INPUT.PIXEL_STD == [0.25, 0.25, 0.25]
    image = theirs._images_of("train")[0, 0]["img"].unsqueeze(0)
    assert image.shape[-1] == 48
    torch.testing.assert_close(theirs.of("train")[:1], trainer.teacher.encoder.encode(image), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="INPUT.PIXEL_MEAN: expected"):
        _ = teacher_of(
            taught_data, *ZERO_SHOT, "TEACHER.BACKBONE", "ViT-B/16", "TEACHER.OPTS", ("INPUT.PIXEL_MEAN", "[0,0,0]")
        ).spoken


def test_a_resnet_teaches_too(taught_data: DataSplit, tiny_resnet: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_clip", lambda name, *_: tiny_resnet)
    teacher = teacher_of(taught_data, *ZERO_SHOT, "TEACHER.BACKBONE", "RN50")
    side = tiny_resnet.visual.input_resolution
    features = teacher.encoder.encode(torch.randn(3, 3, side, side))
    assert teacher.logits(features).shape == (3, 5) and teacher.spoken.input["SIZE"] == (side, side)


def test_crops_whose_place_depends_on_the_size_are_refused_with_a_teacher_of_another(
    taught: Path, tmp_path: Path, make_clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_clip(width=64, layers=1, image_resolution=48)
    monkeypatch.setattr(module, "load_clip", lambda name, *_: large)
    opts = (*ZERO_SHOT, "TEACHER.BACKBONE", "ViT-B/16", "INPUT.TRANSFORMS", "['random_crop', 'normalize']")
    with pytest.raises(InputError, match=r"expected no random_crop, .* a teacher that sees \(48, 48\)"):
        quietly(arguments(taught, tmp_path / "out", STUDENT, *opts))
    assert not (tmp_path / "out").exists()


# ---- what a student sees ---------------------------------------------------------------------------------------------


def test_a_batch_without_labels_has_none(taught_data: DataSplit) -> None:
    trainer = student(taught_data, *ZERO_SHOT)
    batch = next(iter(trainer.batches("train")))
    assert batch.keys() == {"index", "features", "teacher_features"}
    assert next(iter(trainer.batches("test"))).keys() == {"label", "index", "features"}
    norms = batch["teacher_features"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_labels_change_nothing_of_what_is_learned(taught_data: DataSplit) -> None:
    def learned(split: DataSplit) -> dict[str, Tensor]:
        trainer = student(split, *ZERO_SHOT)
        trainer.train()
        return dict(trainer.method.saved.state_dict())

    shuffled = [datum._replace(label=(datum.label + 1) % 5) for datum in taught_data.train]
    helpers.assert_same(learned(taught_data), learned(replace(taught_data, train=shuffled)))


@pytest.mark.parametrize("teacher", ["zero-shot", "other", "ivlp"])
def test_a_second_run_never_loads_the_teacher(
    taught: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class vectors and image features are in the store; both runs are the same to the bit."""
    named = {
        "zero-shot": ZERO_SHOT,
        "other": (*ZERO_SHOT, "TEACHER.BACKBONE", taught / "other.pt"),
        "ivlp": ("TEACHER.RUN", taught / "ivlp"),
    }[teacher]
    passes: list[int] = []
    forward = ImageTower.forward
    monkeypatch.setattr(ImageTower, "forward", lambda self, *args: passes.append(1) or forward(self, *args))
    one = quietly(arguments(taught, tmp_path / "one", STUDENT, *named, *KEPT))
    assert passes
    passes.clear()

    def loads(*_: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(module, "load_clip", loads)
    monkeypatch.setattr(Teacher, "_backbone", loads)
    two = quietly(arguments(taught, tmp_path / "two", STUDENT, *named, *KEPT))
    assert not passes  # nor was any image encoded
    assert one["metrics"] == two["metrics"] and one["history"] == two["history"] and one["teacher"] == two["teacher"]
    states = [torch.load(tmp_path / name / "prompt_learner/model.pth.tar-2", weights_only=True) for name in ("one", "two")]
    helpers.assert_same(*(state["state_dict"] for state in states))


def test_a_teacher_of_open_clips_is_known_by_the_file_that_it_has_downloaded(
    taught_data: DataSplit, tmp_path: Path, make_clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run never loads it; another file in its place is another teacher."""
    snapshot = tmp_path / "hub/models--laion--CLIP-ViT-B-16-laion2B-s34B-b88K/snapshots/c0ffee"
    (refs := snapshot.parent.parent / "refs").mkdir(parents=True)
    (refs / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded: list[str] = []

    def load(name: str, *_: object) -> torch.nn.Module:
        loaded.append(name)
        snapshot.mkdir(parents=True, exist_ok=True)  # as open_clip downloads it
        (snapshot / "open_clip_model.safetensors").write_bytes(b"weights")
        return make_clip(width=64, layers=1)

    def says() -> Tensor:
        backbone = "open_clip:ViT-B-16/laion2b_s34b_b88k"
        return teacher_of(taught_data, *ZERO_SHOT, "TEACHER.BACKBONE", backbone, *KEPT).class_features

    monkeypatch.setattr(module, "load_clip", load)
    first = says()
    assert len(loaded) == 1 and torch.equal(says(), first) and len(loaded) == 1
    (snapshot / "open_clip_model.safetensors").write_bytes(b"other weights")
    says()
    assert len(loaded) == 2


@pytest.mark.parametrize("changed", ["weights", "backbone", "names", "template"])
def test_what_changes_a_teacher_is_another_one(
    taught: Path, taught_data: DataSplit, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def features(names: list[str]) -> Tensor:
        return teacher_of(replace(taught_data, classnames=names), "TEACHER.RUN", str(run), *KEPT).class_features

    run = Path(shutil.copytree(taught / "coop", tmp_path / "run"))
    shutil.copy(taught / "other.pt", tmp_path / "backbone.pt")
    text = (run / "config.yaml").read_text().replace(str(taught / "other.pt"), str(tmp_path / "backbone.pt"))
    (run / "config.yaml").write_text(text)
    names = list(taught_data.classnames)
    before = features(names)
    assert torch.equal(features(names), before)
    if changed == "weights":
        content = torch.load(file := run / "prompt_learner/model.pth.tar-2", weights_only=True)
        content["state_dict"]["ctx"] += 0.1
        torch.save(content, file)
    elif changed == "backbone":
        shutil.copy(taught / "tiny.pt", tmp_path / "backbone.pt")
    elif changed == "names":
        names[0] = "dog"
    else:
        monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
        monkeypatch.setattr(CoOp, "encode_classes", lambda self, *_: Classes(torch.eye(5, 32)))
    assert not torch.equal(features(names), before)
