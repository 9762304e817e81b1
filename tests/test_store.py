"""TensorStore: computed once, whole or not there, bounded, shared by processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from plpp_reg.errors import InputError
from plpp_reg.io import files
from plpp_reg.io.store import TensorStore

from helpers import processes


class Counting:
    def __init__(self, value: float = 1.0, rows: int = 256) -> None:
        self.value, self.rows, self.calls = value, rows, 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"features": torch.full((self.rows, 4), float(self.value)), "index": torch.arange(self.rows)}


def test_a_second_asking_computes_nothing_and_gives_the_same_bits(tmp_path: Path) -> None:
    compute = Counting(1 / 3)
    first = TensorStore(tmp_path, 1).get({"model": "a", "epoch": 1}, compute)
    second = TensorStore(tmp_path, 1).get({"epoch": 1, "model": "a"}, compute)  # another process, another order of keys
    assert compute.calls == 1
    assert first.keys() == second.keys() == {"features", "index"}
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)


def test_something_else_is_computed_from_something_else(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, 1)
    assert store.get({"epoch": 1}, Counting(1.0))["features"][0, 0] == 1
    assert store.get({"epoch": 2}, Counting(2.0))["features"][0, 0] == 2
    assert store.get({"epoch": 1}, Counting(3.0))["features"][0, 0] == 1
    assert len(store.entries()) == 2


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_computed_again(tmp_path: Path, keep: int) -> None:
    store, compute = TensorStore(tmp_path, 1), Counting()
    store.get({"a": 1}, compute)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    again = store.get({"a": 1}, compute)
    assert compute.calls == 2 and torch.equal(again["features"], compute()["features"])
    assert path.stat().st_size == len(whole)


def test_a_damaged_number_is_not_taken(tmp_path: Path) -> None:
    store, compute = TensorStore(tmp_path, 1), Counting()
    store.get({"a": 1}, compute)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)
    assert torch.equal(store.get({"a": 1}, compute)["index"], torch.arange(256)) and compute.calls == 2


def write_at_most(limit: int, folder: Path, body: str) -> subprocess.CompletedProcess:
    """A process whose files cannot grow over ``limit`` bytes asks a store for a file that is larger, 1 MiB."""
    pytest.importorskip("resource")  # not on Windows
    code = f"""
import resource, signal, sys, torch
from plpp_reg.io import files
from plpp_reg.io.store import TensorStore
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
{body}
got = TensorStore(sys.argv[1], 1).get({{"large": 1}}, lambda: {{"features": torch.ones(2**18)}})
print("went on with", got["features"].sum().item())
"""
    return processes.run(code, str(folder))


def test_what_a_killed_writer_left_is_counted_and_cleared(tmp_path: Path) -> None:
    # the kernel's own signal, at a byte that we choose; Python ignores it unless told otherwise
    killed = write_at_most(300_000, tmp_path, "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)")
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    (half,) = tmp_path.iterdir()
    store = TensorStore(tmp_path, 1)
    assert [(entry.path, entry.size) for entry in store.halves()] == [(half, 300_000)] and store.entries() == []
    lock = files._lock(half, 0)  # as if that one were still at work
    TensorStore(tmp_path, 300_000 / 2**30).trim()
    store.get({"a": 1}, Counting())
    assert half.exists() and len(store.entries()) == 1
    TensorStore(tmp_path, 300_000 / 2**30).trim()
    assert half.exists() and store.entries() == []  # the bound is on both
    os.close(lock)
    store.get({"a": 1}, Counting())
    assert not half.exists() and len(store.entries()) == 1


def test_clearing_takes_what_a_killed_writer_left_too(tmp_path: Path) -> None:
    write_at_most(300_000, tmp_path, "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)")
    assert len(list(tmp_path.iterdir())) == 1
    assert TensorStore(tmp_path, 1).clear() == 0 and list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_keeping_alone(tmp_path: Path) -> None:
    full = write_at_most(300_000, tmp_path, "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)")
    assert full.stdout == f"went on with {2.0**18}\n", full.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="rights of another kind")
def test_ones_group_may_read_a_file(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        TensorStore(tmp_path, 1).get({"a": 1}, Counting())
    finally:
        os.umask(mask)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_of_something_else_under_the_name_is_not_taken(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, 1)
    store.get({"a": 1}, Counting(1.0))
    (first,) = tmp_path.glob("*.safetensors")
    store.get({"a": 2}, Counting(2.0))
    (second,) = set(tmp_path.glob("*.safetensors")) - {first}
    second.write_bytes(first.read_bytes())
    assert store.get({"a": 2}, Counting(2.0))["features"][0, 0] == 2


def test_the_longest_unused_goes_when_the_bound_is_reached(tmp_path: Path) -> None:
    size = TensorStore(tmp_path / "one", 1)
    size.get({}, Counting())
    one = size.entries()[0].size
    store = TensorStore(tmp_path / "two", 2.5 * one / 2**30)
    for i in range(2):
        store.get({"i": i}, Counting(i))
        path = max(store.folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.utime(path, (i, i))  # long ago, in this order
    store.get({"i": 0}, Counting(0))  # used again: now the other one is the longest unused
    store.get({"i": 2}, Counting(2))
    compute = Counting()
    for i in (0, 2):
        store.get({"i": i}, compute)
    assert compute.calls == 0
    store.get({"i": 1}, compute)
    assert compute.calls == 1
    assert sum(entry.size for entry in store.entries()) <= store.max_bytes


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    store, compute = TensorStore(tmp_path, 1000 / 2**30), Counting()
    for _ in range(2):
        assert store.get({}, compute)["features"].shape == (256, 4)
    assert compute.calls == 2 and store.entries() == []


def test_a_bound_of_zero_keeps_nothing(tmp_path: Path) -> None:
    store, compute = TensorStore(tmp_path / "none", 0), Counting()
    store.get({}, compute), store.get({}, compute)
    assert compute.calls == 2 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("bound", [-1, float("nan"), 1e308, float("inf")])
def test_a_bad_bound(tmp_path: Path, bound: float) -> None:
    with pytest.raises(InputError, match="expected a number of GiB, 0 to"):
        TensorStore(tmp_path, bound)


def test_a_folder_that_cannot_be_written_costs_the_keeping_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert TensorStore(tmp_path / "file", 1).get({}, Counting(5.0))["features"][0, 0] == 5


def test_clear(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, 1)
    for i in range(3):
        store.get({"i": i}, Counting())
    assert store.clear() == 3 and store.entries() == []


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from plpp_reg.io.store import TensorStore
store = TensorStore(Path(sys.argv[1]), 1)
computed = [lambda i=i: {"features": torch.full((20_000, 4), float(i))} for i in range(5)]
print([store.get({"i": i}, compute)["features"].double().sum().item() for i, compute in enumerate(computed)])
"""
    with contextlib.ExitStack() as both:
        asking = [both.enter_context(processes.started(code, str(tmp_path), stdout=subprocess.PIPE)) for _ in range(2)]
        answers = [process.stdout.read() for process in asking]
    assert answers[0] == answers[1] == f"{[80_000.0 * i for i in range(5)]}\n"
    assert len(list(tmp_path.iterdir())) == 5  # no temporary file stays
