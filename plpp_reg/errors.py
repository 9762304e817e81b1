"""One kind of error for bad input: a single line, with the nearest valid choice. The command line exits with status 2 on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What a user gave cannot be used; the message says what was expected, what came, and what would do."""

    def __init__(self, message: str) -> None:
        # A loader's worker hands its error over with the whole traceback as message; the line stands at its end.
        super().__init__(message.rsplit(f"{InputError.__module__}.InputError: ", 1)[-1].strip())


class InUse(InputError):
    """Another process works in this folder: what is in it is that one's to write."""


def unknown(what: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is none of ``choices``, with the nearest of them.

    >>> print(unknown("trainer", "Coop", ["ZeroshotCLIP", "CoOp"]))
    unknown trainer 'Coop': did you mean 'CoOp'? (known: CoOp, ZeroshotCLIP)
    """
    known = sorted(choices)
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    hint = f": did you mean {lower[close[0]]!r}?" if close else ""
    shown = f" (known: {', '.join(known)})" if len(known) <= 16 else ""
    return InputError(f"unknown {what} {name!r}{hint}{shown}")


def install(extra: str) -> str:
    """The command that installs what a part needs: the package is on no index, so it is installed from its clone."""
    return f'pip install -e ".[{extra}]" (in the clone of plpp-reg)'
