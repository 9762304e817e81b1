"""What is distributed: the source, which is the whole checkout; the wheel made of it, which works away from the checkout;
and that ``import plpp_reg`` needs torch alone."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import plpp_reg

from helpers import engine as helpers
from helpers import processes


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """What git has or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    names = filter(None, listed.stdout.split("\0"))
    return [name for name in names if (helpers.ROOT / name).is_file() and not name.startswith("shared/")]


@pytest.fixture(scope="module")
def distributions(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it.

    Made of a copy, so that neither the checkout's build/ nor its egg-info is touched.
    """
    place = tmp_path_factory.mktemp("build")
    for name in tracked:
        target = place / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(helpers.ROOT / name, target)
    # No isolation, no dependencies: nothing is downloaded.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(place / "tree")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return place / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (built,) = distributions.glob("*.whl")
    return built


def test_the_source_distribution_is_the_whole_checkout(distributions: Path, tracked: list[str]) -> None:
    # docs/ builds from it and tests/ run in it as they do here.
    (built,) = distributions.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("plpp_reg.egg-info/")}
    assert names - made == set(tracked)


def test_one_version_is_said_everywhere() -> None:
    citation = (helpers.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == plpp_reg.__version__
    released = re.findall(r"^## (\S+)", (helpers.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert released[:2] == ["Unreleased", plpp_reg.__version__]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def test_the_wheel_holds_what_a_run_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"plpp_reg/{path.relative_to(helpers.ROOT / 'plpp_reg').as_posix()}"
        for path in (helpers.ROOT / "plpp_reg").rglob("*")
        if path.suffix in (".py", ".csv", ".safetensors", ".typed", ".md", ".j2") and "__pycache__" not in path.parts
    }
    for folder in ("trainers", "configs"):
        expected |= {
            f"plpp_reg/{path.relative_to(helpers.ROOT).as_posix()}"
            for path in (helpers.ROOT / folder).rglob("*")
            if path.suffix in (".py", ".yaml")
        }
    assert expected <= names, sorted(expected - names)
    for name in (
        "plpp_reg/trainers/coop.py",
        "plpp_reg/configs/trainers/CoOp/embedded.yaml",
        "plpp_reg/configs/datasets/emoji.yaml",
        "plpp_reg/clip/embedded.safetensors",
        "plpp_reg/clip/embedded.LICENSES.md",
        "plpp_reg/data/emoji.csv",
        "plpp_reg/py.typed",
    ):
        assert name in names


def test_the_wheel_puts_nothing_else_at_the_top(wheel: Path) -> None:
    # A top-level `trainers` would shadow, or be shadowed by, that of a CoOp-like checkout.
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    info = {name for name in top if name.endswith(".dist-info")}
    assert len(info) == 1 and top == {"plpp_reg"} | info


def test_the_wheel_requires_torch_alone_and_has_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    lines = archive.read(f"{info}/METADATA").decode().splitlines()
    always = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in always] == ["torch"]
    assert "plpp = plpp_reg.commands.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


TRAIN = """
import sys
target, checkout = sys.argv[1:3]
import plpp_reg, plpp_reg.trainers, plpp_reg.configs
for module in (plpp_reg, plpp_reg.trainers, plpp_reg.configs):
    assert module.__file__.startswith(target), module.__file__
from plpp_reg.commands.cli import main
status = main(sys.argv[3:])
stray = [name for name, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(checkout + "/")]
assert not stray, stray
sys.exit(status)
"""


def test_the_installed_wheel_trains_on_the_embedded_default(installed: Path, tmp_path: Path) -> None:
    short = ["DATASET.NUM_SHOTS", "1", "OPTIM.MAX_EPOCH", "2", "TEST.SPLIT", "val"]
    argv = [str(installed), str(helpers.ROOT), "train", "--output-dir", str(tmp_path / "out"), *short]
    done = processes.run(TRAIN, *argv, path=[installed], cwd=tmp_path, package=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["trainer"], result["dataset"], result["backbone"]) == ("CoOp_PLPP", "emoji", "embedded")
    assert 0 <= result["metrics"]["accuracy"] <= 100 and {"ce", "ppl", "inverse_ppl"} <= result["losses"].keys()
    assert (tmp_path / "out" / "prompt_learner" / "model.pth.tar-2").is_file()


TORCH_ALONE = """
import sys
import torch
allowed = {name.split(".")[0] for name in sys.modules} | {"torch", "plpp_reg"} | set(sys.stdlib_module_names)

class Forbid:
    refused = []
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed and not top.startswith("_"):
            self.refused.append(name)
            raise ModuleNotFoundError(f"forbidden here: {name}", name=name)

sys.meta_path.insert(0, Forbid())
before = set(sys.modules)
import plpp_reg
new = {name.split(".")[0] for name in set(sys.modules) - before}
reg = plpp_reg.PerplexityRegularizer(torch.randn(50, 8), weight=0.5)
context = torch.randn(4, 8, requires_grad=True)
loss = reg(context, torch.randn(4, 8))
loss.backward()
assert loss.isfinite() and context.grad.abs().sum() > 0
assert reg.components(context, torch.randn(4, 8)).perplexity > 1
for name in ("clip", "yacs", "yaml", "torchvision", "PIL", "safetensors", "filelock", "tqdm", "pkg_resources", "scipy"):
    assert name not in sys.modules or name in allowed, name
assert new <= allowed, new - allowed
# Only what is asked for is loaded: neither the engine nor CLIP.
loaded = [name for name in sys.modules if name.startswith(("plpp_reg.engine", "plpp_reg.clip", "plpp_reg.trainers"))]
assert not loaded, loaded
try:
    import yacs
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the hook forbids nothing")
"""


def test_import_needs_torch_alone(installed: Path, tmp_path: Path) -> None:
    words, env = [sys.executable, "-c", TORCH_ALONE], {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("plpp_reg.datasets", "plpp_reg.data", "load_dataset"),
        ("plpp_reg.engine.data", "plpp_reg.data.loaders", "ImageDataset"),
        ("plpp_reg.engine.data", "plpp_reg.data.augmentation", "build_transform"),
    ],
)
def test_a_module_of_version_0_1_is_found_and_says_where_it_went(old: str, new: str, name: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=new.replace(".", r"\.")):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
