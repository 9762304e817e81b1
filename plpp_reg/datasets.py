"""What :mod:`plpp_reg.data` was called in version 0.1. It goes in version 0.3."""

import warnings
from typing import Any

from plpp_reg import data

warnings.warn("plpp_reg.datasets is plpp_reg.data since version 0.2, and goes in 0.3", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    return getattr(data, name)
