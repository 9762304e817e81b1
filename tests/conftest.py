"""What many tests share. Nothing large is imported here: of xdist's processes the first collects nothing, and all wait for it.

The models are session-scoped and frozen; a test that changes one makes its own with ``make_clip`` or copies it.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from plpp_reg.data import DataSplit

    from helpers.sweeps import Place, Swept

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("helpers.sweeps")  # it holds tests

# the longest first: a process that began one of these when the others are done would let them wait. Beside Ray's, which wait
# for other processes, those that compute
FIRST = ["workers_ray", "export", "benchmarks", "methods", "ranks", "workers", "kills", "dassl", "demo", "machine", "typing"]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # a process that runs tests
        import torch
        from hypothesis import settings

        torch.set_num_threads(1)
        # derandomize: a red run is red again; no deadline: a shared machine is slow at times
        settings.register_profile("plpp", deadline=None, derandomize=True, database=None)
        settings.load_profile("plpp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of ``FIRST`` before all others; each file's tests, and the other files, stay in their order."""
    places = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


def pytest_collection_finish() -> None:
    """What is imported by now stays, and most of what tests make goes by itself: to look less often saves a twentieth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(name="make_clip", scope="session")
def make_clip_fixture() -> Callable[..., nn.Module]:
    """The factory itself, for tests that want another size or a model of their own."""
    from helpers.clips import make_clip

    return make_clip


@pytest.fixture(scope="session", autouse=True)
def contents_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of the content of made-up images is not left in the user's cache."""
    from plpp_reg.data import contents

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(contents, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Tests kill processes, not the machine: what is written need not have reached the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def tiny_vit(make_clip: Callable[..., nn.Module]) -> nn.Module:
    return make_clip()


@pytest.fixture(scope="session")
def tiny_resnet(make_clip: Callable[..., nn.Module]) -> nn.Module:
    return make_clip(width=64, layers=2, resnet=True)


@pytest.fixture(scope="module")
def pristine(make_clip: Callable[..., nn.Module]) -> nn.Module:
    """Of attach's tests: what ``clip_model`` is a copy of."""
    return make_clip(width=64, layers=2)


@pytest.fixture
def clip_model(pristine: nn.Module) -> nn.Module:
    """In float64, so that equal means equal. A copy: hosts share its modules, and a hook left there is not the next test's."""
    from helpers.literal import double

    return double(copy.deepcopy(pristine))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Of attach's tests: three images (B, 3, H, W) and their labels."""
    import torch

    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a command reads: pictures, a backbone, a recipe and a finished run; a file with other needs makes its own."""
    from helpers.cli import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a report says: its figures are put together, and nothing is drawn of them."""
    from plpp_reg.results import plots

    def empty(_figure: object, name: str, title: str, alt: str) -> plots.Picture:
        return plots.Picture(name, title, alt, '<svg aria-hidden="true"></svg>', b"")

    monkeypatch.setattr(plots, "_picture", empty)


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each of several methods, and their pictures."""
    from helpers import engine, trained
    from helpers.shared import made_once

    engine.register()
    return made_once(tmp_path_factory, "trained", trained.make_runs)


@pytest.fixture(scope="session")
def resumable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted, in ``whole``, and what it was made of."""
    from helpers import resume
    from helpers.shared import made_once

    return made_once(tmp_path_factory, "resumable", resume.make_world)


@pytest.fixture
def tiny_and_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``resumable``'s run was made: data set ``tiny``, and losses that read the random stream."""
    from helpers import resume

    resume.make_tiny_and_noisy(monkeypatch)


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that teach, and what a student of theirs is made of."""
    from helpers import teaching
    from helpers.shared import made_once

    return made_once(tmp_path_factory, "taught", teaching.make_world)


@pytest.fixture
def taught_data(taught: Path) -> DataSplit:
    """The images that ``taught``'s runs were made with."""
    from helpers import engine

    return engine.read_tiny(taught / "data")


@pytest.fixture
def kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data set ``tiny`` exists, and the cache is the test's own."""
    from plpp_reg.data import DATASETS, DatasetEntry

    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sweep_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """What the sweeps of a file are made of."""
    from helpers.sweeps import make_place

    return make_place(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def sweep_one(sweep_place: Place) -> Swept:
    """The sweep of one run after another, with which an executor's is compared."""
    from helpers.sweeps import METHODS, swept

    return swept(sweep_place, "one", "--methods", *METHODS)


@pytest.fixture
def in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The test stands in its own folder, where a default output folder would appear; data set ``tiny`` exists."""
    from plpp_reg.data import DATASETS, DatasetEntry

    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    monkeypatch.chdir(tmp_path)
