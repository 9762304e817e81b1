"""What the machine does: paths that cannot be, full disks, letters that a terminal lacks, output that nobody hears, signals."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from plpp_reg.commands import cli
from plpp_reg.engine import checkpoint
from plpp_reg.errors import line_of
from plpp_reg.io.files import write_text

from helpers import engine as helpers
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


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small /dev/shm")
def test_a_small_dev_shm_is_a_line(world: Path, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]
    if subprocess.run(["unshare", "-m", *mount], capture_output=True).returncode:
        pytest.skip("no mount")
    keys = ["DATASET.NAME", f"folder:{world / 'data'}", "DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "2"]
    argv = [*line(world, tmp_path / "out", trainer="VPT"), *keys]  # a method that sees pixels
    code = "import sys; from plpp_reg.commands.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = ["unshare", "-m", "sh", "-c", f'{" ".join(mount)} && exec "$@"', "sh", sys.executable, "-c", code, *argv]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
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


def plpp(*argv: str, **options: object) -> subprocess.Popen:
    """The command line in a process of its own, where ``tiny`` is not known."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(helpers.ROOT / "tests"), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-c", "import sys; from plpp_reg.commands.cli import main; sys.exit(main())", *argv]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, **options)


SHORT = ["OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "1", "TRAINER.COOP.N_CTX", "4"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_nobody_hears_ends_no_run(world: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        runs = [plpp("train", "--output-dir", "full", *SHORT, stdout=full), plpp("table", "absent", stdout=full)]
        listing = plpp("inspect", str(world / "done"), "--backbone", str(world / "tiny.pt"), stdout=full)
    closed = plpp("train", "--output-dir", "closed", *SHORT, stdout=subprocess.PIPE)
    closed.stdout.close()
    none = plpp("train", "--output-dir", "none", *SHORT, preexec_fn=lambda: os.close(1))
    for run, name in ((runs[0], "full"), (closed, "closed"), (none, "none")):
        assert (run.wait(), run.stderr.read()) == (0, "")
        assert (tmp_path / name / "result.json").is_file()
        assert "Deploy the last-epoch model" in (tmp_path / name / "log.txt").read_text()
    assert runs[1].wait() == 2 and runs[1].stderr.read().count("\n") == 1
    assert listing.wait() == 2  # there the output is what was asked for
    assert listing.stderr.read() == (
        "plpp: expected room on the disk, got none: free some, and the same command goes on from what is there\n"
    )


# ---- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("command", "name"),
    [("train", "SIGTERM"), ("train", "SIGHUP"), ("train", "SIGINT"), ("run", "SIGTERM"), ("run --workers 1", "SIGTERM")],
)  # a sweep that is stopped by Ctrl-C: tests/test_workers.py
def test_signals_end_a_run_with_a_line(name: str, command: str, tmp_path: Path) -> None:
    if command == "train":
        argv = ["train", "--trainer", "helpers.dying:NeverEnds", "--output-dir", "out", *SHORT]
        argv[5:5] = ["--config-file", str(helpers.ROOT / "configs/trainers/CoOp/embedded.yaml")]
    else:
        recipe = helpers.ROOT / "configs/trainers/CoOp/embedded.yaml"
        argv = [
            "run",
            "few_shot",
            "--methods",
            "helpers.dying:NeverEnds",
            "--recipe",
            str(recipe),
            "--seeds",
            "1",
            "--shots",
            "1",
        ]
        argv += ["--output", "out", *command.split()[1:], "--set", "OPTIM.MAX_EPOCH", "2", "TRAINER.COOP.N_CTX", "4"]
    process = plpp(*argv, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (pids := list((tmp_path / "out").rglob("pid"))):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    while not pids[0].read_text():
        time.sleep(0.01)
    worker = int(pids[0].read_text())
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 128 + getattr(signal, name)
    by = "" if name == "SIGINT" else f" by {name}"
    assert process.stderr.read() == f"plpp: stopped{by}; the same command goes on from what is there\n"
    while worker != process.pid and os.path.exists(f"/proc/{worker}"):  # no orphan
        assert time.monotonic() < deadline
        time.sleep(0.05)
    folder = pids[0].parent
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
