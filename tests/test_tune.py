"""``plpp tune``: what it trains, what it concludes, the recipe that it writes, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from plpp_reg.commands import cli
from plpp_reg.engine.run import RunArguments
from plpp_reg.errors import InputError
from plpp_reg.experiments import tune as module
from plpp_reg.experiments.tune import Bench, tune
from plpp_reg.results.frontier import Point

from helpers.engine import make_images, quietly, register, tiny_clip, write_backbone, write_recipe

EPOCHS = 4


@pytest.fixture
def arguments(tmp_path: Path) -> RunArguments:
    register()
    recipe = write_recipe(tmp_path / "own.yaml", OPTIM__MAX_EPOCH=EPOCHS, INPUT__VIEWS=2, DATASET__NUM_SHOTS=3)
    return RunArguments(
        trainer="CoOp",
        root=str(make_images(tmp_path / "data")),
        config_file=str(recipe),
        backbone=str(write_backbone(tmp_path / "clip.pt")),
        output_dir=str(tmp_path / "out"),
    )


def flags_of(arguments: RunArguments) -> list[str]:
    given = {name: value for name, value in arguments._asdict().items() if isinstance(value, str) and value}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_it_writes_a_recipe_that_train_takes(arguments: RunArguments, tmp_path: Path, capsys) -> None:
    words = ["tune", *flags_of(arguments), "--weights", "0.3", "3", "--top-k", "20", "--seeds", "2", "3"]
    assert cli.main([*words, "TRAINER.PLPP.STATES", "own"]) == 0
    printed = capsys.readouterr().out
    assert "Seeds 1 to 2 choose:" in printed and "Seeds 3 to 5 confirm:" in printed
    folder = Path(arguments.output_dir)
    points = json.loads((folder / "tune.json").read_text())["points"]
    stops = ["stopped after 1 of 4 epochs", "stopped after 2 of 4 epochs", "stopped after 3 of 4 epochs"]
    stops.append("all 4 epochs")
    settings = [*stops, "PLPP, k 20, inverse weight 0.3", "PLPP, k 20, inverse weight 3"]
    assert [p["setting"] for p in points[:6]] == settings
    assert [p["setting"] for p in points[6:10]] == stops and points[10]["setting"] in settings[4:]
    assert [p["seeds"] for p in points[5:7]] == [[1, 2], [3, 4, 5]]
    # the recipe is complete: the same run as the user's own recipe with what was found on top
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert "DATASET" not in recipe and "SEED" not in recipe
    result = quietly(
        arguments._replace(
            config_file=str(folder / "recipe.yaml"),
            output_dir=str(tmp_path / "run"),
            opts=("DATASET.NAME", "tiny", "DATASET.NUM_SHOTS", "3"),
        )
    )
    config = result["config"]
    changed = next(p["changed"] for p in points if p["setting"] in recipe_comment(folder))
    for key, value in changed.items():
        assert config[key] == value, key
    assert config["OPTIM.LR"] == 0.05 and config["INPUT.VIEWS"] == 2


def recipe_comment(folder: Path) -> str:
    """The line of the recipe's head that says what it has: its setting, or where the control stopped."""
    head = [line for line in (folder / "recipe.yaml").read_text().splitlines() if line.startswith("#")]
    if "PLPP helps here" in head[-1]:
        return head[1].split(", against")[0]
    return head[-1]


def invented(base: dict[str, float], new: dict[str, float]):
    """A Bench.measure whose accuracies are looked up by a word of the setting's name."""

    def measure(self: Bench, setting: module.Setting, seeds) -> Point:
        word = next(w for w in base if w in setting.name)
        self.points.append({"setting": setting.name, "changed": dict(setting.changed), "seeds": list(seeds)})
        noise = [0.1 * (s % 3) for s in seeds]
        return Point(setting.strength, [base[word] + n for n in noise], [new[word] + n * setting.strength for n in noise])

    return measure


STOPS = {"after 1": 40.0, "after 2": 50.0, "after 3": 55.0, "all 4": 60.0}
NEW = {"after 1": 30.0, "after 2": 34.0, "after 3": 30.0, "all 4": 28.0}


