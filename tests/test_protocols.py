"""Protocols expand to runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from plpp_reg.commands.cli import main
from plpp_reg.data import DATASETS, DatasetEntry
from plpp_reg.engine import config
from plpp_reg.engine.run import resolve
from plpp_reg.errors import InputError
from plpp_reg.experiments import jobs, protocols
from plpp_reg.experiments.jobs import DECIDED, Choice, Job, plan

from helpers.bench import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    return Bench(tmp_path)


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
    """The papers' recipes, as far as it depends on data set and shots."""
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
        *(
            ({"opts": [key, "1"]}, f"--set: expected no {key}, which is each run's own: {by} decides")
            for key, by in DECIDED.items()
        ),
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
        ({"seeds": 1}, "seeds: expected a list of integers, got 1"),
        ({"seeds": [1.5]}, "seeds: expected a list of integers"),
        ({"seeds": [True]}, "seeds: expected a list of integers"),
        ({"shots": [10**400]}, "shots: expected a list of integers, got .10000.*…"),
        ({"shots": [2**40]}, "--shots: expected integers >= 1 of 32 bits"),
        ({"methods": [5]}, "methods: expected a list of text, got .5."),
        ({"methods": {"CoOp": 1}}, "methods: expected a list of text"),
        ({"vary": 3}, "vary: expected configuration keys, each with a list of values, got 3"),
        ({"vary": {"TRAINER.PLPP.TOP_K": 3}}, "vary: expected configuration keys, each with a list of values"),
        ({"recipe": ["{x}"]}, "recipe: expected no fields but .dataset. and .shots., got '{x}'"),
        ({"recipe": ["{dataset.__class__}"]}, "recipe: expected no fields"),
        ({"recipe": ["{"]}, "recipe: expected no fields"),
        ({"recipe": [["a"]]}, "recipe: expected a list of text"),
        ({"where": [3]}, "where: expected a list of keys and values"),
        ({"where": [{"recipe": ["{x}"]}]}, "recipe: expected no fields"),
        ({"where": [{"set": {"OPTIM.LR": {"x": 1}}}]}, "where: set: expected configuration keys and values"),
        ({"variants": {"..": {}}}, "variants: expected names that a folder can have, got '..'"),
        ({"variants": {"": {}}}, "variants: expected names that a folder can have, got ''"),
        ({"variants": {3: {}}}, "variants: expected names with"),
        ({"variants": ["a"]}, "variants: expected names with"),
        ({"tests": {"new": None}}, "tests: expected names with"),
        ({"set": {"OPTIM.LR": float("nan")}}, "set: expected configuration keys and values"),
        ({"set": {"OPTIM.LR": 10**400}}, "set: expected configuration keys and values"),
        ({"table": ["halves"]}, "table: expected text"),
        ({"backbone": 3}, "backbone: expected text"),
        ({"table": "halfs"}, "'halfs': did you mean 'halves'"),
        ({"where": [{"method": ["CoOp"]}]}, "'method': did you mean 'methods'"),
        ({"where": [{"recipe": "base2new"}]}, "recipe: expected a list of text, got 'base2new'"),
        ({"test": "accuracy"}, "expected tests base and new for a table of halves"),
        ({"set": {"SEED": 5}}, "protocol .*: expected no SEED, which is each run's own: --seeds decides it"),
        ({"where": [{"set": {"RESUME": "a"}}]}, "expected no RESUME"),
        ({"variants": {"a": {"DATASET.NAME": "dtd"}}}, "expected no DATASET.NAME"),
        ({"vary": {"OUTPUT_DIR": ["a"]}}, "expected no OUTPUT_DIR"),
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


@pytest.mark.parametrize("name", ["Choice", "Job", "plan"])
def test_a_name_that_stood_here_in_version_0_2_is_found_and_says_where_it_went(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"protocols\.{name} is in plpp_reg\.experiments\.jobs"):
        assert getattr(protocols, name) is getattr(jobs, name)
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        _ = protocols.plam


def test_dry_run_prints_the_plan_and_does_nothing(bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert main(bench.argv("--dry-run", "--seeds", "3", "--methods", "CoOp")) == 0
    out = capsys.readouterr().out
    assert "small: tiny, 2 shots, CoOp, seed 3: to run, in" in out and out.endswith("\n1 run\n")
    assert not bench.output.exists()
