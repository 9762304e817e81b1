"""What the machine does: paths that cannot be, full disks, letters that a terminal lacks, output that nobody hears, signals."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import torch
import yaml

from plpp_reg.commands import cli
from plpp_reg.engine import checkpoint
from plpp_reg.errors import line_of
from plpp_reg.io.files import write_text

from helpers import processes
from helpers.cli import line, refused

pytestmark = pytest.mark.usefixtures("in_tmp_path")


# ---- paths ------------------------------------------------------------------------------------------------------------

# Every argument that is a path: the command line before it, and after it.
PATHS = {
    "train --root": (["train", "--root"], []),
    "train --output-dir": (["train", "--output-dir"], []),
    "train --config-file": (["train", "--config-file"], []),
    "train --dataset-config-file": (["train", "--dataset-config-file"], []),
    "train --backbone": (["train", "--backbone"], []),
    "train --resume": (["train", "--resume"], []),
    "train --model-dir": (["train", "--eval-only", "--model-dir"], []),
    "train OUTPUT_DIR": (["train", "OUTPUT_DIR"], []),
    "train RESUME": (["train", "RESUME"], []),
    "train DATASET.ROOT": (["train", "DATASET.ROOT"], []),
    "train MODEL.INIT_WEIGHTS": (["train", "MODEL.INIT_WEIGHTS"], []),
    "estimate --root": (["estimate", "--root"], []),
    "demo --output-dir": (["demo", "--output-dir"], []),
    "run protocol": (["run"], []),
    "run --root": (["run", "few_shot", "--root"], []),
    "run --output": (["run", "few_shot", "--output"], []),
    "table": (["table"], []),
    "table --output": (["table", ".", "--output"], []),
    "report": (["report"], []),
    "report --output": (["report", ".", "--output"], []),
    "data check": (["data", "check"], []),
    "data get --root": (["data", "get", "dtd", "--root"], []),
    "predict run": (["predict"], ["a.png"]),
    "predict image": (["predict", "."], []),
    "export run": (["export"], ["p.safetensors"]),
    "export file": (["export", "."], []),
    "doctor --folder": (["doctor", "--folder"], []),
    "inspect": (["inspect"], []),
    "inspect --out": (["inspect", ".", "--out"], []),
}
BAD_PATHS = {
    "too long": ("a" * 300, "File name too long"),
    "too long as a whole": ("/a" * 5000, "File name too long"),
    "of no user": ("~nouser/x", "no such user"),
    "not UTF-8": ("x\udcff", "expected a path in UTF-8"),
    "NUL": ("x\0y", "embedded null"),
    "a loop of links": ("loop/x", "symbolic links"),
}


@pytest.mark.parametrize("bad", BAD_PATHS)
@pytest.mark.parametrize("argument", PATHS)
def test_paths_that_cannot_be(argument: str, bad: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (before, after), (path, reason) = PATHS[argument], BAD_PATHS[bad]
    error = refused([*before, path, *after], capsys, tmp_path, reason)
    assert len(error) < 400


def test_a_home_folder_is_meant_by_its_sign(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cli.main(line(world, "~/one")) == 0
    assert cli.main(line(world, None, "OUTPUT_DIR", "~/two")) == 0
    assert all((tmp_path / "home" / name / "result.json").is_file() for name in ("one", "two"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["config.yaml", "log.txt", "result.json", "few_shot.json"])
def test_a_folder_in_the_place_of_a_runs_file(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    refused(line(world, "out"), capsys, tmp_path, name)


@pytest.mark.parametrize("name", ["tensorboard", "prompt_learner"])
def test_a_file_in_the_place_of_a_runs_folder(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    refused(line(world, "out"), capsys, tmp_path, name)
    assert (tmp_path / "out" / name).read_text() == "mine"


# ---- the disk ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[None]:
    """A disk of that size at ``place``; the test is skipped where this user may not mount one."""
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no mount: {mounted.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("kib", [4, 8, 12, 16, 24, 32, 40])
def test_a_full_disk(kib: int, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib):
        assert cli.main(line(world, tmp_path / "disk" / "out")) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"plpp: '{tmp_path / 'disk' / 'out'}") and error.count("\n") == 1, error
        assert "expected room on the disk, got none" in error and ".tmp" not in error
        assert not list((tmp_path / "disk").rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path / "disk")], check=True)
        assert cli.main(line(world, tmp_path / "disk" / "out")) == 0  # the same command goes on
        assert (tmp_path / "disk" / "out" / "result.json").is_file()


def test_a_full_disk_at_a_checkpoint_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    path = tmp_path / "model.pth.tar-1"
    for write in (lambda: checkpoint.save(tmp_path, {"epoch": 1}), lambda: write_text(path, "x")):
        with pytest.raises(OSError) as caught:
            write()
        assert line_of(caught.value) == (
            f"'{path}': expected room on the disk, got none: free some, and the same command goes on from what is there"
        )


# ---- memory -----------------------------------------------------------------------------------------------------------


def test_no_memory_is_a_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert "expected more memory" in line_of(caught.value) and "BATCH_SIZE" in line_of(caught.value)
    for said in ("std::bad_alloc", "libtorch_cuda.so: failed to map segment from shared object"):
        assert f"expected more memory, got {said}:" in line_of(RuntimeError(said))
    assert "expected more memory" in line_of(MemoryError()) and "\n" not in line_of(MemoryError())
    assert line_of(RuntimeError("a fault of the program")) is None


@pytest.mark.parametrize(
    "said",
    [
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
        "RuntimeError: unable to write to file </torch_1_2_3>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared "
        "memory. Please try to raise your shared memory limit.",
        "unable to mmap 602112 bytes from file </torch_1_2_3>: Cannot allocate memory (12)",
    ],
)
def test_no_shared_memory_is_a_line(said: str) -> None:
    text = line_of(RuntimeError(said))
    assert "/dev/shm" in text and "NUM_WORKERS 0" in text and "\n" not in text


CLONE_NEWNS = 0x20000  # linux/sched.h: mounts of one's own


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small /dev/shm")
def test_a_small_dev_shm_is_a_line(world: Path, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]
    if subprocess.run(["unshare", "-m", *mount], capture_output=True).returncode:
        pytest.skip("no mount")
    keys = ["DATASET.NAME", f"folder:{world / 'data'}", "DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "2"]
    argv = [*line(world, tmp_path / "out", trainer="VPT"), *keys]  # a method that sees pixels
    code = f"""
