"""Protocols expand to runs; a sweep skips what matches, goes on past failures, resumes what was killed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from plpp_reg import protocols, sweep, tables
from plpp_reg.cli import main
from plpp_reg.datasets import DATASETS, DatasetEntry
from plpp_reg.engine import config
from plpp_reg.engine.files import locked
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.run import run as run_once
from plpp_reg.errors import InputError
from plpp_reg.protocols import Choice, Job, plan
from plpp_reg.results import read_result
from plpp_reg.trainers.coop import CoOp

import engine_helpers as helpers

PROTOCOL = {
    "table": "halves",
    "methods": ["ZeroshotCLIP", "CoOp", "CoOp_PLPP"],
    "datasets": ["tiny"],
    "seeds": [1, 2],
    "shots": [2],
    "set": {"DATASET.SUBSAMPLE_CLASSES": "base"},
    "test": "base",
    "tests": {"new": {"DATASET.SUBSAMPLE_CLASSES": "new"}},
}


class Bench:
    """A small protocol of one's own, on the tiny data set and a tiny model."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.images = helpers.make_images(place / "images")
        self.backbone = helpers.write_backbone(place / "tiny.pt")
        self.recipe = helpers.write_recipe(place / "recipe.yaml")
        self.output = place / "out"
        self.protocol = place / "small.yaml"
        self.write()

    def write(self, **changes: object) -> None:
        content = {**PROTOCOL, "recipe": [str(self.recipe)], **changes}
        self.protocol.write_text(yaml.safe_dump(content))

    def choice(self, **changes: object) -> Choice:
        return Choice(root=str(self.images), backbone=str(self.backbone))._replace(**changes)

    def plan(self, **changes: object) -> list[Job]:
        return plan(str(self.protocol), self.choice(**changes), self.output)

    def argv(self, *more: str) -> list[str]:
        flags = ["--root", str(self.images), "--backbone", str(self.backbone), "--output", str(self.output)]
        return ["run", str(self.protocol), *flags, *more]

    def tables(self, output: Path | None = None) -> dict[str, str]:
        return {form: tables.write_tables(output or self.output, form) for form in tables.WRITERS}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("engine_helpers:read_tiny"))
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench whose sweep has run; tests work on copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("engine_helpers:read_tiny"))
        made = Bench(tmp_path_factory.mktemp("bench"))
        assert sweep.sweep(made.plan(), say=quiet) == []
        yield made


@pytest.fixture
def copy(done: Bench, bench: Bench) -> Bench:
    """The finished sweep, to be spoilt. Its data and model are those of ``done``: their paths are part of a run's settings."""
    shutil.copytree(done.output, bench.output)
    bench.images, bench.backbone, bench.recipe = done.images, done.backbone, done.recipe
    bench.write()
    return bench


def quiet(line: str) -> None:
    pass


def executed(jobs: Sequence[Job]) -> list[str]:
    """Run what is left; which jobs that was."""
    seen: list[str] = []

    def runner(left: Sequence[Job]) -> Iterator[sweep.Outcome]:
        seen.extend(job.label for job in left)
        return sweep.one_after_another(left)

    assert sweep.sweep(jobs, say=quiet, runner=runner) == []
    return seen


# ---- plans -------------------------------------------------------------------------------------------------------------


def test_the_papers_protocols_expand(tmp_path: Path) -> None:
    choice = Choice(methods=["CoOp", "CoOp_PLPP"], datasets=["caltech101", "dtd"], seeds=[1, 2, 3], root="DATA")
    jobs = plan("base_to_new", choice, tmp_path)
    assert len(jobs) == 12 and len({job.folder for job in jobs}) == 12 and not list(tmp_path.iterdir())
    for job in jobs:
        cfg, _ = resolve(job.arguments)
        assert cfg.MODEL.BACKBONE.NAME == "ViT-B/16" and cfg.DATASET.NUM_SHOTS == 16 and cfg.DATASET.ROOT == "DATA"
        assert cfg.DATASET.SUBSAMPLE_CLASSES == "base" and cfg.INPUT.SIZE == (224, 224)
        assert job.tests == {"new": ("DATASET.SUBSAMPLE_CLASSES", "new")}
        assert cfg.TRAINER.PLPP.ENABLED == (job.note["method"] == "CoOp_PLPP")
    assert {(j.note["dataset"], j.note["method"], j.note["seed"]) for j in jobs} == {
        (d, m, s) for d in ("caltech101", "dtd") for m in ("CoOp", "CoOp_PLPP") for s in (1, 2, 3)
    }


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (
            "cross_dataset",
            "caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101",
        ),
        ("domain_generalization", "imagenetv2 imagenet_sketch imagenet_a imagenet_r"),
    ],
)
def test_one_training_is_tested_on_each_target(name: str, targets: str, tmp_path: Path) -> None:
    jobs = plan(name, Choice(methods=["CoOp"], root="DATA"), tmp_path)
    assert [job.note["seed"] for job in jobs] == [1, 2, 3]
    assert list(jobs[0].tests) == targets.split()
    cfg, _ = resolve(jobs[0].arguments)
    assert (cfg.DATASET.NAME, cfg.DATASET.SUBSAMPLE_CLASSES) == ("ImageNet", "all")


