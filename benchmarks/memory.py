"""Peak memory of a step, in a process that imports what the step imports: this module alone imports no torch there."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

CAN_MEASURE = Path("/proc/self/clear_refs").exists()  # Linux


def peak_mib(prepare: Callable[..., Callable[[], object]], *args: object, freed_returned: bool = False) -> float | None:
    """Peak resident memory of one step, ``prepare(*args)()``, over what was resident before it, in a fresh process.

    glibc's allocator keeps freed blocks of less than 32 MiB, so that many passes of a step add up to several times what lives
    at once, with a scatter of hundreds of MiB. With ``freed_returned`` it gives every block above 1 MiB back: the peak is then
    what lives, as ``torch.cuda.max_memory_allocated`` would tell it.
    """
    if not CAN_MEASURE:
        return None
    import torch

    allocator = {"MALLOC_MMAP_THRESHOLD_": str(2**20)} if freed_returned else {}
    with mock.patch.dict(os.environ, allocator), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_in_this_process, (prepare, args, torch.get_num_threads()))


def _peak_in_this_process(prepare: Callable[..., Callable[[], object]], args: tuple, threads: int) -> float:
    if torch := sys.modules.get("torch"):  # what there is to prepare has imported it
        torch.set_num_threads(threads)
    step = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])  # KiB
    raise RuntimeError(f"/proc/self/status has no {field}")
