"""KDPL: any method by its teacher's predictions instead of labels. What upstream's code gave, and what each method keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plpp_reg.clip.load import load_clip
from plpp_reg.commands import cli
from plpp_reg.data import DATASETS, DatasetEntry, DataSplit
from plpp_reg.engine import registry
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments
from plpp_reg.engine.teacher import Spoken, Teacher
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.prompts.loading import load_run
from plpp_reg.trainers import TRAINERS

from helpers import engine as helpers
from helpers import seeded_clip
from helpers.engine import quietly

REFERENCES = Path(__file__).parent / "references"
WITHIN = 1e-4  # of the largest entry
METHODS = ("CoOp", "KgCoOp", "MaPLe", "VPT", "PromptSRC")
KDPL = [f"{method}_KDPL" for method in METHODS]
WITH_TEXT = [name for name in KDPL if name != "VPT_KDPL"]
OPTIONS: dict[str, Any] = {  # of a CLIP with one layer of vision and two of text
    "TRAINER.MAPLE.PROMPT_DEPTH": 1,
    "TRAINER.VPT.PROMPT_DEPTH_VISION": 1,
    "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION": 1,
    "TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT": 2,
    **{f"TRAINER.{node}.PREC": "fp32" for node in ("COOP", "MAPLE", "VPT", "PROMPTSRC")},
}
OPTS = tuple(part for pair in OPTIONS.items() for part in pair)
ZERO_SHOT = ("TEACHER.TRAINER", "ZeroshotCLIP2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    helpers.make_images(world / "data")
    helpers.write_backbone(world / "tiny.pt")
    helpers.write_recipe(world / "recipe.yaml")
    return world


@pytest.fixture
def data(world: Path) -> DataSplit:
    return helpers.read_tiny(world / "data")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))


def arguments(world: Path, out: Path, trainer: str, *opts: object) -> RunArguments:
    return RunArguments(
        trainer=trainer,
        root=str(world / "data"),
        output_dir=str(out),
        config_file=str(world / "recipe.yaml"),
        backbone=str(world / "tiny.pt"),
        opts=tuple(map(str, (*OPTS, *ZERO_SHOT, *opts))),
    )


def build(name: str, data: DataSplit, *opts: object) -> Trainer:
    cls, *_ = registry.find_trainer(name)
    return helpers.make_trainer(data, *OPTS, *ZERO_SHOT, *opts, cls=cls)


# ---- what upstream's code gave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "k"), [("all", 0), ("top4", 4)])
def test_coops_loss_and_gradient_are_upstreams(case: str, k: int, tmp_path: Path) -> None:
    """On the same weights, pictures and teacher's logits, which are its features where its class features are the axes."""
    reference = np.load(REFERENCES / "kdpl_coop.npz", allow_pickle=False)
    images, teacher, logits, loss, gradient = (
        torch.from_numpy(np.asarray(reference[name])).float()
        for name in ("images", "teacher_logits", "student_logits", f"{case}.loss", f"{case}.grad_ctx")
    )
    torch.save(seeded_clip.state_dict(**seeded_clip.STUDENT), tmp_path / "student.pt")
    model, names = load_clip(str(tmp_path / "student.pt")), seeded_clip.CLASSES
    cfg = helpers.make_cfg("TRAINER.COOP.N_CTX", 4, "TRAINER.KDPL.K_MAX", k)
    said = Teacher(cfg, names)
    said.spoken = Spoken(torch.eye(len(names)), torch.tensor(0.0), {}, {})
    cls, *_ = registry.find_trainer("CoOp_KDPL")
    trainer = Trainer(cls, cfg, DataSplit([], [], [], names), model, RunLog(quiet=True), said)
    method, scale = trainer.method, model.logit_scale.exp()
    with torch.no_grad():
        method.prompt_learner.ctx.copy_(seeded_clip.normal("coop.ctx", 4, 64, std=0.05))
    batch = {"features": method.frozen.encode(images), "teacher_features": teacher / scale}
    classes = method.encode_classes()
    ours = method.logits(batch, classes)
    assert_near(ours.detach(), logits)
    (kd,) = method.losses(batch, classes).values()
    assert_near(kd.detach(), loss)
    assert_near(torch.autograd.grad(kd, trainer.parameters[0])[0], gradient)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= WITHIN * theirs.abs().max() and theirs.abs().max() > 0


# ---- each method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KDPL)
def test_the_labels_loss_gives_way_and_the_others_stay(name: str, data: DataSplit) -> None:
    trainer = build(name, data)
    base = build(name.removesuffix("_KDPL"), data)
    batch = next(iter(trainer.batches("train")))
    assert "label" not in batch
    labelled = {**batch, "label": torch.zeros(len(batch["index"]), dtype=torch.long)}
    losses, others = helpers.losses_of(trainer, batch), helpers.losses_of(base, labelled)
    assert tuple(losses) == ("kd", *(key for key in others if key != "ce"))
    for key in losses.keys() - {"kd"}:
        torch.testing.assert_close(losses[key], others[key], rtol=1e-6, atol=0)
    p = (trainer.method.logits(batch, trainer.method.encode_classes()).log_softmax(-1)).detach().double()
    teacher = trainer.method.cosines(batch["teacher_features"], trainer.teacher.class_features)
    q = teacher.log_softmax(-1).double()
    want = 0.5 * ((q.exp() * (q - p)).sum(-1) + (p.exp() * (p - q)).sum(-1)).mean()
    assert losses["kd"].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("name", KDPL)
