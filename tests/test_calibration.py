"""plpp predict --calibrated: the temperature is the best one, probabilities are divided by it, and it is never another's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from plpp_reg.commands.cli import main
from plpp_reg.errors import InputError
from plpp_reg.prompts import calibration
from plpp_reg.prompts.calibration import fit_temperature

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world / "done", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(true: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(20_000, 6, generator=generator)
    label = torch.multinomial((logits / true).softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(logits, label)
    assert found == pytest.approx(true, rel=0.05)
    losses = [F.cross_entropy(logits.double() / t, label).item() for t in (0.99 * found, found, 1.01 * found)]
    assert losses[1] == min(losses)


def test_pictures_that_are_all_right_give_no_temperature() -> None:
    with pytest.raises(InputError, match="expected validation pictures of which some are wrong and some right"):
        fit_temperature(10 * torch.eye(4), torch.arange(4))


def predicted(run: Path, world: Path, capsys: pytest.CaptureFixture, *more: str) -> tuple[dict[str, dict[str, float]], str]:
    capsys.readouterr()
    assert main(["predict", str(run), str(world / "data" / "test" / "1"), "--json", *more]) == 0
    said = capsys.readouterr()
    return {row["image"]: row["probabilities"] for row in json.loads(said.out)}, said.err


def test_probabilities_are_those_of_divided_logits(run: Path, world: Path, capsys: pytest.CaptureFixture) -> None:
    plain, _ = predicted(run, world, capsys)
    scaled, said = predicted(run, world, capsys, "--calibrated")
    kept = json.loads((run / "calibration.json").read_text())
    temperature = kept["temperature"]
    assert f"temperature {temperature:.3f}, fitted on validation; calibration error on 10 validation pictures, " in said
    assert "; on 15 test pictures, " in said and said.count("\n") == 1
    for image, shares in plain.items():
        logits = {name: math.log(share) / temperature for name, share in shares.items()}
        total = sum(map(math.exp, logits.values()))
        assert scaled[image] == pytest.approx({name: math.exp(value) / total for name, value in logits.items()}, rel=1e-3)
    other, _ = predicted(run, world, capsys, "--calibrated", "--classes", "red", "blue")  # the same temperature for other names
    assert all(shares.keys() == {"red", "blue"} for shares in other.values())


def test_what_was_fitted_is_kept_as_long_as_nothing_changes(
    run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, said = predicted(run, world, capsys, "--calibrated")
    fitted = calibration._fitted
    monkeypatch.setattr(calibration, "_fitted", lambda *args: pytest.fail("fitted again"))
    assert predicted(run, world, capsys, "--calibrated") == (first, said)
    config = run / "config.yaml"  # on another machine, without the data
    text = config.read_text()
    config.write_text(text.replace(str(world / "data"), str(tmp_path / "not here")))
    assert predicted(run, world, capsys, "--calibrated") == (first, said)
    config.write_text(text)
    weights = run / "prompt_learner" / "model.pth.tar-2"
    content = torch.load(weights, weights_only=True)
    content["state_dict"]["ctx"] += 0.5
    torch.save(content, weights)
    calls = []
    monkeypatch.setattr(calibration, "_fitted", lambda *args: (calls.append(1), fitted(*args))[1])
    predicted(run, world, capsys, "--calibrated")
    assert calls == [1]  # of other weights it would be another prompt's
    (run / "calibration.json").write_text('{"of": {}, "temperature": "hot"}')
    predicted(run, world, capsys, "--calibrated")
    assert calls == [1, 1]


@pytest.mark.parametrize("lacks", ["data", "validation", "a run"])
def test_what_it_cannot_be_fitted_on_is_a_line(
    run: Path, world: Path, tmp_path: Path, lacks: str, capsys: pytest.CaptureFixture
) -> None:
    config, source, more = run / "config.yaml", str(run), []
    if lacks == "data":
        config.write_text(config.read_text().replace("NAME: tiny", "NAME: 'folder:gone'"))
    elif lacks == "validation":
        for part in ("train", "test"):
            shutil.copytree(world / "data" / part, tmp_path / "own" / part)
        for part in (tmp_path / "own").iterdir():
            for label, name in enumerate(["cat", "hot air balloon", "tea", "zebra crossing", "map"]):
                (part / str(label)).rename(part / name)
        config.write_text(config.read_text().replace("NAME: tiny", f"NAME: 'folder:{tmp_path / 'own'}'"))
        more = ["--classes", "cat", "tea"]
    else:
        source, more = str(run / "prompt_learner" / "model.pth.tar-2"), ["--backbone", str(world / "tiny.pt")]
        config.unlink()
        more += ["--classes", "cat", "tea"]
    capsys.readouterr()
    assert main(["predict", source, str(world / "data" / "test" / "1"), "--calibrated", *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("plpp: --calibrated: expected ") and said.count("\n") == 1, said
    assert not (run / "calibration.json").exists()