import ctypes, subprocess
assert ctypes.CDLL(None).unshare({CLONE_NEWNS}) == 0
for words in (["--make-rprivate", "/"], {mount[1:]}):
    subprocess.run(["mount", *words], check=True)
"""
    done = processes.run(code + processes.PLPP, *argv)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "/dev/shm" in done.stderr and "NUM_WORKERS 0" in done.stderr


# ---- the terminal -----------------------------------------------------------------------------------------------------


def test_a_terminal_without_the_letters_of_a_class(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    picture = next((world / "data").rglob("*.png"))
    for encoding in ("cp1252", "ascii"):
        printed = io.BytesIO()
        with monkeypatch.context() as patch:
            terminal = io.TextIOWrapper(printed, encoding=encoding)
            patch.setattr(sys, "stdout", terminal)
            assert cli.main(["predict", str(world / "done"), str(picture), "--classes", "日本語", "Ω"]) == 0
            assert cli.main(line(world, tmp_path / f"日本語 {encoding}")) == 0
            terminal.flush()
        assert rb"\u65e5\u672c\u8a9e" in printed.getvalue()
        assert (tmp_path / f"日本語 {encoding}" / "result.json").is_file()


SHORT = ["OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "1", "TRAINER.COOP.N_CTX", "4"]
# as Python has it where standard output is closed when it starts
CLOSED = "import os, sys; os.close(1); sys.stdout = sys.__stdout__ = None; "


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_nobody_hears_ends_no_run(world: Path, tmp_path: Path) -> None:
    def train(name: str) -> list[str]:
        return line(world, tmp_path / name, "DATASET.NAME", f"folder:{world / 'data'}", *SHORT)

    def ended(process: processes.Process) -> tuple[int, str]:
        return process.wait(), process.stderr.read()

    started = functools.partial(processes.started, stderr=PIPE)
    with open("/dev/full", "w") as full, contextlib.ExitStack() as at_once:
        heard = at_once.enter_context(started(processes.PLPP, *train("full"), stdout=full))
        table = at_once.enter_context(started(processes.PLPP, "table", "absent", stdout=full))
        words = ["inspect", str(world / "done"), "--backbone", str(world / "tiny.pt")]
        listing = at_once.enter_context(started(processes.PLPP, *words, stdout=full))
        closed = at_once.enter_context(started(processes.PLPP, *train("closed"), stdout=PIPE))
        closed.stdout.close()
        none = at_once.enter_context(started(CLOSED + processes.PLPP, *train("none")))
        for run, name in ((heard, "full"), (closed, "closed"), (none, "none")):
            assert ended(run) == (0, "")
            assert (tmp_path / name / "result.json").is_file()
            assert "Deploy the last-epoch model" in (tmp_path / name / "log.txt").read_text()
        status, error = ended(table)
        assert status == 2 and error.count("\n") == 1
        no_room = "plpp: expected room on the disk, got none: free some, and the same command goes on from what is there\n"
        assert ended(listing) == (2, no_room)  # there the output is what was asked for


# ---- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("command", "name"),
    [("train", "SIGTERM"), ("train", "SIGHUP"), ("train", "SIGINT"), ("run", "SIGTERM"), ("run --workers 1", "SIGTERM")],
)  # a sweep that is stopped by Ctrl-C: tests/test_workers.py
def test_signals_end_a_run_with_a_line(name: str, command: str, world: Path, tmp_path: Path) -> None:
    data, trainer = f"folder:{world / 'data'}", "helpers.dying:NeverEnds"
    if command == "train":
        argv = line(world, "out", "DATASET.NAME", data, *SHORT, trainer=trainer)
    else:
        plan = {"table": "shots", "methods": ["CoOp"], "datasets": [data], "seeds": [1], "shots": [1], "test": "accuracy"}
        Path("one.yaml").write_text(yaml.safe_dump({**plan, "recipe": [str(world / "recipe.yaml")]}))
        argv = ["run", "one.yaml", "--methods", trainer, "--root", str(world / "data"), "--backbone", str(world / "tiny.pt")]
        argv += ["--output", "out", *command.split()[1:]]
    with processes.started(processes.PLPP, *argv, stdout=DEVNULL, stderr=PIPE) as process:
        processes.until(lambda: process.poll() is not None or any(p.read_text() for p in (tmp_path / "out").rglob("pid")))
        assert process.poll() is None, process.stderr.read()
        (said,) = (tmp_path / "out").rglob("pid")
        worker = int(said.read_text())
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == 128 + getattr(signal, name)
        by = "" if name == "SIGINT" else f" by {name}"
        assert process.stderr.read() == f"plpp: stopped{by}; the same command goes on from what is there\n"
        processes.until(lambda: worker == process.pid or not os.path.exists(f"/proc/{worker}"), 120)  # no orphan
    folder = said.parent
    assert checkpoint.newest(folder / "prompt_learner").name == "model.pth.tar-1" and not (folder / "result.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_what_somebody_has_set_for_a_signal_stays() -> None:
    from plpp_reg.io.signals import Stopped, stopped_as_by_ctrl_c

    with contextlib.suppress(Stopped), stopped_as_by_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal did nothing")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with stopped_as_by_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        thread = threading.Thread(target=lambda: stopped_as_by_ctrl_c().__enter__())
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