def test_a_step_moves_what_the_method_learns_and_reads_no_label(name: str, data: DataSplit) -> None:
    """Through the whole loop, with labels that mean nothing: the same weights to the bit."""
    shuffled = replace(data, train=[datum._replace(label=(datum.label + 2) % 5) for datum in data.train])
    one, two = build(name, data), build(name, shuffled)
    start = {key: t.clone() for key, t in one.method.saved.state_dict().items()}
    for trainer in (one, two):
        trainer.train()
    learned = dict(one.method.saved.state_dict())
    helpers.assert_same(learned, dict(two.method.saved.state_dict()))
    assert any(not torch.equal(learned[key], start[key]) for key in start)
    assert one.state.history == two.state.history and "acc" not in one.state.history[0]


@pytest.mark.parametrize("name", WITH_TEXT)
def test_plpp_joins_where_there_is_text_context(name: str, data: DataSplit) -> None:
    values = build(name, data, "TRAINER.PLPP.ENABLED", True).train_epoch()
    assert {"kd", "ppl", "inverse_ppl"} <= values.keys()


def test_vpt_has_no_text_context() -> None:
    with pytest.raises(InputError, match="VPT_KDPL learns no text context"):
        registry.find_trainer("VPT_KDPL_PLPP")
    assert {name for name in TRAINERS if name.endswith("_KDPL")} == set(KDPL)


@pytest.mark.parametrize("name", ["CoOp_KDPL", "PromptSRC_KDPL_PLPP"])
def test_a_killed_run_goes_on_to_the_bit(name: str, world: Path, tmp_path: Path) -> None:
    kept = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    whole = quietly(arguments(world, tmp_path / "whole", name, *kept))
    folder = tmp_path / "cut"
    quietly(arguments(world, folder, name, *kept))
    (folder / "result.json").unlink()
    inner = next(path for path in folder.iterdir() if (path / "checkpoint").is_file())
    (inner / "model.pth.tar-3").unlink()
    (inner / "checkpoint").write_text("model.pth.tar-2\n")
    cut = quietly(arguments(world, folder, name, *kept))
    assert cut["metrics"] == whole["metrics"] and cut["history"] == whole["history"] and cut["teacher"] == whole["teacher"]
    files = [tmp_path / at / inner.name / "model.pth.tar-3" for at in ("whole", "cut")]
    helpers.assert_same(*(torch.load(file, weights_only=True)["state_dict"] for file in files))


def test_a_students_prompts_are_the_host_methods_own(world: Path, tmp_path: Path) -> None:
    """They load as CoOp's, and the other way round: nothing of a teacher is in them."""
    quietly(arguments(world, tmp_path / "out", "CoOp_KDPL"))
    content = torch.load(tmp_path / "out/prompt_learner/model.pth.tar-2", weights_only=True)
    assert content["state_dict"].keys() == {"ctx"}
    images = {"img": helpers.fixed_batches(1)[0]["img"]}
    with torch.no_grad():
        logits = helpers.logits_of(load_run(tmp_path / "out"), images)
        config = (tmp_path / "out/config.yaml").read_text().replace("NAME: CoOp_KDPL", "NAME: CoOp")
        (tmp_path / "out/config.yaml").write_text(config)
        assert torch.equal(helpers.logits_of(load_run(tmp_path / "out"), images), logits)


# ---- what it costs -------------------------------------------------------------------------------------------------------


def test_features_that_do_not_fit_are_told_before_the_run(world: Path, tmp_path: Path) -> None:
    quietly(arguments(world, tmp_path / "out", "CoOp_KDPL", "FEATURES.MAX_GIB", 1e-6))
    assert "over FEATURES.MAX_GIB 1e-06: the image towers" in (tmp_path / "out/log.txt").read_text()
    quietly(arguments(world, tmp_path / "fits", "CoOp_KDPL", "FEATURES.MAX_GIB", 1.0))
    assert "over FEATURES.MAX_GIB" not in (tmp_path / "fits/log.txt").read_text()


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "fits"), [(1, False), (2, True), (5, True), (6, False), (-1, False)])
def test_so_many_classes_can_be_kept_as_there_are(data: DataSplit, k: int, fits: bool) -> None:
    if fits:
        build("CoOp_KDPL", data, "TRAINER.KDPL.K_MAX", k)
        return
    with pytest.raises(InputError, match=r"TRAINER.KDPL.K_MAX: expected"):
        build("CoOp_KDPL", data, "TRAINER.KDPL.K_MAX", k)


def test_classes_that_a_process_chooses_by_its_part_of_a_batch_are_refused(
    data: DataSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plpp_reg.engine.method.current", lambda: Ranks(0, 2))
    with pytest.raises(InputError, match=r"TRAINER.KDPL.K_MAX: expected one process that sees the whole batch, got 2"):
        build("CoOp_KDPL", data, "TRAINER.KDPL.K_MAX", 3)


def test_one_class_teaches_nothing(data: DataSplit) -> None:
    with pytest.raises(InputError, match="expected at least 2 classes, which a teacher tells apart, got 1"):
        build("CoOp_KDPL", replace(data, classnames=["cat"]))


def test_without_a_teacher_a_run_says_what_to_name(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["--root", str(world / "data"), "--output-dir", str(tmp_path / "out"), "--config-file", str(world / "recipe.yaml")]
    assert cli.main(["train", "--trainer", "CoOp_KDPL", *args, "--backbone", str(world / "tiny.pt")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "TEACHER: expected a teacher, got none: TEACHER.RUN FOLDER" in said
    assert not (tmp_path / "out").exists()
