"""``python -m plpp_reg.dassl SCRIPT …``: a Dassl script as ``python SCRIPT …`` runs it, with PLPP and a mended Dassl."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

if "OMP_WAIT_POLICY" not in os.environ:  # see plpp_reg/commands/cli.py
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from plpp_reg.errors import InputError

USAGE = (
    "usage: python -m plpp_reg.dassl SCRIPT [ARGUMENT ...]   (SCRIPT: your checkout's train.py; --check: say what is broken)"
)


def main(argv: Sequence[str]) -> int:
    """Exit status: the script's own; 2 where what was asked for cannot be; with --check, 1 if something is broken."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        return _check() if argv[0] == "--check" else _run(argv[0], list(argv[1:]))
    except InputError as e:
        print(f"plpp: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def _run(script: str, arguments: list[str]) -> int:
    if not os.path.isfile(script):
        raise InputError(f"script: expected a file, got {script!r} ({USAGE})")
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as `python SCRIPT` has it; -m had put the current folder there
    _prepare()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    return 0


def _prepare() -> None:
    from plpp_reg.dassl import patches

    lines = patches.mend(patches.before_import())
    from plpp_reg.dassl.registry import install

    install()
    for line in [*lines, *patches.mend(patches.faults())]:
        print(line, flush=True)


def _check() -> int:
    from plpp_reg.dassl import patches
    from plpp_reg.dassl.registry import install

    install()
    lines = patches.report()
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
