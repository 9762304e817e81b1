"""splitmix64's finaliser: numbers that are alike become numbers that are not."""

from __future__ import annotations

from typing import TypeVar

Numbers = TypeVar("Numbers")  # an integer, or a numpy array of uint64
STEP = 0x9E3779B97F4A7C15  # of the generator, the golden ratio as a fraction of 2^64
MASK = (1 << 64) - 1


def mixed(z: Numbers) -> Numbers:
    """One of 2^64 numbers for another, one to one."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