def epochs(jobs: Sequence[Job]) -> dict[tuple[str, int], int]:
    return {(j.note["dataset"], j.note["shots"]): resolve(j.arguments)[0].OPTIM.MAX_EPOCH for j in jobs}


def test_recipes_follow_method_data_set_and_shots(tmp_path: Path) -> None:
    """DESIGN's table of the papers' recipes, as far as it depends on data set and shots."""
    papers = {"root": "DATA", "seeds": [1]}
    for method in ("CoOp", "CoOp_PLPP"):
        found = epochs(plan("few_shot", Choice(methods=[method], datasets=["dtd", "imagenet"], **papers), tmp_path))
        assert {shots: found["dtd", shots] for shots in (1, 2, 4, 8, 16)} == {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}
        assert {found["imagenet", shots] for shots in (1, 2, 4, 8, 16)} == {50}
    found = epochs(plan("base_to_new", Choice(methods=["ProGrad"], datasets=["dtd", "imagenet"], **papers), tmp_path))
    assert found == {("dtd", 16): 100, ("imagenet", 16): 50}
    jobs = plan("few_shot", Choice(methods=["PromptSRC"], datasets=["dtd", "food101"], shots=[4], **papers), tmp_path)
    assert [resolve(job.arguments)[0].TRAINER.PROMPTSRC.GPA_MEAN for job in jobs] == [45.0, 30.0]


@pytest.mark.parametrize("name", protocols.protocol_names())
def test_every_shipped_protocol_has_an_embedded_form(name: str, tmp_path: Path) -> None:
    jobs = plan(name, Choice(), tmp_path)
    for job in jobs:
        cfg, _ = resolve(job.arguments)
        assert cfg.MODEL.BACKBONE.NAME == "embedded" and cfg.DATASET.NAME.startswith("emoji")
    assert {job.note["seed"] for job in jobs if job.note["method"] == "CoOp"} == {1, 2, 3}


def test_the_four_protocols_are_shipped() -> None:
    assert {"few_shot", "base_to_new", "cross_dataset", "domain_generalization", "ablation"} <= set(protocols.protocol_names())


def test_an_ablation_changes_one_choice_at_a_time_of_plpp_alone(tmp_path: Path) -> None:
    jobs = [job for job in plan("ablation", Choice(seeds=[1]), tmp_path)]
    plain = [job for job in jobs if job.note["method"] == "CoOp"]
    assert len(plain) == 1 and plain[0].note["variant"] == ""
    default, _ = resolve(next(j for j in jobs if j.note["method"] == "CoOp_PLPP" and not j.note["variant"]).arguments)
    changed_keys = set()
    for job in jobs:
        if job.note["variant"]:
            changes = config.differences(config.flat(default), config.flat(resolve(job.arguments)[0]))
            assert 1 <= len(changes) <= (2 if job.note["variant"] in ("LABEL=hard", "TOP_K=1") else 1), changes
            changed_keys |= {change.split(":")[0].removeprefix("TRAINER.PLPP.") for change in changes}
    assert changed_keys == {"WEIGHT", "INVERSE_WEIGHT", "TOP_K", "TEMPERATURE", "LABEL", "NORMALIZE_OVER", "DETACH_LABEL"}


def test_what_learns_nothing_runs_once(tmp_path: Path) -> None:
    jobs = plan("few_shot", Choice(methods=["ZeroshotCLIP", "CoOp"]), tmp_path)
    assert [job.label for job in jobs if job.note["method"] == "ZeroshotCLIP"] == [
        "few_shot: emoji, 1 shot, ZeroshotCLIP, seed 1"
    ]
    assert len(jobs) == 1 + 5 * 3


