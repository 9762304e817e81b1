"""A few points of the campaign of kills (tools/campaign/kills.py), and that its shim kills where it says."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("forks, and limits on the size of files", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "campaign"))

import kills
import shim


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kills.Campaign]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLPP_REG_CACHE", "")
        folder = tmp_path_factory.mktemp("campaign")
        with kills.local_publisher(folder):
            yield kills.Campaign(folder)


# More of them in the campaign: of each command here a few, spread over its whole length.
@pytest.mark.parametrize(("name", "points"), [("go on", 3), ("run anew", 2), ("export", 2), ("data", 3), ("cache", 2)])
def test_killed_at_some_points_and_run_again(campaign: kills.Campaign, name: str, points: int) -> None:
    command = kills.commands(campaign.world)[name]
    campaign.prepare(command)
    found, expected, said = campaign.record(command)
    assert expected or name == "cache"
    step = len(found) // points
    for point in found[step // 2 :: step]:
        assert campaign.attempt(command, point, expected, said) == "", str(point)


def child(folder: Path, prepare, code: str) -> int:
    pid = os.fork()
    if not pid:
        try:
            prepare()
            exec(code, {"folder": folder})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


WRITES = """
import os
(folder / "a").write_bytes(b"0123456789")
os.replace(folder / "a", folder / "b")
with open(folder / "b", "ab") as file:
    file.write(b"more")
(folder / "b").unlink()
"""


def test_the_shim_counts_kills_before_and_kills_within(tmp_path: Path) -> None:
    found: list[str] = []

    def record() -> None:
        shim.operations(str(tmp_path), lambda n, o: os.write(out, f"{n} {o.event} {Path(o.path).name} {o.before}\n".encode()))

    back, out = os.pipe()
    assert child(tmp_path, record, WRITES) == 0
    found = os.read(back, 10_000).decode().splitlines()
    assert found == ["1 open a 0", "2 os.rename a 10", "3 open b 10", "4 os.remove b 14"]
    assert child(tmp_path, lambda: shim.kill_before(str(tmp_path), 2), WRITES) == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert child(tmp_path, lambda: shim.kill_within(str(tmp_path), 3, 11), WRITES) == -signal.SIGXFSZ
    assert (tmp_path / "b").read_bytes() == b"0123456789m" and not (tmp_path / "a").exists()
