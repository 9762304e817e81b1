"""Standard output: what cannot be printed ends no run."""

from __future__ import annotations

import contextlib
import os
import sys


def print_all_letters() -> None:
    """What the terminal has no letter for is printed as its number: class names may be of any script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> bool:
    """Print a line at once; False where nobody can hear it any more: a full disk, a closed pipe, a terminal that is gone."""
    try:
        print(line, flush=True)
    except OSError:
        discard_output()
        return False
    return True


def discard_output() -> None:
    """What is left to print, and the rest, goes nowhere: at its end Python would try once more, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        standard = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, standard)
        os.close(nowhere)
