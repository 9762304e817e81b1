"""The page's script, which nothing on it depends on: tables are sorted by a click on a column's head, and filtered."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import NamedTuple

SORTING = "templates/sortable/sortable.min.js"  # tofsjonas/sortable 4.1.7, in the public domain (its LICENSE is beside it)
OURS = "templates/report.js"


class Script(NamedTuple):
    """``text`` stands in the page; by ``digest`` its policy allows this script and no other."""

    text: str
    digest: str


def script() -> Script:
    """What is inlined. It reads nothing but the page."""
    folder = resources.files("plpp_reg.results")
    text = "\n".join(folder.joinpath(*name.split("/")).read_text(encoding="utf-8").strip() for name in (SORTING, OURS))
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(text, f"sha256-{digest}")
