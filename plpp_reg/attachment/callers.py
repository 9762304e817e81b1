"""What a hook runs within: a checkpoint, a backward pass, the step of a gradient scaler."""

from __future__ import annotations

import sys
from types import FrameType

import torch
import torch.amp.grad_scaler
import torch.utils.checkpoint


def in_checkpoint() -> bool:
    """Whether this forward pass is a checkpoint's; other passes without gradients (a teacher's) have no second run."""
    return _caller_from(torch.utils.checkpoint.__file__) is not None


def stepping_scaler() -> torch.amp.GradScaler | None:
    """The gradient scaler whose step this is; None where the optimizer steps by itself."""
    frame = _caller_from(torch.amp.grad_scaler.__file__)
    scaler = frame.f_locals.get("self") if frame is not None else None
    return scaler if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() else None


def _caller_from(file: str | None) -> FrameType | None:
    """The nearest caller whose code stands in ``file``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: then a forward pass is a checkpoint's second run."""
    return torch._C._current_graph_task_id() != -1
