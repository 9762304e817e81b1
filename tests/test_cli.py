"""The command line as a user meets it: where a setting comes from, and what each flag does."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
from PIL import Image

from plpp_reg.commands import cli
from plpp_reg.engine import config
from plpp_reg.engine.method import precision, setting
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers.coop import CoOp

from helpers import engine as helpers
from helpers.cli import line, refused


class OwnTrainer(CoOp):
    """A trainer of a user's own, with keys of its own."""

    @dataclass(frozen=True)
    class Config(CoOp.Config, node="OWN"):
        prec: str = precision("fp32")
        factor: float = setting(1.0)

    def losses(self, batch, classes):
        return {"own": self.config.factor * super().losses(batch, classes)["ce"]}


pytestmark = pytest.mark.usefixtures("in_tmp_path")


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
        monkeypatch.setattr(Trainer, name, lambda *args: pytest.fail("trained"))
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
        monkeypatch.setattr(Trainer, name, lambda *args: pytest.fail("not built only"))
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
    header, *rows = csv.reader((tmp_path / "out" / "confusion.csv").open(encoding="utf-8"))
    assert header[1:] == [name for name, *_ in rows] == helpers.CLASSNAMES
    counts = torch.tensor([list(map(int, row[1:])) for row in rows])
    assert counts.sum(1).tolist() == [3] * 5
    assert 100 * counts.diagonal().sum().item() / 15 == pytest.approx(result_of(tmp_path / "out")["metrics"]["accuracy"])
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert picture.format == "PNG"


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
    original, left = CoOp.losses, iter(range(4))  # the steps of the first epoch

    def losses(*args):
        return {"ce": original(*args)["ce"] * (1 if next(left, None) is not None else float("nan"))}

    monkeypatch.setattr(CoOp, "losses", losses)
    assert cli.main(line(world, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'ce'" in error and "model.pth.tar-1" in error
    assert (tmp_path / "out" / "prompt_learner" / "model.pth.tar-1").is_file()


def test_an_interrupted_run_says_how_to_go_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupt)
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


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["estimate", "--sead", "1"], "unknown flag '--sead': did you mean '--seed'?"),
        (["estimate", "--model-dir", "x"], "unknown flag '--model-dir'"),  # train's alone
        (["train", "--classes", "5"], "unknown flag '--classes'"),  # estimate's alone
        (["train", "SEED", "1", "--seed", "1"], "flag '--seed': expected before the KEY VALUE pairs"),
        (["table", "x", "--no-publishing"], "unknown flag '--no-publishing': did you mean '--no-published'?"),
        (["table", "x", "--seed", "1"], "unknown flag '--seed'"),
        (["data", "check", "x", "--source", "hub"], "unknown flag '--source'"),  # get's alone
        (["data", "get", "x", "--sources", "hub"], "unknown flag '--sources': did you mean '--source'?"),
    ],
)
def test_a_flag_is_looked_for_among_the_commands_own(argv: list[str], says: str, capsys, tmp_path: Path) -> None:
    error = refused(argv, capsys, tmp_path, says)
    assert f"did you mean '{argv[-2]}'" not in error


def test_no_command_shows_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 0
    assert "usage: plpp" in capsys.readouterr().out


def test_how_threads_wait_is_said_before_torch_is_loaded() -> None:
    # Threads that spin make small tensors tens of times slower on a busy machine; torch reads the variable once.
    code = "import os, sys, plpp_reg.commands.cli; sys.exit('torch' in sys.modules or os.environ['GOMP_SPINCOUNT'] != '2000')"
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
    monkeypatch.setattr("plpp_reg.commands.demo.main", lambda args: seen.update(vars(args)))
    assert cli.main(words) == 0
    assert seen["seeds"] == seeds and seen["opts"] == opts
