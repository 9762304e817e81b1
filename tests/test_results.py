"""Figures of several runs, against scipy and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from plpp_reg.results import numbers
from plpp_reg.results import record as results

PAIRS = [
    ([71.1, 72.9, 70.4], [70.9, 72.1, 70.8]),
    ([80.0, 80.0], [79.0, 78.0]),
    (list(np.random.default_rng(0).normal(70, 3, 10)), list(np.random.default_rng(1).normal(70, 3, 10))),
]


@pytest.mark.parametrize("values", [a for pair in PAIRS for a in pair], ids=len)
def test_summary_is_the_mean_and_the_sample_deviation(values: list[float]) -> None:
    mean, std, n = results.summary(values)
    assert n == len(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-12)
    assert std == pytest.approx(np.std(values, ddof=1), rel=1e-12)  # ddof 0 would be 18% less for three seeds


def test_summary_of_one_value_has_no_spread() -> None:
    mean, std, n = results.summary([71.25])
    assert (mean, n) == (71.25, 1) and math.isnan(std)
    assert str(results.summary([71.25])) == "71.2" and "nan" not in str(results.summary([71.25]))


def test_nothing_is_rounded_before_it_is_averaged() -> None:
    assert results.summary([0.04, 0.04, 0.04]).mean == pytest.approx(0.04)
    assert str(results.summary([71.04, 71.04, 71.06])) == "71.0 ± 0.0"
    assert str(results.summary([70.0, 72.0])) == "71.0 ± 1.4"


@pytest.mark.parametrize(("treated", "control"), PAIRS, ids=["three", "two", "ten"])
def test_paired_interval_is_scipys(treated: list[float], control: list[float]) -> None:
    ours = results.paired(treated, control)
    interval = stats.ttest_rel(treated, control).confidence_interval(0.95)
    assert ours.mean - ours.half_width == pytest.approx(interval.low, rel=1e-9)
    assert ours.mean + ours.half_width == pytest.approx(interval.high, rel=1e-9)
    assert ours.standard_error == pytest.approx(stats.sem(np.subtract(treated, control)), rel=1e-9)
    assert ours.n == len(treated)
    reverse = results.paired(control, treated)
    assert reverse.mean == -ours.mean and reverse.half_width == ours.half_width


def test_paired_is_by_value_and_refuses_unequal_lengths() -> None:
    # The same shift in each pair: no spread, whatever the spread between the seeds.
    assert results.paired([1.0, 11.0, 21.0], [0.0, 10.0, 20.0]) == (1.0, 0.0, 0.0, 3)
    with pytest.raises(ValueError):
        results.paired([1.0, 2.0], [1.0])
    one = results.paired([2.0], [1.5])
    assert one.mean == 0.5 and math.isnan(one.half_width) and str(one) == "+0.5"


@pytest.mark.parametrize(
    ("base", "new", "expected"), [(80.0, 60.0, 9600 / 140), (50.0, 50.0, 50.0), (0.0, 90.0, 0.0), (0.0, 0.0, 0.0)]
)
def test_harmonic_mean(base: float, new: float, expected: float) -> None:
    assert results.harmonic_mean(base, new) == pytest.approx(expected)
    assert results.harmonic_mean(new, base) == results.harmonic_mean(base, new)
    if base and new:
        assert results.harmonic_mean(base, new) == pytest.approx(stats.hmean([base, new]))


def test_a_result_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    metrics = {"accuracy": 100 / 3, "macro_f1": 0.1 + 0.2}
    result = {"metrics": metrics, "seed": 0, "trainer": "CoOp", "config": {"SEED": 0}, "files_sha256": "0"}
    path = results.write_result(tmp_path, result)
    assert path == tmp_path / "result.json"
    assert results.read_result(tmp_path) == result == json.loads(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    whole = {"seed": 1, "trainer": "CoOp", "metrics": {}, "config": {"SEED": 1}, "files_sha256": "0"}
    results.write_result(tmp_path, whole)
    with pytest.raises(TypeError):
        results.write_result(tmp_path, {"seed": object()})
    assert results.read_result(tmp_path) == whole


def test_versions_name_what_the_figures_depend_on() -> None:
    import PIL
    import torch

    found = results.versions()
    assert {"python", "plpp-reg", "torch", "torchvision", "pillow", "numpy", "openai-clip"} <= found.keys()
    assert torch.__version__.startswith(found["torch"]) and found["pillow"] == PIL.__version__


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (3.21, "3.2 s"), (9.97, "10 s"), (89.6, "90 s"), (90, "1.5 min"), (4500, "75 min"), (43_200, "12 h")],
)
def test_seconds_as_a_person_reads_them(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text
