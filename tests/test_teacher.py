"""A teacher: any method of ours with its weights, read as it was left, loaded once, refused where it cannot teach."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plpp_reg.clip.vision import ImageTower
from plpp_reg.data import DATASETS, DatasetEntry, DataSplit
from plpp_reg.engine import teacher as module
from plpp_reg.engine.arguments import resolve
from plpp_reg.engine.method import Classes, Inputs
from plpp_reg.engine.run import RunArguments
from plpp_reg.engine.teacher import Teacher
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.prompts.export import export
from plpp_reg.prompts.loading import load_run
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.ivlp import IVLP
from plpp_reg.trainers.maple import MaPLe
from plpp_reg.trainers.vpt import VPT
from plpp_reg.trainers.zeroshot import ZeroshotCLIP

from helpers import engine as helpers
from helpers.engine import quietly

KEPT = ("FEATURES.MAX_GIB", 1.0)
ZERO_SHOT = ("TEACHER.TRAINER", "ZeroshotCLIP")


class Follows(CoOp):
    """Learns to say what its teacher says, by squares: the least that a student can be."""

    distils = True

    @property
    def inputs(self) -> Inputs:
        return replace(super().inputs, labels=False, training_features={"teacher_features": self.teacher.encoder})

    def losses(self, batch: dict[str, Tensor], classes: Classes) -> dict[str, Tensor]:
        difference = self.logits(batch, classes) - self.teacher.logits(batch["teacher_features"])
        return {"squares": difference.pow(2).mean() / 100}


STUDENT = f"{Follows.__module__}:Follows"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, two backbones, and the finished run of a teacher on the other one."""
    world = tmp_path_factory.mktemp("world")
    helpers.make_images(world / "data")
    helpers.write_backbone(world / "tiny.pt")
    helpers.write_backbone(world / "other.pt", seed=1)
    helpers.write_recipe(world / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
        for name, trainer in (("coop", "CoOp"), ("ivlp", "IVLP")):
            opts = ("TRAINER.IVLP.PROMPT_DEPTH_VISION", "1", "TRAINER.IVLP.PROMPT_DEPTH_TEXT", "2")
            quietly(arguments(world, name, trainer, *opts, backbone="other.pt"))
        quietly(arguments(world, "base", "CoOp", "DATASET.SUBSAMPLE_CLASSES", "base", backbone="other.pt"))
    return world


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(world: Path) -> DataSplit:
    return helpers.read_tiny(world / "data")


def arguments(world: Path, out: str | Path, trainer: str = STUDENT, *opts: object, backbone: str = "tiny.pt") -> RunArguments:
    return RunArguments(
        trainer=trainer,
        root=str(world / "data"),
        output_dir=str(world / out),
        config_file=str(world / "recipe.yaml"),
        backbone=str(world / backbone),
        opts=tuple(map(str, opts)),
    )


def student(data: DataSplit, *opts: object) -> Trainer:
    return helpers.make_trainer(data, *opts, cls=Follows)


def teacher_of(data: DataSplit, *opts: object) -> Teacher:
    cfg = helpers.make_cfg(*opts)
    cfg.MODEL.BACKBONE.NAME = "tiny"
    return Teacher(cfg, data.classnames, clip_model=helpers.tiny_clip())


def pixels(count: int = 3) -> Tensor:
    return helpers.fixed_batches(1, count)[0]["img"]


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_zero_shot_teacher_on_the_students_backbone_says_what_the_method_says(data: DataSplit) -> None:
    teacher = teacher_of(data, *ZERO_SHOT)
    alone = helpers.make_trainer(data, cls=ZeroshotCLIP).method
    images = alone.frozen.encode(pixels())
    torch.testing.assert_close(teacher.class_features, alone.encode_classes().features, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.logits(images), alone.logits({"features": images}, alone.encode_classes()))
    assert teacher.encoder.described() == alone.frozen.described()  # its features are those of every run on that backbone


@pytest.mark.parametrize("name", ["coop", "ivlp"])
def test_a_runs_teacher_says_what_the_run_predicts(world: Path, data: DataSplit, name: str) -> None:
    """After its weights: encoded before they were in, the class features would be those of its initial words."""
    teacher = teacher_of(data, "TEACHER.RUN", str(world / name))
    run = load_run(world / name)
    with torch.no_grad():
        predicted = helpers.logits_of(run, {"img": pixels()})
    said = teacher.logits(teacher.encoder.encode(pixels()))
    torch.testing.assert_close(said, predicted, rtol=0, atol=1e-5)
    untrained = Trainer(type(run.method), run.cfg, data=data, clip_model=run.clip_model).method.encode_classes().features
    assert (teacher.class_features - untrained).abs().max() > 1e-3
    assert teacher.identity["classnames"] == helpers.CLASSNAMES and not teacher.class_features.requires_grad


def test_a_teacher_of_another_class_list_speaks_of_the_students(world: Path, data: DataSplit) -> None:
    """Its prompts stand around whatever names the student has."""
    teacher = teacher_of(data, "TEACHER.RUN", str(world / "base"))
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
    data: DataSplit, tmp_path: Path, cls: type, settings: dict[str, object]
) -> None:
    """As upstream's files are: the frozen CLIP and the fixed tokens beside what was learned, and no word of the settings."""
    opts = [part for key, value in settings.items() for part in (f"TRAINER.{cls.Config.node}.{key}", value)]
    method = helpers.make_trainer(data, *opts, "SEED", 9, cls=cls).method
    state = dict(method.saved.state_dict())
    if cls.not_loaded:
        state["image_encoder.conv1.weight"] = torch.ones(1)
    state["token_prefix"] = torch.ones(1)
    torch.save({"state_dict": state, "epoch": 20}, file := tmp_path / "model-best.pth.tar")
    teacher = teacher_of(data, "TEACHER.TRAINER", cls.__name__, "TEACHER.WEIGHTS", str(file))
    found = dict(zip(opts[::2], opts[1::2], strict=True))
    read = module.config.flat(teacher.named.cfg)
    assert {key: read[key] for key in found} == found
    torch.testing.assert_close(teacher.class_features, method.encode_classes().features, rtol=0, atol=1e-6)
    images = pixels()
    expected = method.image_features({"img": images})
    torch.testing.assert_close(teacher.encoder.encode(images), expected, rtol=0, atol=1e-6)
    assert teacher.identity["classnames"] is None  # the file does not say