def test_rules_change_some_runs_alone(bench: Bench) -> None:
    rule = {"methods": ["CoOp"], "shots": [4], "set": {"OPTIM.MAX_EPOCH": 7}}
    bench.write(where=[rule], shots=[2, 4], methods=["CoOp", "CoOp_PLPP"], seeds=[1])
    epochs = {(j.note["shots"], j.note["method"]): resolve(j.arguments)[0].OPTIM.MAX_EPOCH for j in bench.plan()}
    assert epochs == {(2, "CoOp"): 2, (4, "CoOp"): 7, (2, "CoOp_PLPP"): 2, (4, "CoOp_PLPP"): 7}  # X_PLPP has X's recipe
    last = bench.plan(opts=["OPTIM.MAX_EPOCH", "3"])
    assert {resolve(j.arguments)[0].OPTIM.MAX_EPOCH for j in last} == {3}  # the command line has the last word


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["Coop"]}, "unknown trainer 'Coop': did you mean 'CoOp'"),
        ({"datasets": ["tinny"]}, "unknown data set 'tinny'"),
        ({"seeds": [1, 1]}, "--seeds: expected each once"),
        ({"shots": [0]}, "--shots: expected integers >= 1"),
        ({"recipe": "few_shot_17"}, r"expected a recipe 'few_shot_17' in configs/trainers/.*there: .*few_shot_16"),
        ({"opts": ["OPTIM.LRR", "1"]}, "OPTIM.LRR"),
    ],
)
def test_a_bad_choice_is_one_line(changes: dict, message: str, bench: Bench) -> None:
    with pytest.raises(InputError, match=message):
        bench.plan(**changes)
    assert not bench.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "key in protocol .* 'colour'"),
        ({"seeds": 1}, "seeds: expected sequence"),
        ({"table": "halfs"}, "'halfs': did you mean 'halves'"),
        ({"where": [{"method": ["CoOp"]}]}, "'method': did you mean 'methods'"),
        ({"where": [{"recipe": "base2new"}]}, "recipe: expected a list, got 'base2new'"),
        ({"test": "accuracy"}, "expected tests base and new for a table of halves"),
    ],
)
def test_a_bad_protocol_is_one_line(changes: dict, message: str, bench: Bench) -> None:
    bench.write(**changes)
    with pytest.raises(InputError, match=message):
        bench.plan()
    with pytest.raises(InputError, match="unknown protocol 'base2new': did you mean 'base_to_new'"):
        plan("base2new", Choice(), bench.output)
    with pytest.raises(InputError, match="no part 'embedded'"):
        bench.write()
        plan(str(bench.protocol), Choice(), bench.output)


def test_dry_run_prints_the_plan_and_does_nothing(bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert main(bench.argv("--dry-run", "--seeds", "3", "--methods", "CoOp")) == 0
    out = capsys.readouterr().out
    assert "small: tiny, 2 shots, CoOp, seed 3: to run, in" in out and out.endswith("\n1 run\n")
    assert not bench.output.exists()


def test_dry_run_says_what_is_there_and_needs_no_data(
    copy: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (copy.output / "small/tiny/shots2/CoOp/seed2/result.json").unlink()

    def states(*more: str) -> list[str]:
        assert main(copy.argv("--dry-run", "--methods", "CoOp", "CoOp_PLPP", "--seeds", "1", "2", "4", *more)) == 0
        return [line.split(": ", 2)[2].partition(", in ")[0] for line in capsys.readouterr().out.splitlines()[:-1]]

    assert states() == ["there already", "to go on with", "to run"] + ["there already"] * 2 + ["to run"]
    anew = "to run anew (other settings or files there go below superseded/)"
    assert states("--set", "OPTIM.LR", "0.01") == [anew, anew, "to run"] * 2
    before = {path: path.stat().st_mtime_ns for path in copy.output.rglob("*")}
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("test_protocols:read_gone"))
    said = states()
    assert [line.partition(" (")[0] for line in said] == [
        "there already if its files are the same; data not there to compare", "to go on with", "to run",
        *["there already if its files are the same; data not there to compare"] * 2, "to run",
    ]  # fmt: skip
    assert "tiny: expected its folder" in said[0]
    assert {path: path.stat().st_mtime_ns for path in copy.output.rglob("*")} == before


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_a_further_test_is_what_evaluating_the_model_gives(done: Bench) -> None:
    job = next(j for j in done.plan() if j.note["method"] == "CoOp_PLPP")
    result = read_result(job.folder)
    opts = (*job.arguments.opts, *job.tests["new"])
    again = job.arguments._replace(eval_only=True, model_dir=str(job.folder), output_dir=str(done.place / "again"), opts=opts)
    alone, trainer = run_once(again)
    assert result["tests"]["new"]["metrics"] == alone["metrics"]
    assert result["tests"]["new"]["files_sha256"] == alone["files_sha256"] != result["files_sha256"]
    assert trainer.data.classnames == helpers.CLASSNAMES[3:]


def test_a_run_does_not_depend_on_those_before_it(done: Bench, bench: Bench) -> None:
    bench.images, bench.backbone, bench.recipe = done.images, done.backbone, done.recipe
    bench.write()
    job = next(j for j in bench.plan() if j.note["method"] == "CoOp_PLPP" and j.note["seed"] == 2)
    alone = sweep.execute(job).result
    among = read_result(done.output / job.folder.relative_to(bench.output))
    different = {"seconds", "config"}
    assert {k: v for k, v in alone.items() if k not in different} == {k: v for k, v in among.items() if k not in different}


def test_a_runs_few_shot_list_is_kept_and_its_hash_recorded(done: Bench) -> None:
    import hashlib

    for job in done.plan():
        kept = (job.folder / "few_shot.json").read_bytes()
        assert hashlib.sha256(kept).hexdigest() == read_result(job.folder)["few_shot_sha256"]
        assert len(json.loads(kept)["train"]) == 2 * 3


def test_a_finished_sweep_runs_nothing(copy: Bench) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.output.rglob("*") if p.is_file()}
    assert executed(copy.plan()) == []
    assert {p: p.stat().st_mtime_ns for p in copy.output.rglob("*") if p.is_file()} == before


