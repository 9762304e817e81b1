"""Fresh processes at the price of a fork: a server that has imported torch, and nothing that a test is about."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HOSTS = Path(__file__).parent
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.utils.tensorboard", "torchvision.transforms", "yacs.config", "numpy", "PIL.Image"]
)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def _child(code: str, argv: list[str], path: list[str], cwd: str, out: str) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(out, name), os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.dont_write_bytecode = True
    own = [p for p in sys.path if p and not Path(p).resolve().is_relative_to(HOSTS)]
    sys.path[:] = [cwd, *path, *own]
    os.chdir(cwd)
    sys.argv = argv
    exec(compile(textwrap.dedent(code), "test", "exec"), {"__name__": "__test__"})


def python(code: str, *argv: str, path: Sequence[str | Path] = (), cwd: str | Path = ".") -> Done:
    """Run ``code`` with ``sys.argv[1:] == argv`` and ``path`` before everything else that can be imported."""
    with tempfile.TemporaryDirectory() as out:
        arguments = (code, ["test", *argv], [str(p) for p in path], str(Path(cwd).resolve()), out)
        process = _CONTEXT.Process(target=_child, args=arguments)
        process.start()
        process.join()
        texts = [(Path(out) / name).read_text() if (Path(out) / name).exists() else "" for name in ("out", "err")]
        return Done(process.exitcode, *texts)
