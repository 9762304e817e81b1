"""PLPP in somebody else's Dassl checkout.

After ``import plpp_reg.dassl``, anywhere and in any order with the host's own imports, ``cfg.TRAINER.PLPP`` exists, Dassl's
registry knows ``X_PLPP`` for every trainer ``X`` that is registered or will be, and ``TRAINER.PLPP.ENABLED True`` makes ``X``
the same. ``python -m plpp_reg.dassl train.py …`` does it for a script that is not edited, and mends Dassl in memory where a new
torch broke it (:mod:`plpp_reg.dassl.patches`).
"""

from __future__ import annotations

import sys


def _being_launched() -> bool:
    """Whether this import is the beginning of ``python -m plpp_reg.dassl``, which sets the path before it looks for Dassl."""
    words = sys.orig_argv
    return sys.argv[:1] == ["-m"] and "-m" in words and words[words.index("-m") + 1 :][:1] == [__name__]


if not _being_launched():
    from plpp_reg.dassl.registry import install

    install()