def test_only_what_does_not_match_is_run_again(copy: Bench) -> None:
    jobs = copy.plan()
    (jobs[1].folder / "result.json").write_text("{")  # cut short
    note = json.loads((jobs[2].folder / "result.json").read_text())
    note["files_sha256"] = "0" * 64  # other images
    (jobs[2].folder / "result.json").write_text(json.dumps(note))
    assert executed(jobs) == [jobs[1].label, jobs[2].label]
    assert executed(jobs) == []


def test_other_settings_are_run_anew_and_the_old_result_set_aside(copy: Bench) -> None:
    before = read_result(copy.plan()[1].folder)
    jobs = copy.plan(opts=["OPTIM.LR", "0.01"], methods=["CoOp"], seeds=[1])
    text = tables.write_tables(copy.output, "markdown")
    sweep.sweep(jobs, say=quiet, runner=lambda left: iter(()))  # planned, and killed before it began
    assert tables.write_tables(copy.output, "markdown") != text
    assert "CoOp, seed 1: not run yet with these settings" in tables.write_tables(copy.output, "markdown")
    assert executed(jobs) == [jobs[0].label]
    assert read_result(jobs[0].folder)["config"]["OPTIM.LR"] == 0.01
    (old,) = (copy.output / "superseded").rglob("result.json")
    assert json.loads(old.read_text()) == before
    assert "Missing" not in tables.write_tables(copy.output, "markdown")


def test_a_sweep_says_once_what_it_sets_aside_and_reads_data_once_for_all(copy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = copy.plan(methods=["CoOp"])
    for job in jobs:
        changed = json.loads((job.folder / "result.json").read_text()) | {"files_sha256": "0" * 64}  # of other images
        (job.folder / "result.json").write_text(json.dumps(changed))
    reads: list[int] = []
    load = sweep.load_data
    monkeypatch.setattr(sweep, "load_data", lambda cfg: reads.append(cfg.SEED) or load(cfg))
    said: list[str] = []
    seen: list[list[int]] = []

    def runner(left: Sequence[Job]) -> Iterator[sweep.Outcome]:
        seen.append(list(reads))
        return sweep.one_after_another(left)

    assert sweep.sweep(jobs, say=said.append, runner=runner) == []
    assert seen == [[1, 2]] and reads == [1, 2, 1, 2]  # each once to see what is left, each once where it runs
    aside = [line for line in said if "it is now" in line]
    assert [line.partition(": the run that was there had")[0] for line in aside] == [job.label for job in jobs]
    assert all((Path(line.partition("it is now ")[2]) / "result.json").is_file() for line in aside)


def test_another_image_list_is_run_anew(copy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("test_protocols:read_other"))
    jobs = copy.plan(methods=["CoOp"], seeds=[1])
    assert executed(jobs) == [jobs[0].label]
    unfinished = jobs[0].folder / "result.json"
    unfinished.unlink()
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("engine_helpers:read_tiny"))
    assert executed(jobs) == [jobs[0].label]  # a checkpoint of other images is not gone on from
    assert executed(jobs) == []


def read_gone(root: str | Path):
    raise InputError("tiny: expected its folder, it is gone")


def read_other(root: str | Path):
    data = helpers.read_tiny(root)
    return type(data)(data.train[::-1], data.val, data.test, data.classnames)


