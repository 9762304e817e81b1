"""Where things are kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$PLPP_REG_CACHE``, else ``plpp-reg`` in the user's cache folder: the embedded data set's pictures, image features."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("PLPP_REG_CACHE") or os.path.join(base, "plpp-reg"))


def openai_clip_folder() -> Path:
    """Where OpenAI's weights are kept, as openai-clip has it."""
    return Path(os.path.expanduser("~/.cache/clip"))
