"""What cannot teach is refused in a line."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plpp_reg.data import DataSplit
from plpp_reg.errors import InputError

from helpers import engine as helpers
from helpers.engine import quietly
from helpers.teaching import STUDENT, ZERO_SHOT, arguments, teacher_of

pytestmark = pytest.mark.usefixtures("kept_apart")


def refused(taught_data: DataSplit, *opts: object) -> str:
    with pytest.raises(InputError) as caught:
        _ = teacher_of(taught_data, *opts).class_features
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_no_teacher_is_one_line_with_an_example(taught_data: DataSplit) -> None:
    assert refused(taught_data).startswith("TEACHER: expected a teacher, got none: TEACHER.RUN FOLDER")
    assert "TEACHER.TRAINER beside it" in refused(taught_data, "TEACHER.WEIGHTS", "file")


def test_a_run_says_everything_and_must_be_finished(taught: Path, taught_data: DataSplit, tmp_path: Path) -> None:
    run = ("TEACHER.RUN", str(taught / "coop"))
    for key, value in (("WEIGHTS", "file"), ("BACKBONE", "ViT-B/16"), ("OPTS", ("SEED", "1")), ("TRAINER", "CoOp")):
        assert f"got TEACHER.{key} too" in refused(taught_data, *run, f"TEACHER.{key}", value)
    assert "with its config.yaml, got none" in refused(taught_data, "TEACHER.RUN", str(tmp_path))
    shutil.copytree(taught / "coop", unfinished := tmp_path / "run")
    (unfinished / "result.json").unlink()
    assert "expected a finished run, got one without result.json" in refused(taught_data, "TEACHER.RUN", str(unfinished))
    shutil.copytree(taught / "coop", emptied := tmp_path / "emptied")
    shutil.rmtree(emptied / "prompt_learner")
    assert "it has no folder 'prompt_learner'" in refused(taught_data, "TEACHER.RUN", str(emptied))


def test_weights_are_those_of_the_method_that_is_named(taught: Path, taught_data: DataSplit, tmp_path: Path) -> None:
    file = str(taught / "coop/prompt_learner/model.pth.tar-2")
    assert "TEACHER.WEIGHTS: expected a checkpoint of CoOp" in refused(taught_data, "TEACHER.TRAINER", "CoOp")
    assert "expected none, ZeroshotCLIP learns nothing" in refused(taught_data, *ZERO_SHOT, "TEACHER.WEIGHTS", file)
    assert "expected a checkpoint's file" in refused(taught_data, "TEACHER.TRAINER", "CoOp", "TEACHER.WEIGHTS", str(tmp_path))
    assert "['ctx']" in refused(
        taught_data, "TEACHER.TRAINER", "MaPLe", "TEACHER.WEIGHTS", file, "TEACHER.OPTS", ("TRAINER.MAPLE.PROMPT_DEPTH", "1")
    )
    assert "TEACHER: unknown trainer 'ZeroshotClip': did you mean 'ZeroshotCLIP'?" == refused(
        taught_data, "TEACHER.TRAINER", "ZeroshotClip"
    )
    assert "TRAINER.COOP.N_CTX: expected an integer" in refused(
        taught_data, *ZERO_SHOT, "TEACHER.OPTS", ("TRAINER.COOP.N_CTX", "x")
    )


def test_a_method_whose_classes_depend_on_the_image_cannot_teach(taught_data: DataSplit) -> None:
    line = refused(taught_data, "TEACHER.TRAINER", "CoCoOp", "TEACHER.WEIGHTS", "nowhere")
    assert "expected a method whose class features are the same for every image, got CoCoOp" in line


def test_vectors_of_each_class_belong_to_their_classes(taught_data: DataSplit, tmp_path: Path) -> None:
    trainer = helpers.make_trainer(taught_data, "TRAINER.COOP.CSC", True)
    trainer.train(tmp_path)
    file = str(tmp_path / "prompt_learner/model.pth.tar-2")
    other = replace(taught_data, classnames=["dog", *taught_data.classnames[1:]])
    named = ("TEACHER.TRAINER", "CoOp", "TEACHER.WEIGHTS", file)
    assert teacher_of(taught_data, *named).class_features.shape == (5, 32)
    assert "the new classes have no vectors" in refused(other, *named)


def test_a_teacher_that_has_seen_the_new_classes_is_refused_where_they_are_measured(taught: Path, tmp_path: Path) -> None:
    base = ("DATASET.SUBSAMPLE_CLASSES", "base")
    with pytest.raises(InputError, match=r"trained on the base classes alone, got one that has seen 2 of 2 new ones"):
        quietly(arguments(taught, tmp_path / "out", STUDENT, *base, "TEACHER.RUN", taught / "coop"))
    assert not (tmp_path / "out").exists()
    result = quietly(arguments(taught, tmp_path / "out", STUDENT, *base, "TEACHER.RUN", taught / "base"))
    assert result["teacher"]["classnames"] == helpers.CLASSNAMES[:3]
    quietly(arguments(taught, tmp_path / "all", STUDENT, "TEACHER.RUN", taught / "coop"))  # no class is new there


def test_a_teacher_of_other_data_that_knows_a_new_class_is_told(taught: Path, tmp_path: Path) -> None:
    shutil.copytree(taught / "base", other := tmp_path / "other")
    content = torch.load(file := other / "prompt_learner/model.pth.tar-2", weights_only=True)
    content["plpp_reg"]["classnames"] = ["map", "okapi"]
    torch.save(content, file)
    quietly(arguments(taught, tmp_path / "out", STUDENT, "DATASET.SUBSAMPLE_CLASSES", "base", "TEACHER.RUN", other))
    assert "trained on other data, among whose classes are 1 of 2 new ones ('map', …)" in (tmp_path / "out/log.txt").read_text()


def test_a_file_that_names_a_teachers_class_is_no_reason_to_import_it(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taught_by.py").write_text(
        "from plpp_reg.trainers.zeroshot import ZeroshotCLIP\n\n\nclass Own(ZeroshotCLIP): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = helpers.write_recipe(tmp_path / "own.yaml", TEACHER__TRAINER="taught_by:Own")
    args = arguments(taught, tmp_path / "out", STUDENT)._replace(config_file=str(recipe))
    with pytest.raises(InputError, match="TEACHER.TRAINER: expected a trainer of plpp-reg's own, got 'taught_by:Own'"):
        quietly(args)
    assert "taught_by" not in sys.modules
    assert quietly(args._replace(opts=("TEACHER.TRAINER", "taught_by:Own")))["teacher"]["trainer"] == "taught_by:Own"
    monkeypatch.delitem(sys.modules, "taught_by")
