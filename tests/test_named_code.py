"""No file names code: neither a run's config.yaml nor a protocol makes a module be imported; a user's flag does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from plpp_reg.commands import cli

OWN = """
from pathlib import Path

from plpp_reg.trainers.coop import CoOp

Path({trap!r}).write_text("imported")


class Zen(CoOp):
    pass
"""


@pytest.fixture
def own(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose config.yaml names a trainer of one's own; the path of what is written when that is imported."""
    trap = tmp_path / "trap"
    (tmp_path / "zen_of_mine.py").write_text(OWN.format(trap=str(trap)))
    shutil.copytree(world / "done", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("NAME: CoOp\n", "NAME: zen_of_mine:Zen\n"))
    assert "zen_of_mine" in config.read_text()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "zen_of_mine", raising=False)
    return trap


def commands(world: Path) -> dict[str, list[str]]:
    picture = next((world / "data").rglob("*.png"))
    return {
        "predict": ["predict", "run", str(picture)],
        "export": ["export", "run", "prompt.safetensors"],
        "inspect": ["inspect", "run"],
    }


@pytest.mark.parametrize("command", ["predict", "export", "inspect"])
def test_a_runs_configuration_is_no_reason_to_import(
    command: str, own: Path, world: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = commands(world)[command]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.yaml" in error and "--trainer zen_of_mine:Zen imports it" in error
    assert not own.exists() and "zen_of_mine" not in sys.modules
    assert cli.main([*argv, "--trainer", "another:Zen"]) == 2
    assert "expected the run's own, 'zen_of_mine:Zen'" in capsys.readouterr().err and not own.exists()
    assert cli.main([*argv, "--trainer", "zen_of_mine:Zen"]) == 0
    assert own.read_text() == "imported"
    own.unlink()
    assert cli.main(argv) == 0  # this process has it now: nothing is imported any more
    assert not own.exists()


PROTOCOL = """table: shots
methods: [zen_of_mine:Zen]
datasets: [emoji]
recipe: [embedded]
shots: [1]
"""


def test_a_protocol_is_no_reason_to_import(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.yaml").write_text(PROTOCOL + "embedded: {}\n")
    assert cli.main(["run", "mine.yaml", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mine.yaml" in error and "--methods zen_of_mine:Zen imports it" in error
    assert not own.exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("OPTIM:\n  MAX_EPOCH: 1\n")
    assert cli.main(["run", "mine.yaml", "--dry-run", "--methods", "zen_of_mine:Zen", "--recipe", str(recipe)]) == 0
    assert own.read_text() == "imported"


def test_tables_and_reports_import_nothing(own: Path) -> None:
    for command in (["table", "."], ["report", "."]):
        assert cli.main(command) in (0, 2)
        assert not own.exists()
