"""plpp doctor: every fault that it knows, made to happen, and the command that it gives for it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plpp_reg.commands.cli import main
from plpp_reg.io import installation as d

from helpers import processes

HOSTS = Path(__file__).parent / "hosts"


def finding(folder: Path, what: str) -> d.Finding:
    found = [f for f in d.doctor(folder) if f.what == what]
    assert found, what
    return found[0]


@pytest.fixture(autouse=True)
def without_a_host(monkeypatch):
    """Other tests put hosts on the path."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "hosts" not in p])


def test_this_environment_is_sound(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "nothing here will fail"
    assert torch.__version__.split("+")[0] in out and sys.executable in out and "openai-clip" in out
    assert "dassl" in out and "GPU" in out


def test_a_fault_gives_status_1_and_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(d, "OLDEST_TORCH", (99,))
    assert main(["doctor", "--folder", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAIL torch"))
    assert "mend: pip install --upgrade 'torch>=2.6'" in lines[at + 2]
    assert lines[-1] == "1 of these will fail"


@pytest.mark.parametrize(
    ("package", "what", "mend"),
    [
        ("torch", "torch", "pip install 'torch>=2.6'"),
        ("numpy", "numpy", 'pip install -e ".[train]" (in the clone of plpp-reg)'),
    ],
)
def test_what_is_not_installed(tmp_path, monkeypatch, package, what, mend):
    version_of = d.version_of
    monkeypatch.setattr(d, "version_of", lambda name: None if name == package else version_of(name))
    found = finding(tmp_path, what)
    assert (found.found, found.mend) == ("not installed", mend) and found.fails


@pytest.mark.parametrize(
    ("module", "what", "mend"),
    [
        ("pkg_resources", "setuptools", "pip install 'setuptools<81'"),
        ("yacs", "plpp train", 'pip install -e ".[train]" (in the clone of plpp-reg)'),
        ("ftfy", "clip needs", "pip install ftfy"),
    ],
)
def test_modules_that_are_not_there(tmp_path, monkeypatch, module, what, mend):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find_spec(name, *a))
    found = finding(tmp_path, what)
    assert found.fails and found.mend == mend


def test_numpy_of_another_major_version(tmp_path, monkeypatch):
    def numpy(self):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    version_of = d.version_of
    for version, mend in (("2.1.0", "pip install 'numpy<2'"), ("1.26.4", "pip install --upgrade numpy")):
        monkeypatch.setattr(d, "version_of", lambda name, v=version: v if name == "numpy" else version_of(name))
        assert finding(tmp_path, "numpy").mend == mend


def test_pypis_other_clip(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("")
    found = finding(tmp_path, "clip")
    assert "another package" in found.fails and found.mend.startswith("pip uninstall -y clip && pip install openai-clip")


def test_a_checkouts_own_clip(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    for name in ("__init__.py", "simple_tokenizer.py", "bpe_simple_vocab_16e6.txt.gz"):
        (tmp_path / "clip" / name).write_text("")
    assert finding(tmp_path, "clip").found == f"{tmp_path / 'clip'} (this checkout's own)"
    version_of = d.version_of
    monkeypatch.setattr(d, "version_of", lambda name: None if name == "openai-clip" else version_of(name))
    assert "need OpenAI's package beside" in finding(tmp_path, "openai-clip").fails


def test_a_dassl_that_a_new_torch_broke(tmp_path, monkeypatch):
    def forked(
        words: list[str], *, cwd: Path, env: dict[str, str], capture_output: bool, text: bool
    ) -> subprocess.CompletedProcess:
        assert words == [sys.executable, "-W", "ignore", "-m", "plpp_reg.dassl", "--check"] and capture_output and text
        return processes.run(processes.DASSL, "--check", path=env["PYTHONPATH"].split(os.pathsep), cwd=cwd, package=False)

    (tmp_path / "dassl").symlink_to(HOSTS / "dassl")
    monkeypatch.setattr(subprocess, "run", forked)
    found = [f for f in d.doctor(tmp_path) if f.what.startswith("dassl")]
    assert found[0].found == str(tmp_path / "dassl") and not found[0].fails
    assert len(found) >= 2  # the frozen learning rate is there on every torch
    assert all(f.mend == "python -m plpp_reg.dassl train.py … in its place" for f in found[1:])
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 2, "", "plpp: No module named 'gdown'")
    )
    broken = finding(tmp_path, "dassl")
    assert broken.fails == "it cannot be imported: No module named 'gdown'"
    assert broken.mend.startswith(f"pip install -r {tmp_path / 'requirements.txt'} && pip install")


CHECKOUT = {
    "train.py": "import os.path, argparse\nfrom dassl.engine import build\nimport trainers.coop\nimport datasets.pets as p\n",
    "trainers/__init__.py": "",
    "trainers/coop.py": "import torch\nfrom .extra import plot\nfrom absent_a.deep import thing\n",
    "trainers/extra.py": "def plot():\n    import only_when_called\n",
    "trainers/unused.py": "import nobody_asks\n",
    "datasets/pets.py": "try:\n    import accelerated\nexcept ImportError:\n    pass\nimport yaml, sklearn_like\n",
    "dassl/__init__.py": "",
    "dassl/engine/__init__.py": "from .build import build\nfrom . import da\nif True:\n    import absent_b as b\n",
    "dassl/engine/build.py": "class Builder:\n    import absent_c\n",
    "dassl/engine/da.py": "from ..utils import tools\n",
    "dassl/utils/__init__.py": "",
    "dassl/utils/tools.py": "import cv2\nimport absent_d\n",
}


def test_all_that_a_checkout_lacks_is_named_at_once(tmp_path, monkeypatch):
    for name, text in CHECKOUT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    spec_of = d.spec_of
    monkeypatch.setattr(d, "spec_of", lambda name, folder: None if name == "cv2" else spec_of(name, folder))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "cv2" else find_spec(name, *a))
    found = finding(tmp_path, "dassl")
    missing = ["absent_a", "absent_b", "absent_c", "absent_d", "cv2", "sklearn_like"]
    assert found.fails.endswith(f"are not installed: {', '.join(missing)}")
    assert found.mend == "pip install absent_a absent_b absent_c absent_d opencv-python sklearn_like"


def test_several_gpus_in_a_checkout(tmp_path, monkeypatch):
    for name, value in {"is_available": True, "device_count": 2, "get_device_name": "H", "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, v=value: v)
    plain = finding(tmp_path, "GPU")
    assert plain.found == "H, H (fp32, fp16, amp, bf16)" and not plain.fails
    monkeypatch.setattr(d, "_dassl", lambda folder: iter(()))
    (tmp_path / "dassl").mkdir()
    (tmp_path / "dassl" / "__init__.py").write_text("")
    assert finding(tmp_path, "GPU").mend == "export CUDA_VISIBLE_DEVICES=0"


def test_versions_compare_as_numbers():
    assert d.number("2.15.0+cpu") > d.number("2.6") and d.number("2.7.0a0") == (2, 7)
