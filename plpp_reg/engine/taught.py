"""What a student's checkpoint keeps of its teacher: who it was, and what predictions read of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from plpp_reg.engine.settings import Settings


class Known(NamedTuple):
    """What a student's checkpoint keeps of its teacher, where its predictions read that."""

    classnames: Sequence[str]
    class_features: Tensor  # (C, E_t) normalised, float32
    scale: Tensor

    def of(self, classnames: Sequence[str]) -> Known | None:
        """Of these classes; None where not all of them are among its own."""
        rows = {name: row for row, name in reversed(list(enumerate(self.classnames)))}
        if any(name not in rows for name in classnames):
            return None
        return Known(classnames, self.class_features[[rows[name] for name in classnames]], self.scale)


def known_of(content: Mapping[str, Any]) -> Known | None:
    """Of a checkpoint, as :func:`plpp_reg.engine.checkpoint.load` gives it; None where it keeps nothing of a teacher."""
    extra = content.get("plpp_reg") or {}
    said, names = extra.get("said"), extra.get("classnames")
    if not isinstance(said, dict) or not isinstance(names, list):
        return None
    features, scale = said.get("class_features"), said.get("scale")
    fits = isinstance(features, Tensor) and features.is_floating_point() and features.dim() == 2 and len(features) == len(names)
    if not fits or not features.isfinite().all() or not isinstance(scale, Tensor) or scale.numel() != 1:
        return None
    return Known(names, features.float(), scale.float().reshape(()))


def label_of(identity: Mapping[str, Any]) -> str:
    """``Teacher.label`` of an identity that was recorded."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{identity['trainer']} on {identity['backbone']} ({digest})"


def apart_from_data(identity: Mapping[str, Any], config: type[Settings]) -> dict[str, Any]:
    """Without what the student's data set gives: the template of a zero-shot method is another for other data."""
    data = {f.name for f in dataclasses.fields(config) if config.key(f.name).startswith("DATASET.")}
    settings = identity.get("settings")
    settings = {k: v for k, v in settings.items() if k not in data} if isinstance(settings, dict) else settings
    return {**{key: identity.get(key) for key in ("trainer", "backbone", "sha256")}, "settings": settings}
