"""Protocols plan a teacher's run before its students', once a data set and seed; students know it by its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from plpp_reg.commands import cli
from plpp_reg.data import DATASETS, DatasetEntry
from plpp_reg.engine.arguments import resolve
from plpp_reg.errors import InputError
from plpp_reg.experiments import sweep
from plpp_reg.experiments.jobs import Choice, Job, plan
from plpp_reg.results.record import read_result

from helpers import engine as helpers
from helpers.bench import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))
    bench = Bench(tmp_path)
    bench.write(methods=["CoOp_KDPL"], teacher={"method": "CoOp"})
    return bench


def quiet(line: str) -> None:
    pass


def names(jobs: list[Job]) -> list[str]:
    return [f"{job.note['method']} {job.note['variant']}".strip() + f" {job.note['seed']}" for job in jobs]


def of(job: Job) -> dict[str, str]:
    opts = job.arguments.opts
    return dict(zip(opts[::2], opts[1::2], strict=True))


# ---- the plan ------------------------------------------------------------------------------------------------------------


def test_a_teachers_runs_come_first_and_each_student_has_its_seeds(bench: Bench) -> None:
    jobs = bench.plan()
    assert names(jobs) == ["CoOp 1", "CoOp 2", "CoOp_KDPL 1", "CoOp_KDPL 2"]
    teachers, students = jobs[:2], jobs[2:]
    for teacher, student in zip(teachers, students, strict=True):
        assert student.teacher == teacher.folder and of(student)["TEACHER.RUN"] == str(teacher.folder.absolute())
        assert teacher.teacher is None and "TEACHER.RUN" not in of(teacher)
        assert student.note["teacher"] == f"CoOp on {bench.backbone}"


def test_a_teacher_that_is_a_method_of_the_plan_is_run_once(bench: Bench) -> None:
    alone = bench.plan()
    assert bench.plan(methods=["CoOp_KDPL", "CoOp"]) == alone
    assert names(bench.plan(methods=["CoOp", "CoOp_KDPL"])) == names(alone)


def test_a_students_key_holds_its_teachers(bench: Bench) -> None:
    before = bench.plan(seeds=[1])[-1]
    bench.write(methods=["CoOp_KDPL"], teacher={"method": "CoOp", "set": {"OPTIM.LR": 0.1}})
    after = bench.plan(seeds=[1])[-1]
    assert before.note["key"] != after.note["key"] and before.folder == after.folder


def test_of_several_teachers_those_after_the_first_are_variants(bench: Bench) -> None:
    jobs = bench.plan(seeds=[1], teachers=["CoOp", "CoOp_PLPP", "ZeroshotCLIP2"])
    assert names(jobs) == [
        "CoOp 1",
        "CoOp_KDPL 1",
        "CoOp_PLPP 1",
        "CoOp_KDPL teacher=CoOp_PLPP 1",
        "CoOp_KDPL teacher=ZeroshotCLIP2 1",
    ]
    assert of(jobs[-1])["TEACHER.TRAINER"] == "ZeroshotCLIP2" and jobs[-1].teacher is None


def test_a_teacher_on_another_backbone_has_a_folder_of_its_own(bench: Bench) -> None:
    other = helpers.write_backbone(bench.place / "other.pt", seed=1)
    bench.write(methods=["CoOp", "CoOp_KDPL"], teacher={"method": "CoOp", "backbone": str(other)})
    jobs = bench.plan(seeds=[1])
    assert names(jobs) == ["CoOp 1", "CoOp 1", "CoOp_KDPL 1"]
    assert [job.note["backbone"] for job in jobs] == [str(bench.backbone), str(other), str(bench.backbone)]
    assert len({job.folder for job in jobs}) == 3 and jobs[2].teacher == jobs[1].folder


def test_promptkd_trains_on_all_classes_and_is_tested_on_both_halves(tmp_path: Path) -> None:
    teacher, student = plan("base_to_new", Choice(methods=["PromptKD"], datasets=["dtd"], seeds=[1], root="DATA"), tmp_path)
    assert (teacher.note["method"], teacher.note["backbone"]) == ("PromptSRC", "ViT-L/14")
    assert of(teacher)["DATASET.SUBSAMPLE_CLASSES"] == "base" and of(teacher)["OPTIM.LR"] == "0.005"
    assert of(teacher)["DATASET.NUM_SHOTS"] == "16"
    assert of(student)["DATASET.SUBSAMPLE_CLASSES"] == "all" and of(student)["DATASET.NUM_SHOTS"] == "-1"
    assert student.note["test"] == "all" and set(student.tests) == {"base", "new"}
    assert Path(student.arguments.config_file).stem == "base2new_fine_grained"


def test_across_data_sets_promptkd_has_a_student_a_target_from_one_teacher(tmp_path: Path) -> None:
    choice = Choice(methods=["PromptKD"], targets=["dtd", "eurosat"], seeds=[1, 2], root="DATA")
    jobs = plan("cross_dataset", choice, tmp_path)
    teachers, students = jobs[:2], jobs[2:]
    assert [job.note["method"] for job in teachers] == ["PromptSRC"] * 2
    assert of(teachers[0])["DATASET.NAME"] == "ImageNet" and of(teachers[0])["DATASET.NUM_SHOTS"] == "16"
    assert [of(job)["DATASET.NAME"] for job in students] == ["DescribableTextures"] * 2 + ["EuroSAT"] * 2
    assert [job.teacher for job in students] == [teacher.folder for teacher in teachers] * 2
    for job in students:
        assert of(job)["DATASET.NUM_SHOTS"] == "-1" and not job.tests
        assert job.note["dataset"] == "imagenet" and job.note["test"] == job.note["target"]
    assert students[0].label == "cross_dataset: imagenet to dtd, 16 shots, PromptKD, seed 1"
    assert len({job.folder for job in jobs}) == len(jobs)
    # of domains it is a student of the source, as every other method
    teacher, student = plan("domain_generalization", choice._replace(targets=["imagenet_r"], seeds=[1]), tmp_path)
    assert of(student)["DATASET.NAME"] == "ImageNet" and set(student.tests) == {"imagenet_r"} and "target" not in student.note


def test_a_student_a_target_is_for_methods_that_distil_in_tables_of_targets(bench: Bench) -> None:
    targets = {"table": "targets", "targets": ["emoji"], "set": {}, "test": "source", "tests": {}}
    bench.write(methods=["CoOp", "CoOp_KDPL"], teacher={"method": "CoOp"}, each="target", **targets)
    jobs = bench.plan(seeds=[1])
    assert [(job.note["method"], job.note.get("target")) for job in jobs] == [("CoOp", None), ("CoOp_KDPL", "emoji")]
    for wrong in ({"each": "source", **targets}, {"each": "target"}):
        bench.write(**wrong)
        with pytest.raises(InputError, match="each: expected 'target', in a table of targets, got "):
            bench.plan()


def test_a_teacher_that_is_chosen_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    """KDPL's recipes name a backbone for theirs; a run says its own, and of a method without one the recipe's stays."""
    choice = Choice(methods=["CoOp_KDPL"], datasets=["dtd"], seeds=[1], root="DATA")
    _, student = plan("base_to_new", choice._replace(teachers=["PromptSRC"]), tmp_path)
    (zero_shot,) = plan("base_to_new", choice._replace(teachers=["ZeroshotCLIP2"]), tmp_path)
    node = resolve(student.arguments)[0].TEACHER
    assert node.RUN == str(student.teacher.absolute()) and not (node.TRAINER or node.BACKBONE or node.OPTS)
    node = resolve(zero_shot.arguments)[0].TEACHER
    assert (node.TRAINER, node.BACKBONE) == ("ZeroshotCLIP2", "open_clip:ViT-H-14-quickgelu/dfn5b")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"methd": "CoOp"}, r"unknown key in teacher of .*'methd': did you mean 'method"),
        ({"backbone": "RN50"}, r"teacher: expected a key 'method', got backbone"),
        ({"method": "CoOp", "set": 3}, r"teacher: set: expected configuration keys and values, got 3"),
        ({"method": "CoOpp"}, r"unknown trainer 'CoOpp'"),
    ],
)
def test_a_teacher_that_is_none_is_refused(bench: Bench, teacher: dict, message: str) -> None:
    bench.write(methods=["CoOp_KDPL"], teacher=teacher)
    with pytest.raises(InputError, match=message):
        bench.plan()


# ---- the sweep -----------------------------------------------------------------------------------------------------------


def test_teachers_are_run_and_their_students_know_them_by_their_weights(bench: Bench) -> None:
    jobs = bench.plan(seeds=[1])
    assert sweep.sweep(jobs, quiet) == []
    teacher, student = jobs
    taught = read_result(student.folder)["teacher"]
    assert taught["trainer"] == "CoOp" and taught["classnames"] == helpers.CLASSNAMES[:3]
    assert all(sweep.finished(job) for job in jobs)
    said: list[str] = []
    assert sweep.sweep(jobs, said.append) == [] and said == ["2 of 2 runs are there already"]
    # the same weights in another run of the teacher: nothing is done again; other weights: the student is
    file = teacher.folder / "prompt_learner/model.pth.tar-2"
    content = torch.load(file, weights_only=True)
    content["state_dict"]["ctx"] *= 1.5
    torch.save(content, file)
    assert sweep.finished(teacher) and not sweep.finished(student)
    assert sweep.sweep(jobs, quiet) == []
    assert read_result(student.folder)["teacher"]["sha256"] != taught["sha256"]
    shutil.rmtree(teacher.folder)
    assert not sweep.finished(student)


def test_a_failed_teacher_fails_its_students_in_one_line_and_no_other(bench: Bench) -> None:
    bench.write(methods=["ZeroshotCLIP", "CoOp_KDPL"], teacher={"method": "CoOp", "set": {"TRAINER.COOP.N_CTX": 90}})
    jobs = bench.plan(seeds=[1])
    failed = sweep.sweep(jobs, quiet)
    assert names([outcome.job for outcome in failed]) == ["CoOp 1", "CoOp_KDPL 1"]
    line = failed[1].error
    assert line.startswith("its teacher failed (small: tiny, 2 shots, CoOp, seed 1: ") and "\n" not in line
    assert sweep.finished(jobs[0])
    assert json.loads((jobs[-1].folder / "failed.json").read_text())["error"] == line


def test_a_table_names_who_taught_where_students_differ_in_it(bench: Bench) -> None:
    jobs = bench.plan(seeds=[1, 2], teachers=["CoOp", "ZeroshotCLIP"])
    assert sweep.sweep(jobs, quiet) == []
    text = bench.tables()["markdown"]
    rows = [line for line in text.splitlines() if "| CoOp_KDPL" in line]
    assert len(rows) == 2 and "teacher=ZeroshotCLIP" in rows[1]  # two seeds, with weights of their own, are one row


def test_students_of_targets_are_one_row_which_says_what_they_saw(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "small", DatasetEntry("helpers.engine:read_tiny", short="small", paper="Small"))
    monkeypatch.setitem(DATASETS, "other", DatasetEntry("helpers.engine:read_tiny", short="other", paper="Other"))
    opts = {"TRAINER.PROMPTKD.PROMPT_DEPTH_VISION": 1, "TRAINER.PROMPTKD.PREC": "fp32"}
    targets = {"table": "targets", "targets": ["small", "other"], "set": opts, "test": "source", "tests": {}}
    bench.write(methods=["PromptKD"], teacher={"method": "CoOp"}, each="target", **targets)
    jobs = bench.plan(seeds=[1, 2])
    assert sweep.sweep(jobs, quiet) == [] and len(jobs) == 6
    assert all(sweep.finished(job) for job in jobs)
    text = bench.tables()["markdown"]
    assert "| data set | method | source | Other | Small | average | seeds | reference |" in text
    (row,) = [line for line in text.splitlines() if "| PromptKD (transductive)" in line]
    assert row.split(" | ")[2].strip() == "" and all("±" in cell for cell in row.split(" | ")[3:6]) and " | 2 | " in row
    assert "trained on images and the names of the data sets that they are tested on, without labels" in text
    assert "is there twice" not in text and "different pictures" not in text
    assert cli.main(["report", str(bench.output)]) == 0
