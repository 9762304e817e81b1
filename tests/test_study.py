"""The study of PLPP's defaults: rows that go on, pairs by seed, the rule."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import encode_texts
from plpp_reg.clip.text import TextTower
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.experiments.parallel_seeds import read_images

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from plpp_share import rescaled  # noqa: E402
from study.bench import Bench  # noqa: E402
from study.rows import Rows  # noqa: E402
from study.rule import best_control, chosen, curve_of, finalists, score  # noqa: E402
from study.settings import EPOCHS, FINE, PLAIN, PLPP, A, B, Case, plpp  # noqa: E402
from study.tables import table  # noqa: E402


def row(setting, case, split: str, seeds: list[int], base: list[int], new: list[int]) -> dict:
    """Of 100 images a half, the same after each quarter."""
    quarter = {"base": base, "new": new, "perplexity": [50.0] * len(seeds)}
    named = {"name": setting.name, "family": setting.family, "strength": setting.strength, "opts": setting.opts}
    of = {"trainer": setting.trainer, "schedule": setting.schedule, **case._asdict(), "split": split, "seeds": seeds}
    return {**named, **of, "images": {"base": 100, "new": 100}, "quarters": [quarter] * 4}


def written(path: Path, rows: list[dict]) -> Rows:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Rows(path)


def test_pairs_are_by_seed(tmp_path: Path) -> None:
    treated = PLPP[0]
    # out of order, in two rows, and one seed of the setting is still missing: it must not be paired with another
    rows = written(
        tmp_path / "rows.jsonl",
        [
            row(treated, A, "val", [2], [33], [10]),
            row(PLAIN, A, "val", [3, 1, 2], [99, 20, 31], [10, 10, 10]),
            row(treated, A, "val", [1], [24], [10]),
            row(treated, B, "val", [1, 2, 3], [90, 90, 90], [90, 90, 90]),
        ],
    )
    text = table(rows, A, "val")
    half = stats.t.ppf(0.975, 1) * 1.0  # differences 4 and 2: mean 3, standard error 1
    assert f"| {treated.name} | 2 | +3.0 ± {half:.1f} | +0.0 ± 0.0 |" in text
    assert "3 seeds: base 50.0 ± 42.8" in text
    assert "90" not in text


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch) -> None:
    rows = written(tmp_path / "rows.jsonl", [row(PLAIN, A, "val", [1, 3], [1, 2], [3, 4])])
    bench = object.__new__(Bench)
    bench.rows, ran = rows, []

    def run(setting, case, split, seeds):
        ran.append((setting.name, case, split, seeds))
        return row(setting, case, split, seeds, seeds, seeds)

    monkeypatch.setattr(bench, "run", run, raising=False)
    bench.measure([PLAIN], [A], "val", range(1, 5))
    bench.measure([PLAIN], [A], "val", range(1, 5))
    assert ran == [(PLAIN.name, A, "val", [2, 4])]
    again = Rows(rows.path)
    assert again.seeds(PLAIN.name, A, "val") == [1, 2, 3, 4]
    assert again.figures(PLAIN.name, A, "val", "base", [1, 2, 3, 4]) == [1, 2, 2, 4]


def test_the_rule_takes_the_best_score_and_of_close_ones_the_cheapest(tmp_path: Path) -> None:
    seeds = list(FINE)

    def even(setting, case, base: int, new: int) -> dict:
        return row(setting, case, "val", seeds, [base] * 20, [new] * 20)

    rows = []
    for case in (A, B):
        # H: 40 epochs 40.0, 20 epochs 45.0 (the control's best), the others less
        for setting, base, new in zip(EPOCHS, (30, 40, 45, 50, 60), (40, 42, 45, 37, 30), strict=True):
            rows.append(even(setting, case, base, new))
        rows += [even(setting, case, 40, 40) for setting in PLPP[3:]]  # H 40
    for case, (base, new) in ((A, (50, 50)), (B, (45, 45))):
        rows.append(even(PLPP[0], case, base, new))  # H 50 and 45: score 2.5
        rows.append(even(PLPP[1], case, base + 5, new - 4))  # about 50.3 and 45.0, less lost on base
        rows.append(even(PLPP[2], case, base + 9, new - 9))  # clearly less
    found = written(tmp_path / "rows.jsonl", rows)
    assert best_control(found, A, "val", seeds) == EPOCHS[2]
    assert score(found, PLPP[0], seeds) == pytest.approx(2.5)
    assert finalists(found)[0] in PLPP[:2]
    assert chosen(found) == PLPP[1]
    assert [s.strength for s in curve_of(PLPP[1])] == pytest.approx([0.1, 0.25, 0.5, 1.0])
    assert curve_of(PLPP[1])[0].opts["TRAINER.PLPP.INVERSE_WEIGHT"] == pytest.approx(0.1)


def test_one_setting_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, on the embedded model: what a row says can be run by ``plpp train``."""
    bench = Bench(Rows(tmp_path / "rows.jsonl"))
    few, _ = resolve(RunArguments(trainer="CoOp", opts=("DATASET.NUM_SHOTS", "1", "INPUT.VIEWS", "2")))
    monkeypatch.setattr(bench, "images", lambda split: read_images(few, bench.clip_model, [1, 2], split))  # not all of them
    short = plpp("inverse, k 50:", 0.5, 50)
    short.opts.update({"OPTIM.MAX_EPOCH": 4, "INPUT.VIEWS": 2})
    bench.measure([short], [Case(4, 1)], "val", [1, 2])
    (found,) = bench.rows.rows
    assert found["images"] == {"base": 134, "new": 124}
    assert len(found["quarters"]) == 4 and len(found["quarters"][-1]["base"]) == 2
    assert found["opts"]["TRAINER.PLPP.TOP_K"] == 50
    assert found["quarters"][0]["perplexity"] != found["quarters"][3]["perplexity"]


def test_a_rescaled_model_is_the_same_function() -> None:
    model = load_clip()
    larger = rescaled(model, 2.0)
    features = [normalize(encode_texts(TextTower(m), ["a photo of a cat.", "an old red clock"])) for m in (model, larger)]
    torch.testing.assert_close(*features, rtol=0, atol=1e-6)
    assert torch.equal(larger.token_embedding.weight, 2 * model.token_embedding.weight)
