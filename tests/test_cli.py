"""The command line as a user meets it: bad input is one line that names the nearest choice, status 2, and no folder."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plpp_reg import cli
from plpp_reg.datasets import DATASETS, DatasetEntry
from plpp_reg.engine import config
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError
from plpp_reg.trainers.coop import CoOp

import engine_helpers as helpers


class OwnTrainer(CoOp):
    """A trainer of a user's own, with keys of its own."""

    config_node = "OWN"
    config_defaults = {**CoOp.config_defaults, "PREC": "fp32", "FACTOR": 1.0}

    def compute_losses(self, batch):
        return {"own": self.method_cfg.FACTOR * super().compute_losses(batch)["ce"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a backbone, a recipe, and a finished run of CoOp in ``done``."""
    world = tmp_path_factory.mktemp("world")
    helpers.make_images(world / "data")
    helpers.write_backbone(world / "tiny.pt")
    helpers.write_recipe(world / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("engine_helpers:read_tiny"))
        assert cli.main(line(world, world / "done")) == 0
    return world


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("engine_helpers:read_tiny"))
    monkeypatch.chdir(tmp_path)  # where the default output folder would appear


def line(world: Path, out: Path | str | None, *more: str, trainer: str = "CoOp") -> list[str]:
    """A good command line; ``more`` comes last, so a flag in it overrides."""
    flags = ["--trainer", trainer] if trainer else []
    flags += ["--root", str(world / "data"), "--config-file", str(world / "recipe.yaml"), "--backbone", str(world / "tiny.pt")]
    return ["train", *flags, *(["--output-dir", str(out)] if out else []), *more]


def refused(argv: list[str], capsys: pytest.CaptureFixture, tmp_path: Path, names: str) -> str:
    """Run it; one line, status 2, ``names`` in the line, nothing new on the disk. Returns the line."""
    before = helpers.files_below(tmp_path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("plpp: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert "Traceback" not in error and "\x1b" not in error
    assert names in error, error
    assert helpers.files_below(tmp_path) == before
    return error


# Flags, as they follow a good command line, and what the message has to name.
BAD_FLAGS = [
    (["--trainer", "Coop"], "'CoOp'"),
    (["--trainer", "CoOp_PLP"], "'CoOp_PLPP'"),
    (["--trainer", "zeroshotclip"], "'ZeroshotCLIP'"),
    (["--trainer", "ZeroshotCLIP_PLPP"], "use ZeroshotCLIP"),
    (["--trainer", "nosuchmodule:Trainer"], "package.module:Class"),
    (["--trainer", "json:Nope"], "package.module:Class"),
    (["--trainer", "os:path"], "os:path"),  # not a class
    (["--trainer", "json:JSONDecoder"], "json:JSONDecoder"),  # not a trainer
    (["--trainer", ":CoOp"], ":CoOp"),
    (["--trainer", ".coop:CoOp"], ".coop:CoOp"),
    (["--seed", "one"], "'one'"),
    (["--seed", "1.5"], "'1.5'"),
    (["--seed"], "--seed"),
    (["--seed", str(2**70)], "SEED"),
    (["--sed", "3"], "'--seed'"),
    (["--output_dir", "x"], "'--output-dir'"),
    (["--eval"], "'--eval-only'"),
    (["-x"], "-x"),
    (["--backbone", "ViT-B16"], "'ViT-B/16'"),
    (["--backbone", "embeded"], "'embedded'"),
    (["--backbone", "."], "backbone"),
    (["--config-file", "absent.yaml"], "absent.yaml"),
    (["--config-file", "."], "config file '.'"),
    (["--dataset-config-file", "absent.yaml"], "absent.yaml"),
    (["--load-epoch", "last"], "'last'"),
    (["--resume", "absent"], "absent"),
    (["--transforms", "random_flp"], "'random_flip'"),
    (["--output-dir", "/proc/nowhere/run"], "/proc/nowhere/run"),
    (["--eval-only", "--model-dir", "absent"], "absent"),
    (["--eval-only", "--model-dir", "."], "prompt_learner"),
    (["--eval-only", "--load-epoch", "2"], "--model-dir"),  # of which run?
    (["--model-dir", "absent"], "--eval-only"),  # else it would train and nobody would see it
    (["OPTIM.LR"], "'OPTIM.LR'"),
    (["OPTIM.LR", "0.1", "OPTIM.GAMMA"], "'OPTIM.GAMMA'"),
    (["OPTIM.LR", "0.1", "--seed", "3"], "before the KEY VALUE pairs"),
    (["OPTIM.LR", "0.1", "--sed", "3"], "'--seed'"),
    (["OPTIM.LR=0.1"], "OPTIM.LR=0.1"),
]


@pytest.mark.parametrize(("more", "names"), BAD_FLAGS, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_bad_flags(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], names: str) -> None:
    refused(line(world, "out", *more), capsys, tmp_path, names)


BAD_VALUES = [
    ("OPTIM.LRR", "1", "'OPTIM.LR'"),
    ("TRAINER.PLPP.TOPK", "3", "'TRAINER.PLPP.TOP_K'"),
    ("LR", "1", "OPTIM.LR"),
    ("OPTIM", "1", "OPTIM"),
    ("optim.lr", "1", "'OPTIM.LR'"),
    ("OPTIM.LR.X", "1", "'OPTIM.LR'"),
    ("OPTIM.LR", "fast", "a number"),
    ("OPTIM.LR", "", "a number"),
    ("OPTIM.LR", "-1", "> 0"),
    ("OPTIM.LR", "0", "> 0"),
    ("OPTIM.LR", "1e999", "OPTIM.LR"),
    ("OPTIM.LR", "{[]: 1}", "a number"),
    ("OPTIM.MAX_EPOCH", "0", ">= 1"),
    ("OPTIM.MAX_EPOCH", "2.0", "an integer"),
    ("OPTIM.MAX_EPOCH", "True", "an integer"),
    ("OPTIM.NAME", "sdg", "'sgd'"),
    ("OPTIM.LR_SCHEDULER", "cos", "'cosine'"),
    ("OPTIM.WARMUP_TYPE", "const", "'constant'"),
    ("OPTIM.MOMENTUM", "-1", "MOMENTUM"),
    ("OPTIM.WEIGHT_DECAY", "-1", "WEIGHT_DECAY"),
    ("OPTIM.WARMUP_CONS_LR", "-1", "WARMUP_CONS_LR"),
    ("DATALOADER.TRAIN_X.BATCH_SIZE", "0", "BATCH_SIZE"),
    ("DATALOADER.TEST.BATCH_SIZE", "0", "BATCH_SIZE"),
    ("DATALOADER.NUM_WORKERS", "-1", "NUM_WORKERS"),
    ("DATASET.NAME", "tinny", "'tiny'"),
    ("DATASET.SUBSAMPLE_CLASSES", "bases", "'base'"),
    ("DATASET.NUM_SHOTS", "many", "an integer"),
    ("INPUT.SIZE", "32", "a list"),
    ("INPUT.SIZE", "(48, 48)", "(32, 32)"),
    ("INPUT.SIZE", "(32,)", "(32, 32)"),
    ("INPUT.INTERPOLATION", "cubic", "'bicubic'"),
    ("INPUT.TRANSFORMS", "random_flip", "a list"),
    ("INPUT.TRANSFORMS", "['random_flp']", "'random_flip'"),
    ("INPUT.TRANSFORMS", "[1]", "INPUT.TRANSFORMS"),
    ("INPUT.TRANSFORMS", "['random_flip']", "'normalize'"),
    ("DATALOADER.TRAIN_X.SAMPLER", "RandomClassSampler", "RandomSampler"),
    ("INPUT.PIXEL_MEAN", "['a', 'b', 'c']", "PIXEL_MEAN"),
    ("INPUT.PIXEL_MEAN", "[0.5, 0.5]", "PIXEL_MEAN"),
    ("INPUT.PIXEL_STD", "[0, 0, 0]", "PIXEL_STD"),
    ("INPUT.RRCROP_SCALE", "(0.5,)", "RRCROP_SCALE"),
    ("INPUT.RRCROP_SCALE", "(2, 1)", "RRCROP_SCALE"),
    ("TRAINER.COOP.N_CTX", "0", ">= 1"),
    ("TRAINER.COOP.N_CTX", "80", "at most 77 tokens"),
    ("TRAINER.COOP.N_CTX", "10000000000", "77"),  # before it takes all memory
    ("TRAINER.COOP.CTX_INIT", "a " * 90, "at most 77 tokens"),
    ("TRAINER.COOP.CSC", "yes", "True or False"),
    ("TRAINER.COOP.CSC", "1", "True or False"),
    ("TRAINER.COOP.CLASS_TOKEN_POSITION", "ned", "'end'"),
    ("TRAINER.COOP.PREC", "fp8", "fp32"),
    ("TRAINER.PLPP.ENABLED", "1", "True or False"),
    ("TRAINER.PLPP.TOP_K", "0", "top_k"),
    ("TRAINER.PLPP.TOP_K", "50000", "49408"),
    ("TRAINER.PLPP.TEMPERATURE", "0", "temperature"),
    ("TRAINER.PLPP.WEIGHT", "-0.1", "weight"),
    ("TRAINER.PLPP.LABEL", "sof", "'soft'"),
    ("TRAINER.PLPP.NORMALIZE_OVER", "top", "'topk'"),
    ("TEST.SPLIT", "tets", "'test'"),
    ("TEST.FINAL_MODEL", "best", "'best_val'"),
    ("TRAIN.PRINT_FREQ", "0", ">= 1"),
    ("MODEL.INIT_WEIGHTS", "absent.pth", "absent.pth"),
    ("MODEL.BACKBONE.NAME", "ViT-B16", "'ViT-B/16'"),
    ("SEED", "x", "an integer"),
    ("USE_CUDA", "1", "True or False"),
]


@pytest.mark.parametrize(("key", "value", "names"), BAD_VALUES, ids=lambda v: v[:40])
def test_bad_keys_and_values(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, key: str, value: str, names: str
) -> None:
    argv = line(world, "out", key, value, trainer="CoOp_PLPP")
    if key == "MODEL.BACKBONE.NAME":
        argv[argv.index("--backbone") + 1] = ""
    refused(argv, capsys, tmp_path, names)


# Values that are only read together with another.
@pytest.mark.parametrize(
    ("opts", "names"),
    [
        (["OPTIM.SGD_NESTEROV", "True", "OPTIM.MOMENTUM", "0"], "NESTEROV"),
        (["OPTIM.NAME", "adam", "OPTIM.ADAM_BETA1", "2"], "ADAM_BETA1"),
        (["OPTIM.LR_SCHEDULER", "single_step", "OPTIM.STEPSIZE", "()"], "STEPSIZE"),
        (["OPTIM.LR_SCHEDULER", "multi_step", "OPTIM.STEPSIZE", "('a',)"], "STEPSIZE"),
        (["INPUT.TRANSFORMS", "['colorjitter', 'normalize']", "INPUT.COLORJITTER_H", "9"], "COLORJITTER"),
        (["TRAINER.PLPP.LABEL", "hard", "TRAINER.PLPP.NORMALIZE_OVER", "topk"], "normalize_over"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_values_that_do_not_go_together(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, opts: list[str], names: str
) -> None:
    refused(line(world, "out", *opts, trainer="CoOp_PLPP"), capsys, tmp_path, names)


BAD_FILES = [
    ("OPTIM:\n  LRR: 1\n", "'OPTIM.LR'"),
    ("OPTIM:\n  LR: fast\n", "a number"),
    ("OPTIM:\n  LR:\n", "got None"),
    ("OPTIM: 3\n", "OPTIM"),
    ("OPTIM: {}\n", "OPTIM"),
    ("- 1\n- 2\n", "keys and values"),
    ("just words\n", "keys and values"),
    ("a: [1\n", "expected YAML"),
    ("a:\tb\n  c: d\n", "expected YAML"),
    ("1: 2\n", "'1'"),
    ("? [1, 2]\n: 3\n", "expected YAML"),
    ("!!python/object/apply:os.mkdir ['owned']\n", "expected YAML"),
    ("a: &a\n  b: *a\n", "bad.yaml"),  # refers to itself
    (b"\xff\xfe\x00\x80", "bad.yaml"),
    (b"\x00\x01\x02", "bad.yaml"),
]


@pytest.mark.parametrize(("content", "names"), BAD_FILES, ids=lambda v: repr(v)[:40])
@pytest.mark.parametrize("flag", ["--config-file", "--dataset-config-file"])
def test_bad_configuration_files(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flag: str, content: str | bytes, names: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    error = refused(line(world, "out", flag, str(path)), capsys, tmp_path, names)
    assert str(path) in error


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04", b"\x80\x04."], ids=repr)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_backbone_file_that_is_none(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    refused(line(world, "out", "--backbone", str(path)), capsys, tmp_path, str(path))


def test_an_output_folder_that_is_a_file(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/below"):
        refused(line(world, out), capsys, tmp_path, out)
    assert (tmp_path / "taken").read_text() == "mine"


def test_load_epoch_that_is_not_there_names_the_nearest(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = line(world, "out", "--eval-only", "--model-dir", str(world / "done"), "--load-epoch", "50")
    refused(argv, capsys, tmp_path, "nearest there is 2")


def test_prompts_of_another_shape_or_for_a_method_without_prompts(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    done = ["--eval-only", "--model-dir", str(world / "done")]
    refused(line(world, "out", *done, "TRAINER.COOP.N_CTX", "5"), capsys, tmp_path, "(5, 64)")
    refused(line(world, "out", *done, trainer="ZeroshotCLIP"), capsys, tmp_path, "ZeroshotCLIP")


@pytest.mark.parametrize(("argv", "names"), [(["trian"], "train"), (["--version", "--sed"], ""), (["--sed", "3"], "plpp")])
def test_bad_commands(tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], names: str) -> None:
    if argv[0] == "--version":
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0 and metadata.version("plpp-reg") in capsys.readouterr().out
    else:
        refused(argv, capsys, tmp_path, names)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(config.flat(config.get_cfg_default()))),
    st.text(max_size=12)
    | st.sampled_from(
        ["{[]: 1}", "None", "1e999", "-0", "()", "[[]]", "'", "1j", "b'x'", "{1}", "...", "1_0", "0x1", "\x00", "9" * 5000]
    ),
)
def test_any_text_for_any_key_is_taken_or_refused(key: str, text: str) -> None:
    cfg = config.get_cfg_default()
    before = config.flat(cfg)[key]
    try:
        config.set_value(cfg, key, text)
    except InputError as e:
        assert key in str(e) and config.flat(cfg)[key] == before
    else:
        assert type(config.flat(cfg)[key]) is type(before)
        yaml.safe_load(config.to_yaml(cfg))


def test_resolution_order_is_defaults_files_flags_pairs(world: Path, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("DATASET: {NAME: tiny, NUM_SHOTS: 1}\nOPTIM: {LR: 0.5, GAMMA: 0.5}\nSEED: 5\n")
    (tmp_path / "m.yaml").write_text("OPTIM: {LR: 0.25}\nSEED: 6\nDATASET: {ROOT: m}\n")

    def resolved(**more):
        return resolve(RunArguments("CoOp", dataset_config_file="d.yaml", config_file="m.yaml", **more))[0]

    cfg = resolved()
    assert (cfg.OPTIM.GAMMA, cfg.OPTIM.LR, cfg.SEED, cfg.DATASET.ROOT, cfg.DATASET.NUM_SHOTS) == (0.5, 0.25, 6, "m", 1)
    cfg = resolved(seed=7, root="f", opts=("SEED", "8", "OPTIM.LR", "1"))
    assert (cfg.SEED, cfg.DATASET.ROOT, cfg.OPTIM.LR) == (8, "f", 1.0)
    assert type(cfg.OPTIM.LR) is float
    assert resolved(seed=0).SEED == 0


def test_a_resolved_configuration_reads_back_as_itself(world: Path) -> None:
    saved = world / "done" / "config.yaml"
    cfg = config.get_cfg_default()
    config.merge_file(cfg, saved)
    assert config.flat(cfg) == config.from_yaml(saved)
    assert not config.differences(config.from_yaml(saved), json.loads((world / "done" / "result.json").read_text())["config"])


# ---- what the flags do ---------------------------------------------------------------------------------------------------


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def context_of(folder: Path) -> torch.Tensor:
    return torch.load(folder / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"]["ctx"]


def test_seed_zero_is_a_seed(world: Path, tmp_path: Path) -> None:
    for name in ("zero", "again"):
        assert cli.main(line(world, tmp_path / name, "--seed", "0")) == 0
    assert result_of(tmp_path / "zero")["seed"] == 0
    assert result_of(tmp_path / "zero")["config"]["SEED"] == 0
    assert torch.equal(context_of(tmp_path / "zero"), context_of(tmp_path / "again"))
    assert result_of(world / "done")["seed"] == 1  # the default
    assert not torch.equal(context_of(tmp_path / "zero"), context_of(world / "done"))


def test_seed_minus_one_draws_one_and_records_it(world: Path, tmp_path: Path) -> None:
    assert cli.main(line(world, tmp_path / "drawn", "--seed", "-1")) == 0
    seed = result_of(tmp_path / "drawn")["seed"]
    assert seed >= 0 and result_of(tmp_path / "drawn")["config"]["SEED"] == seed
    assert cli.main(line(world, tmp_path / "again", "--seed", str(seed))) == 0
    assert torch.equal(context_of(tmp_path / "drawn"), context_of(tmp_path / "again"))


def test_a_run_draws_nothing_from_what_came_before_in_any_stream(world: Path, tmp_path: Path) -> None:
    # A trainer of one's own may use any of the three; Dassl's set_random_seed seeds them all.
    import random

    import numpy as np

    streams = []
    for name in ("a", "b"):
        random.seed(name), np.random.seed(len(streams)), torch.manual_seed(len(streams))
        assert cli.main(line(world, tmp_path / name)) == 0
        content = torch.load(tmp_path / name / "prompt_learner" / "model.pth.tar-2", weights_only=True)
        streams.append(content["plpp_reg"]["streams"])
    helpers.assert_same(*streams)


@pytest.mark.parametrize("trainer", ["CoOp", "CoOp_PLPP", "ZeroshotCLIP"])
def test_eval_only_never_trains(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str) -> None:
    for name in ("step", "train", "train_epoch"):
        monkeypatch.setattr(PromptTrainer, name, lambda *args: pytest.fail("trained"))
    model = [] if trainer == "ZeroshotCLIP" else ["--model-dir", str(world / "done")]
    before = helpers.files_below(world / "done")
    assert cli.main(line(world, tmp_path / "out", "--eval-only", *model, trainer=trainer)) == 0
    assert not list(tmp_path.rglob("model*")) and not list(tmp_path.rglob("checkpoint"))
    if model:
        assert result_of(tmp_path / "out")["metrics"] == result_of(world / "done")["metrics"]
    assert helpers.files_below(world / "done") == before


def test_eval_only_without_prompts_says_what_it_evaluates(world: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(line(world, "out", "--eval-only")) == 0
    assert "as they are before training" in capsys.readouterr().out


def test_eval_only_never_takes_a_training_runs_record_away(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # An evaluation's record has no losses, and perhaps another split.
    done = ["--eval-only", "--model-dir", str(world / "done"), "TEST.SPLIT", "val"]
    before = result_of(world / "done")
    refused(line(world, world / "done", *done), capsys, world, "holds a training run")
    assert result_of(world / "done") == before
    # Without a folder named, an evaluation has its own beside the run's.
    assert cli.main(line(world, None)) == 0
    assert cli.main(line(world, None, *done)) == 0
    run_folder = tmp_path / "output" / "tiny" / "CoOp" / "seed1"
    assert result_of(run_folder)["losses"] and result_of(run_folder)["config"]["TEST.SPLIT"] == "test"
    assert result_of(run_folder / "eval")["config"]["TEST.SPLIT"] == "val"


def test_no_train_builds_and_stops(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("step", "train", "test"):
        monkeypatch.setattr(PromptTrainer, name, lambda *args: pytest.fail("not built only"))
    assert cli.main(line(world, tmp_path / "out", "--no-train")) == 0
    assert not list(tmp_path.rglob("model*")) and not list(tmp_path.rglob("result.json"))


def test_no_train_in_a_finished_runs_folder_leaves_its_result(world: Path, tmp_path: Path) -> None:
    assert cli.main(line(world, tmp_path / "out")) == 0
    before = result_of(tmp_path / "out")
    assert cli.main(line(world, tmp_path / "out", "--no-train")) == 0
    assert result_of(tmp_path / "out") == before


def test_the_test_split_and_no_test(world: Path, tmp_path: Path) -> None:
    assert cli.main(line(world, tmp_path / "val", "TEST.SPLIT", "val", "TEST.PER_CLASS_RESULT", "True")) == 0
    assert "Evaluate on the *val* set" in (tmp_path / "val" / "log.txt").read_text()
    assert "* class: 3 (zebra_crossing)\ttotal: 2" in (tmp_path / "val" / "log.txt").read_text()
    assert cli.main(line(world, tmp_path / "none", "TEST.NO_TEST", "True")) == 0
    assert result_of(tmp_path / "none")["metrics"] == {}
    assert torch.equal(context_of(tmp_path / "none"), context_of(tmp_path / "val"))


def test_confusion_matrix_is_written_where_it_is_asked_for(world: Path, tmp_path: Path) -> None:
    assert cli.main(line(world, tmp_path / "out", "TEST.COMPUTE_CMAT", "True")) == 0
    matrix = torch.load(tmp_path / "out" / "cmat.pt", weights_only=True)
    assert matrix.sum(1).tolist() == pytest.approx([1] * 5)  # shares of a class, as Dassl's; here each has three images
    assert 100 * matrix.diagonal().mean().item() == pytest.approx(result_of(tmp_path / "out")["metrics"]["accuracy"])


def test_the_default_output_folder_says_what_it_is(world: Path, tmp_path: Path) -> None:
    assert cli.main(line(world, None, "--seed", "3", "DATASET.SUBSAMPLE_CLASSES", "base", trainer="CoOp_PLPP")) == 0
    assert result_of(tmp_path / "output" / "tiny" / "base" / "CoOp_PLPP" / "seed3")["seed"] == 3


def test_a_trainer_of_ones_own_with_its_own_keys(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = "test_cli:OwnTrainer"
    assert cli.main(line(world, tmp_path / "out", "TRAINER.OWN.FACTOR", "2", "TRAINER.OWN.N_CTX", "3", trainer=own)) == 0
    assert "own" in result_of(tmp_path / "out")["losses"]
    assert cli.main(line(world, tmp_path / "plpp", trainer=own + "_PLPP")) == 0
    assert {"own", "ppl", "inverse_ppl"} <= result_of(tmp_path / "plpp")["losses"].keys()
    capsys.readouterr()
    refused(line(world, "no", "TRAINER.OWN.FACTR", "2", trainer=own), capsys, tmp_path, "'TRAINER.OWN.FACTOR'")


def test_a_diverging_run_ends_with_status_1_and_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original = CoOp.compute_losses
    monkeypatch.setattr(
        CoOp, "compute_losses", lambda self, batch: {"ce": original(self, batch)["ce"] * (float("nan") if self.epoch else 1)}
    )
    assert cli.main(line(world, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'ce'" in error and "model.pth.tar-1" in error
    assert (tmp_path / "out" / "prompt_learner" / "model.pth.tar-1").is_file()


def test_an_interrupted_run_says_how_to_go_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(PromptTrainer, "step", interrupt)
    assert cli.main(line(world, tmp_path / "out")) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_train_py_is_plpp_train(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = line(world, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["train.py", *argv[1:]])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(helpers.ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 0
    assert torch.equal(context_of(tmp_path / "out"), context_of(world / "done"))
    assert result_of(tmp_path / "out")["metrics"] == result_of(world / "done")["metrics"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--trainer", "Coop"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(helpers.ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 2


def test_the_command_plpp_is_this_program() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="plpp")
    assert script.load() is cli.main


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help(capsys: pytest.CaptureFixture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    words = ["train"] if len(argv) == 1 else ["--" + name.replace("_", "-") for name in RunArguments._fields if name != "opts"]
    assert all(word in shown for word in words)


def test_no_command_shows_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 0
    assert "usage: plpp" in capsys.readouterr().out


def test_how_threads_wait_is_said_before_torch_is_loaded() -> None:
    # Threads that spin make small tensors tens of times slower on a busy machine; torch reads the variable once.
    code = "import os, sys, plpp_reg.cli; sys.exit('torch' in sys.modules or os.environ['GOMP_SPINCOUNT'] != '2000')"
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("words", "seeds", "opts"),
    [
        (["demo", "--seeds", "1", "2", "OPTIM.LR", "0.1"], [1, 2], ["OPTIM.LR", "0.1"]),
        (["demo", "OPTIM.LR", "0.1"], [1, 2, 3], ["OPTIM.LR", "0.1"]),
        (
            ["demo", "--methods", "VPT", "SEED", "3", "TRAINER.VPT.PREC", "fp32"],
            [1, 2, 3],
            ["SEED", "3", "TRAINER.VPT.PREC", "fp32"],
        ),
    ],
)
def test_configuration_keys_end_the_values_of_a_flag(words: list[str], seeds: list[int], opts: list[str], monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(cli, "_demo", lambda args: seen.update(vars(args)))
    assert cli.main(words) == 0
    assert seen["seeds"] == seeds and seen["opts"] == opts
