"""What the tests of the command line share: a finished run, a good command line, and how a bad one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from plpp_reg.commands import cli
from plpp_reg.data import DATASETS, DatasetEntry

from helpers import engine as helpers


def make_world(world: Path) -> Path:
    """Pictures, a backbone, a recipe, and a finished run of CoOp in ``done``."""
    helpers.make_images(world / "data")
    helpers.write_backbone(world / "tiny.pt")
    helpers.write_recipe(world / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
        assert cli.main(line(world, world / "done")) == 0
    return world


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
