"""What :mod:`plpp_reg.data.loaders` and :mod:`plpp_reg.data.augmentation` were in version 0.1. It goes in version 0.3."""

import warnings
from typing import Any

from plpp_reg.data import augmentation, loaders

warnings.warn(
    "plpp_reg.engine.data is plpp_reg.data.loaders and plpp_reg.data.augmentation since version 0.2, and goes in 0.3",
    DeprecationWarning,
    stacklevel=2,
)


def __getattr__(name: str) -> Any:
    return getattr(augmentation if hasattr(augmentation, name) else loaders, name)
