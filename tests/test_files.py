"""Files are whole: writes that fail or are killed at any moment, and what the next one clears."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from subprocess import PIPE

import pytest

from plpp_reg.commands import cli
from plpp_reg.engine import checkpoint
from plpp_reg.errors import InputError
from plpp_reg.io import files

from helpers import engine as helpers
from helpers import processes
from helpers.engine import quietly
from helpers.resume import EPOCHS, Killed, arguments, command

pytestmark = pytest.mark.usefixtures("tiny_and_noisy")


@pytest.fixture(scope="module")
def world(resumable: Path) -> Path:
    return resumable


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), Killed()], ids=repr)
@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException, there: bool) -> None:
    path = tmp_path / "folder" / "file"
    if there:
        files.write_text(path, "old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent and temporary != path  # a rename within one file system
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        files.write_atomically(path, write)
    assert helpers.files_below(tmp_path) == (["folder", "folder/file"] if there else ["folder"])
    assert not there or path.read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from plpp_reg.io import files

def write(temporary):
    temporary.write_text("half")
    if len(sys.argv) > 2:
        print(temporary, flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)

files.write_atomically(Path(sys.argv[1]), write)
"""
POSIX = pytest.mark.skipif(os.name == "nt", reason="files that are being written cannot be locked there")


@POSIX
def test_what_a_killed_process_left_is_told_from_what_another_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert processes.run(KILLED, str(path)).returncode == -signal.SIGKILL
    assert helpers.files_below(tmp_path) == [".file.tmp"] and files.left_behind(tmp_path) == [tmp_path / ".file.tmp"]
    files.write_text(path, "whole")  # written over by the next
    assert helpers.files_below(tmp_path) == ["file"]
    with processes.started(KILLED, str(path), "wait", stdin=PIPE, stdout=PIPE) as writer:
        busy = Path(writer.stdout.readline().strip())
        assert files.left_behind(tmp_path) == [] and files.clear_left_behind(tmp_path) == 0
        files.write_text(path, "in between")  # under another name, and without waiting
        assert busy.read_text() == "half" and path.read_text() == "in between"
    assert files.clear_left_behind(tmp_path) == 1 and helpers.files_below(tmp_path) == ["file"]


@POSIX
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_stands_in_place_of_a_temporary_file_is_not_written_through(tmp_path: Path, kind: str) -> None:
    place, other = tmp_path / ".file.tmp", tmp_path / "other"
    other.write_text("mine")
    {"link": lambda: place.symlink_to(other), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
    files.write_text(tmp_path / "file", "whole")
    assert other.read_text() == "mine" and (tmp_path / "file").read_text() == "whole"
    assert helpers.files_below(tmp_path) == [".file.tmp", "file", "other"]


@POSIX
def test_the_next_run_clears_what_a_killed_one_left(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    for name in (".result.json.tmp", ".config.yaml.0123abcd.tmp", "prompt_learner/.model.pth.tar-9.tmp"):
        (tmp_path / "out" / name).write_bytes(b"half")
    inside = tmp_path / "out" / "prompt_learner"
    shutil.copy(inside / f"model.pth.tar-{EPOCHS}", inside / f"model.pth.tar-{EPOCHS - 1}")  # killed before its removal
    quietly(arguments(world, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert sorted(p.name for p in inside.iterdir()) == ["checkpoint", "model-best.pth.tar", f"model.pth.tar-{EPOCHS}"]


@pytest.mark.parametrize(("frequency", "stays"), [(0, False), (1, True), (3, True), (2, False)])
def test_the_checkpoint_before_the_newest_goes_unless_it_was_asked_for(tmp_path: Path, frequency: int, stays: bool) -> None:
    for epoch in (2, 3, 4):
        checkpoint.save(tmp_path, {"state_dict": {}, "epoch": epoch})
    checkpoint.remove_previous(tmp_path, frequency)
    there = {p.name for p in tmp_path.iterdir()}
    assert ("model.pth.tar-3" in there) == stays and {"model.pth.tar-2", "model.pth.tar-4"} <= there


@POSIX
@pytest.mark.parametrize("name", ["log.txt", ".lock"])
def test_a_link_in_place_of_a_log_is_not_followed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    shutil.copytree(world / "whole", tmp_path / "out")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / name).unlink(missing_ok=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert cli.main(command(world, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "out") in error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before | (
        {} if name == ".lock" else {tmp_path / "out" / ".lock": b""}
    )


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("n")
        assert path.read_text() == "old"
        temporary.write_text("new")

    files.write_atomically(path, write)
    assert path.read_text() == "new" and helpers.files_below(tmp_path) == ["file"]


def test_everything_a_run_writes_for_keeps_goes_through_a_rename(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed, original = set(), os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (renamed.add(Path(b).name), original(a, b))[1])
    quietly(arguments(world, tmp_path / "out", opts=("TEST.COMPUTE_CMAT", "True")))
    there = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    appended = {name for name in there if name in (".lock", "log.txt") or name.startswith("events.")}
    assert there - appended <= renamed
    assert {"confusion.csv", "confusion.png"} <= there and not any(name.endswith(".tmp") for name in there)


def test_the_pointer_never_names_a_file_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"state_dict": {}, "epoch": 1}
    checkpoint.save(tmp_path, content)

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[:9])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, {**content, "epoch": 2})
    assert checkpoint.newest(tmp_path).name == "model.pth.tar-1"
    assert helpers.files_below(tmp_path) == ["checkpoint", "model.pth.tar-1"]


def test_find_takes_the_epoch_then_the_best_then_the_newest(tmp_path: Path) -> None:
    inside = tmp_path / "prompt_learner"
    for epoch in (1, 2, 10):
        checkpoint.save(inside, {"state_dict": {}, "epoch": epoch})
    assert checkpoint.find(tmp_path, "prompt_learner", 2).name == "model.pth.tar-2"
    assert checkpoint.find(tmp_path, "prompt_learner", None).name == "model.pth.tar-10"
    with pytest.raises(InputError, match="the nearest there is 10"):
        checkpoint.find(tmp_path, "prompt_learner", 8)
    checkpoint.save(inside, {"state_dict": {}, "epoch": 2}, best=True)
    assert checkpoint.find(tmp_path, "prompt_learner", None).name == "model-best.pth.tar"
    assert (inside / "checkpoint").read_text() == "model.pth.tar-10\n"
