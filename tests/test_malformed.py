"""A few malformed inputs of every kind, of the campaign's (tools/campaign/malformed.py); and that it sees what is wrong."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from plpp_reg.commands import cli

from helpers import engine as helpers

sys.path.insert(0, str(helpers.ROOT / "tools" / "campaign"))

resource = pytest.importorskip("resource", reason="POSIX limits")

import malformed  # noqa: E402
from inputs import KINDS, Case  # noqa: E402
from trial import Trial, Watch, elsewhere  # noqa: E402


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    root = tmp_path_factory.mktemp("campaign")
    with elsewhere(root):
        yield Trial(root, Watch())


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_inputs_are_refused_or_taken_honestly(kind: str, trial: Trial) -> None:
    found = malformed.campaign(trial, 6, 7, [kind], print)
    assert found["wrong"] == []
    assert sum(found["figures"][kind].values()) == 6


def test_what_is_wrong_is_seen(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "a traceback": lambda: (print("plpp: x\nTraceback (most recent call last)", file=sys.stderr), 2)[1],
        "not one line": lambda: (warnings.warn("x", stacklevel=1), print("plpp: x", file=sys.stderr), 2)[2],
        "a success that complains": lambda: (os.write(2, b"from C"), 0)[1],
        "starts a program": lambda: (os.system("true"), 0)[1],
        "changed victim/mine": lambda: (Path("../victim/mine").write_text("yours"), 0)[1],
        "changed world/dataset.yaml": lambda: (Path("dataset.yaml").unlink(), 0)[1],
        "refused, but changed world/out/x": lambda: (Path("out/x").write_text(""), print("plpp: x", file=sys.stderr), 2)[2],
        "raises ZeroDivisionError": lambda: 1 // 0,
        "status 1": lambda: 1,
    }
    assert trial.run(Case({}, ["cache"])).wrong == []
    for what, command in said.items():
        with monkeypatch.context() as patch:
            patch.setattr(cli, "main", lambda argv, command=command: command())
            wrong = trial.run(Case({}, ["cache"])).wrong
        assert any(line.startswith(what) for line in wrong), (what, wrong)
