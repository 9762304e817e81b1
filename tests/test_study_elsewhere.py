"""The study's further parts: other text towers, other methods and tests."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from plpp_reg.clip.load import load_clip
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.experiments.parallel_seeds import read_images

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import study_methods  # noqa: E402
import study_scale  # noqa: E402
from plpp_share import rescaled  # noqa: E402
from study import tables  # noqa: E402
from study.bench import Bench  # noqa: E402
from study.rows import Rows, between  # noqa: E402
from study.settings import FINE, PLAIN, Case, Setting  # noqa: E402

SHORT = Setting(PLAIN.family, PLAIN.strength, {"OPTIM.MAX_EPOCH": 4})


def gains(rows: Rows, case: Case, at_weight: dict[float, float], share: float) -> None:
    """Write plain CoOp with base and new of 40 of 100 for every seed, and each weight with that much more H."""
    for setting in (PLAIN, *study_scale.SETTINGS):
        value = 40 + (0 if setting is PLAIN else at_weight[setting.strength])
        quarter = {"base": [value] * len(FINE), "new": [value] * len(FINE), "perplexity": [9.0] * len(FINE)}
        of = {**case._asdict(), "split": "val", "seeds": list(FINE), "images": {"base": 100, "new": 100}, "share": share}
        rows.add({"name": setting.name, "strength": setting.strength, "quarters": [quarter] * 4, **of})


def test_coop_goes_the_same_way_in_a_rescaled_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, _ = resolve(RunArguments(trainer="CoOp", opts=("DATASET.NUM_SHOTS", "1")))
    images = read_images(few, load_clip(), [1, 2], "val")
    found = []
    for scale in (1.0, 2.0):
        bench = Bench(Rows(tmp_path / "rows.jsonl", f"times {scale}"), rescaled(load_clip(), scale), scale)
        monkeypatch.setattr(bench, "images", lambda split: images)
        bench.measure([SHORT], [Case(4, 1)], "val", [1, 2])
        found.append((bench.rows.rows[0]["quarters"][-1], bench.contexts[-1]))
    (plain, context), (larger, twice) = found
    assert (plain["base"], plain["new"]) == (larger["base"], larger["new"])
    assert (twice - 2 * context).norm() < 1e-4 * twice.norm()


def test_rows_of_one_tower_are_apart_from_another_s(tmp_path: Path) -> None:
    for name, gain in (("a", 1.0), ("b", 3.0)):
        gains(Rows(tmp_path / "rows.jsonl", name), study_scale.B, dict.fromkeys(study_scale.WEIGHTS, gain), 1.0)
    (first, *_), (second, *_) = (study_scale.curve(Rows(tmp_path / "rows.jsonl", n), study_scale.B, [0.1]) for n in "ab")
    assert first == pytest.approx([1.0] * len(FINE)) and second == pytest.approx([3.0] * len(FINE))


def test_the_rule_tells_a_weight_that_carries_over_from_a_share(tmp_path: Path) -> None:
    """Two towers whose best weights are 0.1 and 1: a share carries over where it is ten times as large on the first."""
    peaks = {"a": 0.1, "b": 1.0}
    rows = [Rows(tmp_path / "rows.jsonl", name) for name in peaks]
    for (_, peak), r in zip(peaks.items(), rows, strict=True):
        for case in study_scale.CASES:
            gains(r, case, {w: -abs(round(2 * math.log10(w / peak))) for w in study_scale.WEIGHTS}, 1 / peak)
    weight = study_scale.best_common(rows, study_scale.B, [1.0, 1.0])
    share = study_scale.best_common(rows, study_scale.B, [10.0, 1.0])
    assert share.value == pytest.approx(1.0, rel=0.15) and min(share.gains) > -0.2
    assert max(weight.gains) <= -0.99
    assert "a weight by share is offered" in study_scale.verdict(rows)
    wrong = study_scale.best_common(rows, study_scale.B, [1.0, 10.0])
    assert max(wrong.gains) < max(weight.gains)


def test_a_weight_between_two_is_on_a_line_over_its_logarithm(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl", "a")
    gains(rows, study_scale.B, dict(zip(study_scale.WEIGHTS, (0.0, 2.0, 4.0, 6.0, 8.0), strict=True)), 1.0)
    at = [0.03, 0.1, math.sqrt(0.1 * 0.3), 3.0]
    assert [seeds[0] for seeds in study_scale.curve(rows, study_scale.B, at)] == pytest.approx([0.0, 2.0, 3.0, 8.0])


def test_other_tests_are_paired_by_seed_and_averaged() -> None:
    def row(sweep: str, method: str, seed: int, source: float, *tests: float) -> dict:
        of = {"sweep": sweep, "protocol": "cross_dataset", "method": method}
        tests = {str(i): test for i, test in enumerate(tests)}
        return {**of, "seed": seed, "source": source, "tests": tests, "zero_shot": {"source": 44, "0": 50, "1": 51}}

    rows = [row("chosen", m, s, 50, 30, 40 + s) for m in ("CoOp", "KgCoOp") for s in (2, 1)]
    rows += [row(f"epochs {e}", "CoOp", s, 40 + e / 10, 30, 40 + s) for e in study_methods.EPOCHS for s in (1, 2)]
    rows += [row("chosen", "CoOp_PLPP", s, 49, 30 + s, 48) for s in (1, 2)]
    rows += [row("chosen", "KgCoOp_PLPP", s, 51, 30, 40 + s) for s in (1, 2)]
    text = study_methods.transfer(study_methods.Rows(rows), "cross_dataset")
    assert "| zero-shot | | 44.0 | 50.5 |" in text
    assert "| CoOp, 40 epochs | 2 | 50.0 | 35.8 |" in text  # means of 30, 41 and of 30, 42
    assert "| CoOp_PLPP | 2 | -1.0 ± 0.0 | +4.0 ± 0.0 |" in text  # 39.5 and 40.0 against 35.5 and 36.0
    assert "above the epochs' curve at equal source accuracy | 2 | | +4.0 ± 0.0 |" in text
    assert "| KgCoOp_PLPP | 2 | +1.0 ± 0.0 | +0.0 ± 0.0 |" in text


def test_a_part_of_a_page_is_put_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    for _ in range(2):
        between(page, "<!-- a -->", "<!-- end of a -->", "new")
    assert page.read_text() == "before\n<!-- a -->\n\nnew\n\n<!-- end of a -->\nafter\n"


def test_the_page_has_the_tables_that_the_rows_give(tmp_path: Path) -> None:
    page = tmp_path / "study.md"
    page.write_text((ROOT / "docs" / "study.md").read_text(encoding="utf-8"), encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    between(page, study_methods.START, study_methods.END, study_methods.page(results / "study-methods.jsonl"))
    between(page, study_scale.START, study_scale.END, study_scale.page(results / "study-scale.jsonl"))
    between(page, tables.START, tables.END, tables.tables(Rows(results / "study.jsonl")))
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "study.md").read_text(encoding="utf-8")


def test_a_finished_run_is_a_row(tmp_path: Path) -> None:
    record = {"metrics": {"accuracy": 60.0}, "evaluation": {"zero_shot": {"metrics": {"accuracy": 40.0}}}, "files_sha256": "0"}
    folder = tmp_path / "epochs10" / "cross_dataset" / "emoji_even" / "shots16" / "CoOp" / "seed3"
    folder.mkdir(parents=True)
    other = {"emoji_odd": {**record, "dataset": "emoji_odd", "subsample": "all"}}
    whole = {**record, "trainer": "CoOp", "seed": 3, "dataset": "emoji_even", "config": {"SEED": 3}, "tests": other}
    (folder / "result.json").write_text(json.dumps(whole))
    (row,) = study_methods.collect(tmp_path, ["chosen", "epochs 10"])
    assert (row["sweep"], row["protocol"], row["method"], row["seed"]) == ("epochs 10", "cross_dataset", "CoOp", 3)
    assert (row["source"], row["tests"], row["zero_shot"]) == (60.0, {"emoji_odd": 60.0}, {"source": 40.0, "emoji_odd": 40.0})
