"""What a MATLAB file holds, read by a process of its own: scipy trusts a damaged file, and may end the process that reads it.

This file is that process's program as well, so it imports nothing of the package: to start torch again would be the most of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REFUSED = 3  # exit status: the file, not the process, is at fault


def read(files: Sequence[tuple[Path, str]]) -> list[Any]:
    """The variable of each file in numbers, texts, lists, and dictionaries for structures.

    Raises:
        ValueError: what scipy says of a file, or the signal that ended it.
        RuntimeError: the process ended otherwise; its last line.
    """
    found = subprocess.run(
        [sys.executable, __file__, *(word for path, key in files for word in (str(path), key))],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    if found.returncode == 0:
        return json.loads(found.stdout)
    names, said = ", ".join(path.name for path, _ in files), found.stderr.strip().rpartition("\n")[2]
    if found.returncode == REFUSED:
        raise ValueError(said)
    if found.returncode < 0:
        name = signal.Signals(-found.returncode).name
        raise ValueError(f"{names}: scipy ended with {name} while it read, so a file may be damaged")
    raise RuntimeError(f"{names}: the process that reads it ended with status {found.returncode}: {said}")


def plain(path: str, key: str) -> Any:
    """
    Raises:
        ValueError: what scipy says of the file.
    """
    import warnings

    import numpy as np
    from scipy.io import loadmat

    def converted(value: Any) -> Any:
        if isinstance(value, np.void):
            return {name: converted(value[name]) for name in value.dtype.names}
        return [converted(v) for v in value] if isinstance(value, np.ndarray) and value.ndim else value

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return json.loads(json.dumps(converted(loadmat(path)[key]), default=lambda scalar: scalar.item()))
    except Exception as e:  # of a damaged file scipy raises whatever it runs into
        raise ValueError(f"{Path(path).name}: {type(e).__name__}: {e}") from e


if __name__ == "__main__":
    if sys.path[0] == str(Path(__file__).parent):  # its modules are no program's
        sys.path.pop(0)
    words = sys.argv[1:]
    try:
        print(json.dumps([plain(path, key) for path, key in zip(words[::2], words[1::2], strict=True)]))
    except (ValueError, MemoryError) as error:
        print(str(error).replace("\n", " ") or type(error).__name__, file=sys.stderr)
        sys.exit(REFUSED)
