"""Frontiers: the gap at equal base accuracy, by hand, by the bootstrap, and where there is none."""

from __future__ import annotations

import random
import statistics

import pytest

from plpp_reg.results.frontier import Point, difference, gap_at_equal_base


def drawn(rng: random.Random, strength: float, base: float, new: float, levels: list[float]) -> Point:
    """Noise of a seed's own, which all points share, and of each run."""
    return Point(
        strength,
        [base + level + rng.gauss(0, 2) for level in levels],
        [new - level + rng.gauss(0, 3) for level in levels],
    )


def test_the_gap_by_hand():
    control = [Point(1, [50.0, 50.0, 53.0], [42.0, 40.0, 41.0]), Point(2, [61.0, 60.0, 62.0], [30.0, 33.0, 30.0])]
    treated = Point(0.5, [57.0, 57.0, 57.0], [37.0, 40.0, 37.0])
    # means: control (51, 41) and (61, 31); treated (57, 38): there the straight line has 35
    gap = gap_at_equal_base(treated, control)
    assert gap.mean == pytest.approx(3.0)
    assert gap.n == 3
    # t = 0.6, slope -1: seed 1 is 37 - (0.4 * 42 + 0.6 * 30) + (57 - (0.4 * 50 + 0.6 * 61)), and so on
    each = [37 - 34.8 + 57 - 56.6, 40 - 35.8 + 57 - 56.0, 37 - 34.4 + 57 - 58.4]
    assert gap.standard_error == pytest.approx(statistics.stdev(each) / 3**0.5)


def test_the_interval_is_the_bootstraps():
    rng = random.Random(4)
    levels = [rng.gauss(0, 3) for _ in range(60)]
    control = [drawn(rng, s, b, n, levels) for s, b, n in ((10, 55, 36), (20, 60, 31), (40, 64, 28))]
    treated = drawn(rng, 1, 61.5, 33, levels)
    gap, again = gap_at_equal_base(treated, control), []
    for _ in range(2000):
        picks = rng.choices(range(60), k=60)
        points = [Point(p.strength, [p.base[i] for i in picks], [p.new[i] for i in picks]) for p in (treated, *control)]
        again.append(gap_at_equal_base(points[0], points[1:]).mean)
    assert gap.standard_error == pytest.approx(statistics.stdev(again), rel=0.1)
    assert gap.mean == pytest.approx(statistics.fmean(again), abs=0.15)


def test_no_gap_where_the_curve_does_not_come():
    control = [Point(1, [50.0, 51.0], [40.0, 41.0]), Point(2, [60.0, 61.0], [30.0, 31.0])]
    assert gap_at_equal_base(Point(1, [70.0, 71.0], [40.0, 41.0]), control) is None
    assert gap_at_equal_base(Point(1, [55.0, 55.0], [40.0, 41.0]), control[:1]) is None


def test_the_best_of_a_curve_that_turns_counts():
    turning = [Point(s, [b, b + 1], [n, n + 2]) for s, b, n in ((1, 50.0, 30.0), (2, 60.0, 40.0), (3, 50.0, 44.0))]
    # the mean 55.5 lies on both legs: 36 on the way up (at t = 0.5), 43 on the way down
    assert gap_at_equal_base(Point(1, [55.0, 56.0], [50.0, 52.0]), list(reversed(turning))).mean == pytest.approx(51 - 43)


def test_a_difference_is_paired_by_seed():
    treated, control = Point(1, [60.0, 80.0], [60.0, 80.0]), Point(0, [50.0, 71.0], [50.0, 71.0])
    assert difference(treated, control).mean == pytest.approx(9.5)
    assert difference(treated, control, "new").half_width == pytest.approx(12.706 * 0.5, rel=1e-3)