def test_a_failed_run_is_passed_named_and_mended(bench: Bench, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    losses = CoOp.compute_losses

    def broken(self, batch):
        if self.cfg.SEED == 1 and self.epoch == 1:
            raise RuntimeError("out of memory, say")
        return losses(self, batch)

    monkeypatch.setattr(CoOp, "compute_losses", broken)
    assert main(bench.argv("--methods", "CoOp")) == 1
    out = capsys.readouterr().out
    assert "[2/2] small: tiny, 2 shots, CoOp, seed 2: base " in out  # it went on
    end = out[out.index("FAILED small: tiny, 2 shots, CoOp, seed 1: RuntimeError: out of memory, say") :]
    assert "| epoch [1/2]" in end and "in broken" in end  # the last log lines, and where it was
    assert "- small: tiny, 2 shots, CoOp, seed 1: failed: RuntimeError: out of memory, say" in bench.tables()["markdown"]
    monkeypatch.setattr(CoOp, "compute_losses", losses)
    assert main(bench.argv("--methods", "CoOp")) == 0
    out = capsys.readouterr().out
    assert "1 of 2 runs are there already" in out and "[1/1]" in out
    assert "Missing" not in bench.tables()["markdown"] and not list(bench.output.rglob("failed.json"))


def test_a_folder_that_another_process_works_in_is_left_alone(copy: Bench) -> None:
    job = copy.plan(opts=["OPTIM.LR", "0.01"])[1]
    before = helpers.files_below(job.folder)
    with locked(job.folder):
        outcome = sweep.execute(job)
        sweep.failure(job, RuntimeError("its worker died"), 1.0)  # which this process hears of later than the other one
    assert outcome.result is None and "another process is working in it" in outcome.error
    assert {*helpers.files_below(job.folder), ".lock"} == {*before, ".lock"}  # no failed.json: a running run has not failed
    assert not (copy.output / "superseded").exists()


def test_setting_aside_can_be_killed_anywhere(copy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = copy.plan(opts=["OPTIM.LR", "0.01"], methods=["CoOp"], seeds=[1])
    replace, moved = os.replace, []

    def killed(source, target):
        if sweep.SUPERSEDED in str(target):
            moved.append(Path(source).name)
            if len(moved) % 2 == 0:
                raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for _ in range(20):
        try:
            assert sweep.sweep(jobs, say=quiet) == []
            break
        except KeyboardInterrupt:
            continue
    assert len(moved) > 5
    monkeypatch.setattr(os, "replace", replace)
    mended = read_result(jobs[0].folder)
    fresh = jobs[0]._replace(
        folder=copy.place / "fresh", arguments=jobs[0].arguments._replace(output_dir=str(copy.place / "fresh"))
    )
    assert mended["metrics"] == sweep.execute(fresh).result["metrics"]
    assert mended["losses"] == read_result(fresh.folder)["losses"]


def sweep_killed_at(jobs: list[Job], event: int) -> None:
    """A sweep that dies, nothing tidied up, before or after the ``event``-th file of it gets its name, or at a step."""
    replace, compute_losses, seen = os.replace, CoOp.compute_losses, itertools.count(1)

    def count() -> None:
        if next(seen) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(*args):
        count()
        replace(*args)
        count()

    def counted_losses(*args):
        count()
        return compute_losses(*args)

    os.replace, CoOp.compute_losses = counted_replace, counted_losses
    sweep.sweep(jobs, say=quiet)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, so that a killed sweep starts again without importing torch")
def test_killed_at_random_moments_the_tables_are_the_same_to_the_byte(done: Bench, bench: Bench) -> None:
    bench.images, bench.backbone, bench.recipe = done.images, done.backbone, done.recipe
    bench.write()
    jobs, rng, kills = bench.plan(), random.Random(5), 0
    fork = multiprocessing.get_context("fork")
    while True:
        event = rng.randint(1, 25) if kills < 12 else 0
        child = fork.Process(target=sweep_killed_at, args=(jobs, event))
        child.start()
        child.join(60)
        if child.exitcode != -signal.SIGKILL:
            break
        kills += 1
    assert child.exitcode == 0 and kills >= 5
    assert bench.tables() == done.tables()
    assert "Missing" not in bench.tables()["markdown"]


def test_jobs_can_be_handed_to_another_process(done: Bench) -> None:
    import pickle

    jobs = done.plan()
    assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert all(sweep.finished(job) for job in pickle.loads(pickle.dumps(jobs)))


def test_the_installed_protocols_are_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected readable YAML"):
        (tmp_path / "p.yaml").write_text("a: [")
        plan(str(tmp_path / "p.yaml"), Choice(root="x"), tmp_path)
    assert RunArguments().opts == ()