def test_loading_a_teacher_leaves_the_random_streams(data: DataSplit, world: Path) -> None:
    teacher = teacher_of(data, "TEACHER.RUN", str(world / "ivlp"))
    before = torch.get_rng_state()
    _ = teacher.class_features
    assert torch.equal(torch.get_rng_state(), before)


def test_its_images_are_as_its_own_backbone_has_them(
    data: DataSplit, tmp_path: Path, make_clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_clip(width=64, layers=1, image_resolution=48)
    large.pixel_mean, large.pixel_std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    monkeypatch.setattr(module, "load_clip", lambda name, *_: large)
    trainer = student(data, *ZERO_SHOT, "TEACHER.BACKBONE", "ViT-B/16")
    ours, theirs = (trainer.frozen_features[name] for name in ("features", "teacher_features"))
    assert ours.cfg.INPUT.SIZE == (32, 32) and theirs.cfg.INPUT.SIZE == (48, 48)
    assert theirs.cfg.INPUT.PIXEL_MEAN == [0.5, 0.5, 0.5] and theirs.cfg.INPUT.PIXEL_STD == [0.25, 0.25, 0.25]
    image = theirs._images_of("train")[0, 0]["img"].unsqueeze(0)
    assert image.shape[-1] == 48
    torch.testing.assert_close(theirs.of("train")[:1], trainer.teacher.encoder.encode(image), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="INPUT.PIXEL_MEAN: expected"):
        _ = teacher_of(data, *ZERO_SHOT, "TEACHER.BACKBONE", "ViT-B/16", "TEACHER.OPTS", ("INPUT.PIXEL_MEAN", "[0,0,0]")).spoken


def test_a_resnet_teaches_too(data: DataSplit, tiny_resnet: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_clip", lambda name, *_: tiny_resnet)
    teacher = teacher_of(data, *ZERO_SHOT, "TEACHER.BACKBONE", "RN50")
    side = tiny_resnet.visual.input_resolution
    features = teacher.encoder.encode(torch.randn(3, 3, side, side))
    assert teacher.logits(features).shape == (3, 5) and teacher.spoken.input["SIZE"] == (side, side)


def test_crops_whose_place_depends_on_the_size_are_refused_with_a_teacher_of_another(
    world: Path, tmp_path: Path, make_clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_clip(width=64, layers=1, image_resolution=48)
    monkeypatch.setattr(module, "load_clip", lambda name, *_: large)
    opts = (*ZERO_SHOT, "TEACHER.BACKBONE", "ViT-B/16", "INPUT.TRANSFORMS", "['random_crop', 'normalize']")
    with pytest.raises(InputError, match=r"expected no random_crop, .* a teacher that sees \(48, 48\)"):
        quietly(arguments(world, tmp_path / "out", STUDENT, *opts))
    assert not (tmp_path / "out").exists()


# ---- what a student sees ---------------------------------------------------------------------------------------------


def test_a_batch_without_labels_has_none(data: DataSplit) -> None:
    trainer = student(data, *ZERO_SHOT)
    batch = next(iter(trainer.batches("train")))
    assert batch.keys() == {"index", "features", "teacher_features"}
    assert next(iter(trainer.batches("test"))).keys() == {"label", "index", "features"}
    norms = batch["teacher_features"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_labels_change_nothing_of_what_is_learned(data: DataSplit) -> None:
    def learned(split: DataSplit) -> dict[str, Tensor]:
        trainer = student(split, *ZERO_SHOT)
        trainer.train()
        return dict(trainer.method.saved.state_dict())

    shuffled = [datum._replace(label=(datum.label + 1) % 5) for datum in data.train]
    helpers.assert_same(learned(data), learned(replace(data, train=shuffled)))


@pytest.mark.parametrize("teacher", ["zero-shot", "other", "ivlp"])
def test_a_second_run_never_loads_the_teacher(
    world: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class vectors and image features are in the store; both runs are the same to the bit."""
    named = {
        "zero-shot": ZERO_SHOT,
        "other": (*ZERO_SHOT, "TEACHER.BACKBONE", world / "other.pt"),
        "ivlp": ("TEACHER.RUN", world / "ivlp"),
    }[teacher]
    passes: list[int] = []
    forward = ImageTower.forward
    monkeypatch.setattr(ImageTower, "forward", lambda self, *args: passes.append(1) or forward(self, *args))
    one = quietly(arguments(world, tmp_path / "one", STUDENT, *named, *KEPT))
    assert passes
    passes.clear()

    def loads(*_: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(module, "load_clip", loads)
    monkeypatch.setattr(Teacher, "_backbone", loads)
    two = quietly(arguments(world, tmp_path / "two", STUDENT, *named, *KEPT))
    assert not passes  # nor was any image encoded
    assert one["metrics"] == two["metrics"] and one["history"] == two["history"] and one["teacher"] == two["teacher"]
    states = [torch.load(tmp_path / name / "prompt_learner/model.pth.tar-2", weights_only=True) for name in ("one", "two")]
    helpers.assert_same(*(state["state_dict"] for state in states))


def test_a_teacher_of_open_clips_is_known_by_the_file_that_it_has_downloaded(
    data: DataSplit, tmp_path: Path, make_clip, monkeypatch: pytest.MonkeyPatch
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
        return teacher_of(data, *ZERO_SHOT, "TEACHER.BACKBONE", backbone, *KEPT).class_features

    monkeypatch.setattr(module, "load_clip", load)
    first = says()
    assert len(loaded) == 1 and torch.equal(says(), first) and len(loaded) == 1
    (snapshot / "open_clip_model.safetensors").write_bytes(b"other weights")
    says()
    assert len(loaded) == 2


@pytest.mark.parametrize("changed", ["weights", "backbone", "names", "template"])
def test_what_changes_a_teacher_is_another_one(
    world: Path, data: DataSplit, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def features(names: list[str]) -> Tensor:
        return teacher_of(replace(data, classnames=names), "TEACHER.RUN", str(run), *KEPT).class_features

    run = Path(shutil.copytree(world / "coop", tmp_path / "run"))
    shutil.copy(world / "other.pt", tmp_path / "backbone.pt")
    text = (run / "config.yaml").read_text().replace(str(world / "other.pt"), str(tmp_path / "backbone.pt"))
    (run / "config.yaml").write_text(text)
    names = list(data.classnames)
    before = features(names)
    assert torch.equal(features(names), before)
    if changed == "weights":
        content = torch.load(file := run / "prompt_learner/model.pth.tar-2", weights_only=True)
        content["state_dict"]["ctx"] += 0.1
        torch.save(content, file)
    elif changed == "backbone":
        shutil.copy(world / "tiny.pt", tmp_path / "backbone.pt")
    elif changed == "names":
        names[0] = "dog"
    else:
        monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
        monkeypatch.setattr(CoOp, "encode_classes", lambda self, *_: Classes(torch.eye(5, 32)))
    assert not torch.equal(features(names), before)


def test_a_record_and_a_checkpoint_say_who_taught(world: Path, tmp_path: Path) -> None:
    result = quietly(arguments(world, tmp_path / "out", STUDENT, "TEACHER.RUN", world / "coop"))
    recorded = json.loads((tmp_path / "out/result.json").read_text())["teacher"]
    assert recorded == result["teacher"]
    assert recorded["trainer"] == "CoOp" and recorded["backbone"] == str(world / "other.pt")
    assert recorded["classnames"] == helpers.CLASSNAMES and len(recorded["sha256"]) == 64
    content = torch.load(tmp_path / "out/prompt_learner/model.pth.tar-2", weights_only=True)
    assert content["plpp_reg"]["teacher"] == recorded


def test_the_same_teacher_in_another_place_goes_on_and_another_one_does_not(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "coop", moved := tmp_path / "moved")
    quietly(arguments(world, tmp_path / "out", STUDENT, "TEACHER.RUN", world / "coop"))
    (tmp_path / "out/result.json").unlink()
    quietly(arguments(world, tmp_path / "out", STUDENT, "TEACHER.RUN", moved))
    with pytest.raises(InputError, match="expected a run on the same terms .*teacher: CoOp on .* now CoOp on"):
        quietly(arguments(world, tmp_path / "out", STUDENT, "TEACHER.RUN", world / "base"))


def test_who_names_a_teacher_means_that_one(tmp_path: Path) -> None:
    """Of a recipe's teacher nothing is left beside a run, and of another method's neither weights nor settings."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("TEACHER:\n  TRAINER: ZeroshotCLIP2\n  BACKBONE: ViT-L/14\n  OPTS: [TRAINER.ZEROSHOT.TEMPLATES, sixty]\n")

    def named(*opts: str) -> dict[str, object]:
        cfg, _ = resolve(RunArguments(trainer="CoOp_KDPL", config_file=str(recipe), backbone="ViT-B/16", opts=opts))
        return {key: value for key, value in cfg.TEACHER.items() if value}

    sixty = ("TRAINER.ZEROSHOT.TEMPLATES", "sixty")
    assert named() == {"TRAINER": "ZeroshotCLIP2", "BACKBONE": "ViT-L/14", "OPTS": sixty}
    assert named("TEACHER.BACKBONE", "RN50") == {"TRAINER": "ZeroshotCLIP2", "BACKBONE": "RN50", "OPTS": sixty}
    assert named("TEACHER.RUN", "folder") == {"RUN": "folder"}
    assert named("TEACHER.TRAINER", "ZeroshotCLIP") == {"TRAINER": "ZeroshotCLIP", "BACKBONE": "ViT-L/14"}
    recipe.write_text("TEACHER:\n  RUN: folder\n")
    assert named("TEACHER.TRAINER", "ZeroshotCLIP") == {"TRAINER": "ZeroshotCLIP"}
    assert named() == {"RUN": "folder"}


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(data: DataSplit, *opts: object) -> str:
    with pytest.raises(InputError) as caught:
        _ = teacher_of(data, *opts).class_features
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_no_teacher_is_one_line_with_an_example(data: DataSplit) -> None:
    assert refused(data).startswith("TEACHER: expected a teacher, got none: TEACHER.RUN FOLDER")
    assert "TEACHER.TRAINER beside it" in refused(data, "TEACHER.WEIGHTS", "file")


def test_a_run_says_everything_and_must_be_finished(world: Path, data: DataSplit, tmp_path: Path) -> None:
    run = ("TEACHER.RUN", str(world / "coop"))
    for key, value in (("WEIGHTS", "file"), ("BACKBONE", "ViT-B/16"), ("OPTS", ("SEED", "1")), ("TRAINER", "CoOp")):
        assert f"got TEACHER.{key} too" in refused(data, *run, f"TEACHER.{key}", value)
    assert "with its config.yaml, got none" in refused(data, "TEACHER.RUN", str(tmp_path))
    shutil.copytree(world / "coop", unfinished := tmp_path / "run")
    (unfinished / "result.json").unlink()
    assert "expected a finished run, got one without result.json" in refused(data, "TEACHER.RUN", str(unfinished))
    shutil.copytree(world / "coop", emptied := tmp_path / "emptied")
    shutil.rmtree(emptied / "prompt_learner")
    assert "it has no folder 'prompt_learner'" in refused(data, "TEACHER.RUN", str(emptied))


def test_weights_are_those_of_the_method_that_is_named(world: Path, data: DataSplit, tmp_path: Path) -> None:
    file = str(world / "coop/prompt_learner/model.pth.tar-2")
    assert "TEACHER.WEIGHTS: expected a checkpoint of CoOp" in refused(data, "TEACHER.TRAINER", "CoOp")
    assert "expected none, ZeroshotCLIP learns nothing" in refused(data, *ZERO_SHOT, "TEACHER.WEIGHTS", file)
    assert "expected a checkpoint's file" in refused(data, "TEACHER.TRAINER", "CoOp", "TEACHER.WEIGHTS", str(tmp_path))
    assert "['ctx']" in refused(
        data, "TEACHER.TRAINER", "MaPLe", "TEACHER.WEIGHTS", file, "TEACHER.OPTS", ("TRAINER.MAPLE.PROMPT_DEPTH", "1")
    )
    assert "TEACHER: unknown trainer 'ZeroshotClip': did you mean 'ZeroshotCLIP'?" == refused(
        data, "TEACHER.TRAINER", "ZeroshotClip"
    )
    assert "TRAINER.COOP.N_CTX: expected an integer" in refused(data, *ZERO_SHOT, "TEACHER.OPTS", ("TRAINER.COOP.N_CTX", "x"))


def test_a_method_whose_classes_depend_on_the_image_cannot_teach(data: DataSplit) -> None:
    line = refused(data, "TEACHER.TRAINER", "CoCoOp", "TEACHER.WEIGHTS", "nowhere")
    assert "expected a method whose class features are the same for every image, got CoCoOp" in line


def test_vectors_of_each_class_belong_to_their_classes(data: DataSplit, tmp_path: Path) -> None:
    trainer = helpers.make_trainer(data, "TRAINER.COOP.CSC", True)
    trainer.train(tmp_path)
    file = str(tmp_path / "prompt_learner/model.pth.tar-2")
    other = replace(data, classnames=["dog", *data.classnames[1:]])
    named = ("TEACHER.TRAINER", "CoOp", "TEACHER.WEIGHTS", file)
    assert teacher_of(data, *named).class_features.shape == (5, 32)
    assert "the new classes have no vectors" in refused(other, *named)


def test_a_teacher_that_has_seen_the_new_classes_is_refused_where_they_are_measured(world: Path, tmp_path: Path) -> None:
    base = ("DATASET.SUBSAMPLE_CLASSES", "base")
    with pytest.raises(InputError, match=r"trained on the base classes alone, got one that has seen 2 of 2 new ones"):
        quietly(arguments(world, tmp_path / "out", STUDENT, *base, "TEACHER.RUN", world / "coop"))
    assert not (tmp_path / "out").exists()
    result = quietly(arguments(world, tmp_path / "out", STUDENT, *base, "TEACHER.RUN", world / "base"))
    assert result["teacher"]["classnames"] == helpers.CLASSNAMES[:3]
    quietly(arguments(world, tmp_path / "all", STUDENT, "TEACHER.RUN", world / "coop"))  # no class is new there


def test_a_teacher_of_other_data_that_knows_a_new_class_is_told(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", other := tmp_path / "other")
    content = torch.load(file := other / "prompt_learner/model.pth.tar-2", weights_only=True)
    content["plpp_reg"]["classnames"] = ["map", "okapi"]
    torch.save(content, file)
    quietly(arguments(world, tmp_path / "out", STUDENT, "DATASET.SUBSAMPLE_CLASSES", "base", "TEACHER.RUN", other))
    assert "trained on other data, among whose classes are 1 of 2 new ones ('map', …)" in (tmp_path / "out/log.txt").read_text()


def test_a_file_that_names_a_teachers_class_is_no_reason_to_import_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taught_by.py").write_text(
        "from plpp_reg.trainers.zeroshot import ZeroshotCLIP\n\n\nclass Own(ZeroshotCLIP): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = helpers.write_recipe(tmp_path / "own.yaml", TEACHER__TRAINER="taught_by:Own")
    args = arguments(world, tmp_path / "out", STUDENT)._replace(config_file=str(recipe))
    with pytest.raises(InputError, match="TEACHER.TRAINER: expected a trainer of plpp-reg's own, got 'taught_by:Own'"):
        quietly(args)
    assert "taught_by" not in sys.modules
    assert quietly(args._replace(opts=("TEACHER.TRAINER", "taught_by:Own")))["teacher"]["trainer"] == "taught_by:Own"
    monkeypatch.delitem(sys.modules, "taught_by")


def test_a_distilled_runs_prompts_need_no_teacher(world: Path, tmp_path: Path) -> None:
    """Prediction reads what was learned; its teacher may be gone."""
    shutil.copytree(world / "coop", gone := tmp_path / "gone")
    quietly(arguments(world, tmp_path / "out", STUDENT, "TEACHER.RUN", gone))
    shutil.rmtree(gone)
    with torch.no_grad():
        assert helpers.logits_of(load_run(tmp_path / "out", ["cat", "dog"]), {"img": pixels()}).shape == (3, 2)


PROMPTKD = ("TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", 1, "TRAINER.PROMPTKD.PREC", "fp32")


def test_a_student_is_not_tested_by_another_teacher(world: Path, tmp_path: Path) -> None:
    """Of classes that it was not trained on it asks its teacher, and its features fit that one's class features alone."""
    base = ("DATASET.SUBSAMPLE_CLASSES", "base")
    quietly(arguments(world, out := tmp_path / "out", "PromptKD", *PROMPTKD, *base, "TEACHER.RUN", world / "base"))

    def tested(name: str, *teacher: object) -> dict:
        new = arguments(world, tmp_path / name, "PromptKD", *PROMPTKD, "DATASET.SUBSAMPLE_CLASSES", "new", *teacher)
        return quietly(new._replace(eval_only=True, model_dir=str(out)))

    result = tested("same", "TEACHER.RUN", world / "base")
    assert result["teacher"]["trainer"] == "CoOp" and result["teacher"]["classnames"] == helpers.CLASSNAMES[:3]
    for another in (ZERO_SHOT, ("TEACHER.RUN", world / "coop")):
        with pytest.raises(InputError, match="TEACHER: expected the one that this student learned from, CoOp on .* got "):
            tested("other", *another)
    # nor once its run was made anew
    shutil.copytree(world / "base", moved := tmp_path / "moved")
    quietly(arguments(world, kd := tmp_path / "kd", "PromptKD", *PROMPTKD, *base, "TEACHER.RUN", moved))
    content = torch.load(file := moved / "prompt_learner/model.pth.tar-2", weights_only=True)
    content["state_dict"]["ctx"] += 0.1
    torch.save(content, file)
    with pytest.raises(InputError, match="another sha256"):
        load_run(kd, ["okapi", "tea"])
    assert load_run(kd, ["tea", "cat"])  # of which it knows what its teacher said


def test_a_test_of_a_student_says_who_taught_it(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "coop", gone := tmp_path / "gone")
    trained = quietly(arguments(world, out := tmp_path / "out", STUDENT, "TEACHER.RUN", gone))
    shutil.rmtree(gone)
    tested = arguments(world, tmp_path / "test", STUDENT)._replace(eval_only=True, model_dir=str(out))
    assert quietly(tested)["teacher"] == trained["teacher"] != None  # noqa: E711
    untrained = arguments(world, tmp_path / "untrained", STUDENT)._replace(eval_only=True)
    assert quietly(untrained)["teacher"] is None


def test_a_student_of_promptkd_teaches_by_what_its_own_teacher_said(world: Path, data: DataSplit, tmp_path: Path) -> None:
    """That one may be gone; made anew it is another, which is not asked."""
    shutil.copytree(world / "coop", own := tmp_path / "own")
    quietly(arguments(world, out := tmp_path / "kd", "PromptKD", *PROMPTKD, "TEACHER.RUN", own))
    images = pixels()
    with torch.no_grad():
        predicted = helpers.logits_of(load_run(out), {"img": images})
    content = torch.load(file := own / "prompt_learner/model.pth.tar-2", weights_only=True)
    content["state_dict"]["ctx"] += 0.1
    torch.save(content, file)
    student = teacher_of(data, "TEACHER.RUN", str(out), *KEPT)
    torch.testing.assert_close(student.logits(student.encoder.encode(images)), predicted, rtol=0, atol=1e-5)
    other = replace(data, classnames=["okapi", *data.classnames[1:]])
    with pytest.raises(InputError, match="expected the one that this student learned from"):
        _ = teacher_of(other, "TEACHER.RUN", str(out), *KEPT).class_features
    content = torch.load(file := out / "VLPromptLearner/model.pth.tar-2", weights_only=True)
    content["plpp_reg"]["said"]["class_features"] = content["plpp_reg"]["said"]["class_features"].flip(0)
    torch.save(content, file)
    flipped = teacher_of(data, "TEACHER.RUN", str(out), *KEPT).class_features
    assert torch.equal(flipped, student.class_features.flip(0))


def test_a_student_that_predicts_by_its_teacher_keeps_what_it_said(world: Path, tmp_path: Path) -> None:
    """Its teacher may be gone for the classes that it was trained on; for others it is asked, and missed by name."""
    shutil.copytree(world / "coop", gone := tmp_path / "gone")
    out = tmp_path / "out"
    opts = ("TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", 1, "TRAINER.PROMPTKD.PREC", "fp32", "TEACHER.RUN", gone)
    trained = quietly(arguments(world, out, "PromptKD", *opts))
    images = {"img": pixels()}
    with torch.no_grad():
        before = helpers.logits_of(load_run(out), images)
        shutil.rmtree(gone)
        after = load_run(out)
        assert torch.equal(helpers.logits_of(after, images), before)
        some = helpers.logits_of(load_run(out, ["tea", "cat"]), images)
        torch.testing.assert_close(some, before[:, [2, 0]])
        export(after, tmp_path / "student.safetensors")
    assert "teacher_class_features" in load_file(tmp_path / "student.safetensors")
    tested = arguments(world, tmp_path / "test", "PromptKD", *opts)._replace(eval_only=True, model_dir=str(out))
    assert quietly(tested)["metrics"] == trained["metrics"]
    with pytest.raises(InputError, match=f"TEACHER.RUN '{gone}': expected the folder of a run"):
        load_run(out, ["tea", "okapi"])
