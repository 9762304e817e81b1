"""A student says who taught it, and is tested, continued and used as that one's alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plpp_reg.data import DataSplit
from plpp_reg.engine.arguments import resolve
from plpp_reg.engine.run import RunArguments
from plpp_reg.errors import InputError
from plpp_reg.prompts.export import export
from plpp_reg.prompts.loading import load_run

from helpers import engine as helpers
from helpers.engine import quietly
from helpers.teaching import KEPT, PROMPTKD, STUDENT, ZERO_SHOT, arguments, pixels, teacher_of

pytestmark = pytest.mark.usefixtures("kept_apart")


def test_a_record_and_a_checkpoint_say_who_taught(taught: Path, tmp_path: Path) -> None:
    result = quietly(arguments(taught, tmp_path / "out", STUDENT, "TEACHER.RUN", taught / "coop"))
    recorded = json.loads((tmp_path / "out/result.json").read_text())["teacher"]
    assert recorded == result["teacher"]
    assert recorded["trainer"] == "CoOp" and recorded["backbone"] == str(taught / "other.pt")
    assert recorded["classnames"] == helpers.CLASSNAMES and len(recorded["sha256"]) == 64
    content = torch.load(tmp_path / "out/prompt_learner/model.pth.tar-2", weights_only=True)
    assert content["plpp_reg"]["teacher"] == recorded


def test_the_same_teacher_in_another_place_goes_on_and_another_one_does_not(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(taught / "coop", moved := tmp_path / "moved")
    quietly(arguments(taught, tmp_path / "out", STUDENT, "TEACHER.RUN", taught / "coop"))
    (tmp_path / "out/result.json").unlink()
    quietly(arguments(taught, tmp_path / "out", STUDENT, "TEACHER.RUN", moved))
    with pytest.raises(InputError, match="expected a run on the same terms .*teacher: CoOp on .* now CoOp on"):
        quietly(arguments(taught, tmp_path / "out", STUDENT, "TEACHER.RUN", taught / "base"))


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


def test_a_distilled_runs_prompts_need_no_teacher(taught: Path, tmp_path: Path) -> None:
    """Prediction reads what was learned; its teacher may be gone."""
    shutil.copytree(taught / "coop", gone := tmp_path / "gone")
    quietly(arguments(taught, tmp_path / "out", STUDENT, "TEACHER.RUN", gone))
    shutil.rmtree(gone)
    with torch.no_grad():
        assert helpers.logits_of(load_run(tmp_path / "out", ["cat", "dog"]), {"img": pixels()}).shape == (3, 2)


def test_a_student_is_not_tested_by_another_teacher(taught: Path, tmp_path: Path) -> None:
    """Of classes that it was not trained on it asks its teacher, and its features fit that one's class features alone."""
    base = ("DATASET.SUBSAMPLE_CLASSES", "base")
    quietly(arguments(taught, out := tmp_path / "out", "PromptKD", *PROMPTKD, *base, "TEACHER.RUN", taught / "base"))

    def tested(name: str, *teacher: object) -> dict:
        new = arguments(taught, tmp_path / name, "PromptKD", *PROMPTKD, "DATASET.SUBSAMPLE_CLASSES", "new", *teacher)
        return quietly(new._replace(eval_only=True, model_dir=str(out)))

    result = tested("same", "TEACHER.RUN", taught / "base")
    assert result["teacher"]["trainer"] == "CoOp" and result["teacher"]["classnames"] == helpers.CLASSNAMES[:3]
    for another in (ZERO_SHOT, ("TEACHER.RUN", taught / "coop")):
        with pytest.raises(InputError, match="TEACHER: expected the one that this student learned from, CoOp on .* got "):
            tested("other", *another)
    # nor once its run was made anew
    shutil.copytree(taught / "base", moved := tmp_path / "moved")
    quietly(arguments(taught, kd := tmp_path / "kd", "PromptKD", *PROMPTKD, *base, "TEACHER.RUN", moved))
    content = torch.load(file := moved / "prompt_learner/model.pth.tar-2", weights_only=True)
    content["state_dict"]["ctx"] += 0.1
    torch.save(content, file)
    with pytest.raises(InputError, match="another sha256"):
        load_run(kd, ["okapi", "tea"])
    assert load_run(kd, ["tea", "cat"])  # of which it knows what its teacher said


def test_a_test_of_a_student_says_who_taught_it(taught: Path, tmp_path: Path) -> None:
    shutil.copytree(taught / "coop", gone := tmp_path / "gone")
    trained = quietly(arguments(taught, out := tmp_path / "out", STUDENT, "TEACHER.RUN", gone))
    shutil.rmtree(gone)
    tested = arguments(taught, tmp_path / "test", STUDENT)._replace(eval_only=True, model_dir=str(out))
    assert quietly(tested)["teacher"] == trained["teacher"] != None  # noqa: E711
    untrained = arguments(taught, tmp_path / "untrained", STUDENT)._replace(eval_only=True)
    assert quietly(untrained)["teacher"] is None


def test_a_student_of_promptkd_teaches_by_what_its_own_teacher_said(
    taught: Path, taught_data: DataSplit, tmp_path: Path
) -> None:
    """That one may be gone; made anew it is another, which is not asked."""
    shutil.copytree(taught / "coop", own := tmp_path / "own")
    quietly(arguments(taught, out := tmp_path / "kd", "PromptKD", *PROMPTKD, "TEACHER.RUN", own))
    images = pixels()
    with torch.no_grad():
        predicted = helpers.logits_of(load_run(out), {"img": images})
    content = torch.load(file := own / "prompt_learner/model.pth.tar-2", weights_only=True)
    content["state_dict"]["ctx"] += 0.1
    torch.save(content, file)
    student = teacher_of(taught_data, "TEACHER.RUN", str(out), *KEPT)
    torch.testing.assert_close(student.logits(student.encoder.encode(images)), predicted, rtol=0, atol=1e-5)
    other = replace(taught_data, classnames=["okapi", *taught_data.classnames[1:]])
    with pytest.raises(InputError, match="expected the one that this student learned from"):
        _ = teacher_of(other, "TEACHER.RUN", str(out), *KEPT).class_features
    content = torch.load(file := out / "VLPromptLearner/model.pth.tar-2", weights_only=True)
    content["plpp_reg"]["said"]["class_features"] = content["plpp_reg"]["said"]["class_features"].flip(0)
    torch.save(content, file)
    flipped = teacher_of(taught_data, "TEACHER.RUN", str(out), *KEPT).class_features
    assert torch.equal(flipped, student.class_features.flip(0))


def test_a_student_that_predicts_by_its_teacher_keeps_what_it_said(taught: Path, tmp_path: Path) -> None:
    """Its teacher may be gone for the classes that it was trained on; for others it is asked, and missed by name."""
    shutil.copytree(taught / "coop", gone := tmp_path / "gone")
    out = tmp_path / "out"
    opts = ("TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", 1, "TRAINER.PROMPTKD.PREC", "fp32", "TEACHER.RUN", gone)
    trained = quietly(arguments(taught, out, "PromptKD", *opts))
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
    tested = arguments(taught, tmp_path / "test", "PromptKD", *opts)._replace(eval_only=True, model_dir=str(out))
    assert quietly(tested)["metrics"] == trained["metrics"]
    with pytest.raises(InputError, match=f"TEACHER.RUN '{gone}': expected the folder of a run"):
        load_run(out, ["tea", "okapi"])