@pytest.mark.parametrize(("new", "helps"), [(45.0, True), (31.0, False)])
def test_what_it_concludes(new: float, helps: bool, arguments: RunArguments, monkeypatch, tmp_path: Path) -> None:
    base = {**STOPS, "weight 0.3": 57.0, "weight 1": 50.0}
    monkeypatch.setattr(Bench, "measure", invented(base, {**NEW, "weight 0.3": new, "weight 1": new - 5}))
    lines: list[str] = []
    outcome = tune(arguments, (0.3, 1.0), (20,), (3, 4), tiny_clip(), lines.append)
    assert outcome.choice.name == "PLPP, k 20, inverse weight 0.3"
    assert outcome.control.name == "stopped after 2 of 4 epochs"  # H 40.5, and 38.8 after 3
    assert outcome.helps == helps
    assert outcome.taken == (outcome.choice if helps else outcome.control)
    # the mean noise is 0.1; the control's curve at a base of 57 is 30.3 - 0.4 * (30.3 - 28.4)
    assert outcome.gap.mean == pytest.approx(new + 0.03 - 29.54)
    recipe = yaml.safe_load((Path(arguments.output_dir) / "recipe.yaml").read_text())
    if helps:
        assert recipe["TRAINER"]["PLPP"] == {"ENABLED": True, "INVERSE_WEIGHT": 0.3, "TOP_K": 20, "WEIGHT": 0.0}
        assert recipe["OPTIM"]["MAX_EPOCH"] == EPOCHS
        assert any(line.startswith("PLPP helps here") for line in lines)
    else:
        assert "PLPP" not in recipe["TRAINER"]
        assert recipe["OPTIM"]["MAX_EPOCH"] == 2
        assert any(line.startswith("nothing beats stopping early here") for line in lines)


def test_a_setting_that_does_not_stay_finite_is_left_out(arguments: RunArguments, monkeypatch) -> None:
    whole = module.ParallelSeeds.train

    def train(self, after_epoch=None) -> None:
        if self.cfg.TRAINER.PLPP.ENABLED and self.cfg.TRAINER.PLPP.INVERSE_WEIGHT > 1:
            self.context.data.fill_(float("nan"))
        whole(self, after_epoch)

    monkeypatch.setattr(module.ParallelSeeds, "train", train)
    lines: list[str] = []
    outcome = tune(arguments, (0.3, 3.0), (20,), (2, 2), tiny_clip(), lines.append)
    assert any(line.startswith("PLPP, k 20, inverse weight 3: left out, the contexts of seeds [1, 2]") for line in lines)
    assert outcome.choice.name == "PLPP, k 20, inverse weight 0.3"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trainer", "MaPLe"], "MaPLe: expected a method that learns a shared context .*CoOp, KgCoOp, ProGrad"),
        (["--trainer", "CoCoOp_PLPP"], "CoCoOp: expected a method that learns a shared context"),
        (["--weights", "1", "1"], "--weights: expected different values, got 1.0 1.0"),
        (["--weights", "-1"], "TRAINER.PLPP: inverse_weight: expected a finite number >= 0"),
        (["--top-k", "60000"], "--top-k: expected at most the vocabulary's 49408 words, got 60000"),
        (["--seeds", "1", "4"], "--seeds: expected two numbers >= 2"),
        (["DATASET.SUBSAMPLE_CLASSES", "base"], "DATASET.SUBSAMPLE_CLASSES: expected all"),
        (["TRAINER.COOP.CSC", "True"], "TRAINER.COOP: expected a context that all classes share"),
    ],
)
def test_what_is_refused(words: list[str], says: str, arguments: RunArguments, capsys) -> None:
    assert cli.main(["tune", *flags_of(arguments), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert error.count("\n") == 1
    assert not (Path(arguments.output_dir) / "recipe.yaml").exists()


def test_too_few_classes_are_refused(arguments: RunArguments, monkeypatch) -> None:
    monkeypatch.setattr(module, "FEWEST_CLASSES", 6)
    with pytest.raises(InputError, match="data set 'tiny': expected at least 6 classes"):
        tune(arguments, clip_model=tiny_clip(), say=lambda line: None)
