"""The examples run as they stand, are as short as they say, and the term does in them what it should."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from plpp_reg import data
from plpp_reg.data import load_dataset

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def quiet_random_stream():
    with torch.random.fork_rng(devices=[]):
        yield


def run(path: Path, capsys) -> tuple[dict, list[dict[str, float]]]:
    names = runpy.run_path(str(path), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    return names, [{k: float(v) for k, v in re.findall(r"(\w+) ([\d.]+)", line)} for line in lines]


def test_plain_pytorch(capsys, monkeypatch):
    path = EXAMPLES / "plain_pytorch.py"
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    assert not re.search(r"import.*\b(dassl|engine|attach)\b|plpp_reg\.(engine|dassl|trainers)", source)
    monkeypatch.setattr(data, "load_dataset", lambda name, shots: load_dataset(name, shots=shots // 8))  # fewer to encode
    _, log = run(path, capsys)
    assert log[-1]["perplexity"] < log[0]["perplexity"] / 10 and log[-1]["loss"] < log[0]["loss"]


def test_custom_trainer(capsys, tmp_path):
    path = EXAMPLES / "custom_trainer.py"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    marked = [line for line in lines if line.endswith("# PLPP\n")]
    assert 0 < len(marked) <= 5
    names, log = run(path, capsys)
    assert log[-1].keys() == {"step", "loss", "plpp", "perplexity"} and log[-1]["plpp"] < log[0]["plpp"]
    (tmp_path / "without.py").write_text("".join(line for line in lines if line not in marked))
    plain, without = run(tmp_path / "without.py", capsys)
    assert without[-1].keys() == {"step", "loss"} and without[0]["loss"] == log[0]["loss"]
    assert not torch.equal(plain["trainer"].model.ctx, names["trainer"].model.ctx)
