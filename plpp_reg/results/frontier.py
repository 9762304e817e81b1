"""Base accuracy against new: what a method gives at the same base accuracy as a control of which one knob is turned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from plpp_reg.results.record import Paired, harmonic_mean, paired, summary


class Point(NamedTuple):
    """One setting's accuracies in percent, by seed, in the same order of seeds everywhere."""

    strength: float  # of the knob: its place on the curve
    base: Sequence[float]
    new: Sequence[float]

    @property
    def h(self) -> list[float]:
        """H of each seed."""
        return [harmonic_mean(b, n) for b, n in zip(self.base, self.new, strict=True)]

    @property
    def mean_base(self) -> float:
        return summary(self.base).mean

    @property
    def mean_new(self) -> float:
        return summary(self.new).mean


def difference(treated: Point, control: Point, figure: str = "h") -> Paired:
    """Of "base", "new" or "h", paired over the seeds."""
    return paired(getattr(treated, figure), getattr(control, figure))


def gap_at_equal_base(treated: Point, curve: Sequence[Point]) -> Paired | None:
    """New accuracy above the control's curve where that has the same mean base accuracy, with its paired 95% interval.

    The curve is what lies between neighbouring strengths, straight lines from mean to mean. With ``a`` and ``b`` the two
    points around the treated one's mean base and ``t`` the place between them, each seed's difference is::

        d = new - new_t - slope (base - base_t)    with x_t = (1 - t) x_a + t x_b, slope = (new_b - new_a) / (base_b - base_a)

    whose mean is the gap, since base and base_t have the same mean, and whose spread has the uncertainty of ``t`` in it (the
    delta method). Where the curve has that base accuracy more than once, the highest new accuracy counts.

    None: the curve does not come to that base accuracy.

    >>> control = [Point(10, [50.0, 52.0], [40.0, 41.0]), Point(40, [60.0, 62.0], [30.0, 33.0])]
    >>> print(gap_at_equal_base(Point(1, [55.0, 57.0], [38.0, 41.0]), control))
    +3.5 ± 6.4
    """
    found: list[Paired] = []
    wanted = treated.mean_base
    for a, b in pairwise(sorted(curve, key=lambda point: point.strength)):
        low, high = a.mean_base, b.mean_base
        if low == high or not min(low, high) <= wanted <= max(low, high):
            continue
        t, slope = (wanted - low) / (high - low), (b.mean_new - a.mean_new) / (high - low)
        rows = zip(treated.base, treated.new, a.base, a.new, b.base, b.new, strict=True)
        gaps = []
        for base, new, base_a, new_a, base_b, new_b in rows:
            aside = base - (1 - t) * base_a - t * base_b
            gaps.append(new - (1 - t) * new_a - t * new_b - slope * aside)
        found.append(paired(gaps, [0.0] * len(gaps)))
    return min(found, key=lambda gap: gap.mean, default=None)
