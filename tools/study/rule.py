"""The rule, written before the confirmation was run:

1. Cases A (16 vectors, 16 shots) and B (16 vectors, 4 shots) choose, on the validation part. The control is CoOp trained for
   5, 10, 20, 30 or 40 epochs; its best point is the one with the largest mean H over the same seeds, in each case.
2. The score of a PLPP setting is the mean over A and B of its mean paired difference in H to the control's best point. All
   settings run on seeds 1 to 6; the best three of them on seeds 1 to 20, which give the final score.
3. The largest score is the choice; among settings within 0.2 of it, the one that loses least on base (mean of A and B).
4. The choice is run once on seeds 201 to 240 and the test part. It is confirmed if in A and in B two intervals (95%, paired)
   lie above 0: the gap in new accuracy to the epochs' curve at equal base accuracy, and the difference in H to the number of
   epochs that was best on validation.
5. If it is confirmed, it becomes CoOp's recipe with 16 vectors. It becomes the regularizer's own default only if with 4 vectors
   and 16 shots (case C) its H is not below plain CoOp's by more than the interval. If not, defaults stay.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from plpp_reg.results.frontier import difference
from plpp_reg.results.record import summary

from study.bench import Bench
from study.rows import Rows
from study.settings import COARSE, CONTROLS, EPOCHS, FAMILIES, FINE, FRESH, OTHERS, PLAIN, PLPP, A, B, C, Case, Setting

FINALISTS = 3
CLOSE = 0.2  # in the score


def best_control(rows: Rows, case: Case, split: str, seeds: Sequence[int]) -> Setting:
    """The number of epochs with the largest mean H."""
    return max(EPOCHS, key=lambda s: summary(rows.point(s, case, split, seeds).h).mean)


def score(rows: Rows, setting: Setting, seeds: Sequence[int]) -> float:
    """Mean over A and B of the mean difference in H to the control's best point, on the validation part."""
    gains = []
    for case in (A, B):
        control = rows.point(best_control(rows, case, "val", seeds), case, "val", seeds)
        gains.append(difference(rows.point(setting, case, "val", seeds), control).mean)
    return statistics.fmean(gains)


def finalists(rows: Rows) -> list[Setting]:
    return sorted(PLPP, key=lambda s: -score(rows, s, COARSE))[:FINALISTS]


def chosen(rows: Rows) -> Setting:
    """By the rule, of the finalists."""
    scores = {s.name: score(rows, s, FINE) for s in finalists(rows)}
    close = [s for s in finalists(rows) if scores[s.name] >= max(scores.values()) - CLOSE]
    return max(close, key=lambda s: sum(rows.point(s, case, "val", FINE).mean_base for case in (A, B)))


def curve_of(choice: Setting) -> list[Setting]:
    """The choice with its weight at other strengths."""
    weights = [choice.strength * factor for factor in (0.2, 0.5, 1, 2)]
    key = "TRAINER.PLPP.INVERSE_WEIGHT"
    return [Setting(choice.family, w, {**choice.opts, key: w}, choice.trainer, choice.schedule) for w in weights]


def validate(bench: Bench) -> None:
    bench.measure(EPOCHS, (A, B), "val", FINE)
    bench.measure(PLPP, (A, B), "val", COARSE)
    bench.measure(finalists(bench.rows), (A, B), "val", FINE)


def confirm(bench: Bench) -> None:
    """What the rule asks for first, so that a study that is stopped has it; curves and other controls on half of the seeds."""
    choice, half = chosen(bench.rows), FRESH[:20]
    weaker, weak, _, strong = curve_of(choice)
    for case in (A, B):
        bench.measure([PLAIN, choice, *EPOCHS[1:-1]], (case,), "test", FRESH)
    bench.measure([PLAIN, choice], (C,), "test", FRESH)
    for case in (A, B):
        bench.measure([strong, weak], (case,), "test", half)
    strongest = [max((s for s in CONTROLS if s.family == family), key=_strength) for family in FAMILIES]
    for settings in (strongest, CONTROLS, [weaker], EPOCHS[:1]):
        bench.measure(settings, (B, A), "test", half)
    bench.measure([PLAIN, choice, EPOCHS[2]], OTHERS, "test", half)


def _strength(setting: Setting) -> float:
    """How far a control's knob is turned; a small learning rate is a strong one."""
    return -setting.strength if setting.family == "learning rate" else setting.strength
