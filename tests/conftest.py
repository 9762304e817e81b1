"""Tiny random CLIPs in OpenAI's architecture: real vocabulary (so that the tokenizer works), everything else small.

The models are session-scoped and frozen; a test that changes one makes its own with ``make_clip`` or copies it.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from torch import nn

from plpp_reg.clip.load import freeze, from_weights, openai_clip

if TYPE_CHECKING:
    from plpp_reg.data import DataSplit

    from helpers.sweeps import Place, Swept

torch.set_num_threads(1)
pytest.register_assert_rewrite("helpers.sweeps")  # it holds tests
# derandomize: a red run is red again; no deadline: a shared machine is slow at times
settings.register_profile("plpp", deadline=None, derandomize=True, database=None)
settings.load_profile("plpp")

# the longest first: a process that began one of these when the others are done would let them wait
FIRST = ["workers_ray", "workers", "ranks", "benchmarks", "export", "kills", "dassl", "demo", "machine", "typing"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of ``FIRST`` before all others; each file's tests, and the other files, stay in their order."""
    places = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


def pytest_collection_finish() -> None:
    """What is imported by now stays, and most of what tests make goes by itself: to look less often saves a twentieth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


VOCABULARY, CONTEXT_LENGTH = 49408, 77


def make_clip(
    width: int = 128,
    layers: int = 3,
    *,
    resnet: bool = False,
    embed_dim: int = 32,
    vision_layers: int = 2,
    vision_width: int = 64,
    image_resolution: int = 32,
    patch_size: int = 16,
    context_length: int = CONTEXT_LENGTH,
    seed: int = 0,
) -> nn.Module:
    """A frozen float32 ``clip.model.CLIP`` with random weights; the global random stream is left as it was.

    ``resnet``: a ModifiedResNet with one block a stage instead of a ViT; vision_layers, vision_width and patch_size are the
    ViT's then and are ignored.
    """
    vision = ((1, 1, 1, 1), 8, None) if resnet else (vision_layers, vision_width, patch_size)
    return freeze(from_weights(_weights(embed_dim, image_resolution, *vision, context_length, width, layers, seed=seed)))


@functools.lru_cache(maxsize=8)  # most of a model is its vocabulary, and drawing that takes longest
def _weights(*sizes: Any, seed: int) -> dict[str, torch.Tensor]:
    *others, width, layers = sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = openai_clip().model.CLIP(*others, VOCABULARY, width, width // 64, layers)
        # OpenAI's initial biases are 0, norms 1 and the ResNet's branches closed: a mix-up of those would not show.
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                    module.weight.normal_(1, 0.1)
                    module.bias.normal_(0, 0.1)
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
                if isinstance(module, nn.MultiheadAttention):
                    module.in_proj_bias.normal_(0, 0.1)
                    module.out_proj.bias.normal_(0, 0.1)
    return model.state_dict()


@pytest.fixture(name="make_clip", scope="session")
def make_clip_fixture():
    """The factory itself, for tests that want another size or a model of their own."""
    return make_clip


@pytest.fixture(scope="session", autouse=True)
def contents_of_their_own(tmp_path_factory: pytest.TempPathFactory):
    """What is remembered of the content of made-up images is not left in the user's cache."""
    from plpp_reg.data import contents

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(contents, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cut():
    """Tests kill processes, not the machine: what is written need not have reached the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def tiny_vit() -> nn.Module:
    return make_clip()


@pytest.fixture(scope="session")
def tiny_resnet() -> nn.Module:
    return make_clip(width=64, layers=2, resnet=True)


@pytest.fixture(scope="module")
def pristine():
    """Of attach's tests: what ``clip_model`` is a copy of."""
    return make_clip(width=64, layers=2)


@pytest.fixture
def clip_model(pristine):
    """In float64, so that equal means equal. A copy: hosts share its modules, and a hook left there is not the next test's."""
    model = copy.deepcopy(pristine).double()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # OpenAI's own computes in float32
    return model


@pytest.fixture(scope="module")
def batch():
    """Of attach's tests: three images (B, 3, H, W) and their labels."""
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
