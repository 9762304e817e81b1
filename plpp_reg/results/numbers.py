"""Numbers as cells and lines show them: one place for digits, signs and intervals."""

from __future__ import annotations

import math


def figure(value: float, digits: int = 2, signed: bool = False) -> str:
    """
    >>> figure(71.254), figure(0.5, signed=True)
    ('71.25', '+0.50')
    """
    return f"{value:{'+' if signed else ''}.{digits}f}"


def half_width(spread: float, digits: int = 2, sign: str = "±") -> str:
    """``± 0.70``: a spread or half an interval; empty where it is nan, which is not known."""
    return "" if math.isnan(spread) else f"{sign} {spread:.{digits}f}"


def with_spread(value: float, spread: float, digits: int = 2, signed: bool = False, sign: str = "±") -> str:
    """
    >>> with_spread(71.254, 0.7), with_spread(1.0, math.nan, 1, signed=True)
    ('71.25 ± 0.70', '+1.0')
    """
    return f"{figure(value, digits, signed)} {half_width(spread, digits, sign)}".rstrip()


def interval(low: float, high: float, digits: int = 1, signed: bool = False) -> str:
    """
    >>> interval(65.81, 76.0)
    '65.8 to 76.0'
    """
    return f"{figure(low, digits, signed)} to {figure(high, digits, signed)}"


def magnitude(value: float) -> str:
    """What may be of any size, as a perplexity: four digits of it at least.

    >>> magnitude(123456.7), magnitude(23.456), magnitude(0.012345)
    ('123,457', '23.46', '0.01235')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """As a person reads it: 3.2 s, 35 s, 2.4 min, 12 h."""
    value, unit = seconds, "s"
    for name, size in (("min", 60), ("h", 3600)):
        if seconds >= 1.5 * size:
            value, unit = seconds / size, name
    return f"{value:.1f} {unit}" if round(value, 1) < 10 else f"{value:.0f} {unit}"


def columns(rows: list[list[str]]) -> list[str]:
    """Rows as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return ["  ".join(cells).rstrip() for cells in aligned]
