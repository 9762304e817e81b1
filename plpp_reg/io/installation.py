"""``plpp doctor``: what is installed and imported from where, what will fail, and the command that mends it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from plpp_reg.errors import install
from plpp_reg.io.imports import install_command, missing_imports

OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 6)
PKG_RESOURCES_GONE = 81  # the first setuptools without it; openai-clip imports it


class Finding(NamedTuple):
    """One line of the report. ``fails``: what will not work; ``mend``: the command that puts it right."""

    what: str
    found: str
    fails: str = ""
    mend: str = ""


def doctor(folder: str | Path = ".") -> list[Finding]:
    """Look at this environment as a script in ``folder``, which may be a Dassl checkout, sees it. Nothing is written."""
    folder = Path(folder).resolve()
    checks: list[Callable[[Path], Iterator[Finding]]] = [_python, _torch, _numpy, _setuptools, _engine, _clip, _dassl, _devices]
    return [finding for check in checks for finding in check(folder)]


def report(findings: list[Finding]) -> str:
    """One line a finding; below a failing one what to do."""
    width = max(len(f.what) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{'FAIL' if f.fails else ' ok '} {f.what.ljust(width)}  {f.found}")
        if f.fails:
            lines.append(f"     {' ' * width}  {f.fails}")
            lines.append(f"     {' ' * width}  mend: {f.mend}")
    failing = sum(bool(f.fails) for f in findings)
    lines.append(f"{failing} of these will fail" if failing else "nothing here will fail")
    return "\n".join(lines)


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def number(version: str) -> tuple[int, ...]:
    """``"2.15.0+cpu"`` -> (2, 15, 0)."""
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def spec_of(module: str, folder: Path) -> importlib.machinery.ModuleSpec | None:
    """What ``import module`` finds in a script that stands in ``folder``."""
    path = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != folder)]
    return importlib.machinery.PathFinder.find_spec(module, path)


def _elsewhere(module: str) -> importlib.machinery.ModuleSpec | None:
    """Of editable installations, and of what is part of Python."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def place_of(spec: importlib.machinery.ModuleSpec) -> str:
    if spec.origin:
        return str(Path(spec.origin).parent)
    return next(iter(spec.submodule_search_locations or []), "?")


def _python(folder: Path) -> Iterator[Finding]:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    fails = "" if sys.version_info >= OLDEST_PYTHON else f"plpp-reg needs Python {oldest} or newer"
    yield Finding("python", f"{platform.python_version()} ({sys.executable})", fails, f"python{oldest} -m venv .venv")


def _torch(folder: Path) -> Iterator[Finding]:
    version = version_of("torch")
    if version is None:
        yield Finding("torch", "not installed", "everything needs it", "pip install 'torch>=2.6'")
    elif number(version) < OLDEST_TORCH:
        yield Finding("torch", version, "torch 2.6 or newer is needed", "pip install --upgrade 'torch>=2.6'")
    else:
        yield Finding("torch", version)


def _numpy(folder: Path) -> Iterator[Finding]:
    version = version_of("numpy")
    if version is None:
        yield Finding("numpy", "not installed", "training needs it", install("train"))
        return
    try:
        import torch

        torch.zeros(1).numpy()
    except RuntimeError:  # "Numpy is not available": built for another major version
        fails = f"torch {version_of('torch')} was built for another numpy"
        mend = "pip install 'numpy<2'" if number(version) >= (2,) else "pip install --upgrade numpy"
        yield Finding("numpy", version, fails, mend)
    except ImportError:
        yield Finding("numpy", version)  # no torch: said already
    else:
        yield Finding("numpy", version)


def _setuptools(folder: Path) -> Iterator[Finding]:
    version = version_of("setuptools")
    if version_of("openai-clip") is not None and importlib.util.find_spec("pkg_resources") is None:
        fails = f"openai-clip imports pkg_resources, which setuptools {PKG_RESOURCES_GONE} and later have not"
        yield Finding("setuptools", version or "not installed", fails, f"pip install 'setuptools<{PKG_RESOURCES_GONE}'")
    else:
        yield Finding("setuptools", version or "not installed")


def _engine(folder: Path) -> Iterator[Finding]:
    """What ``plpp train`` imports; in somebody's checkout it may be absent, for nothing there needs it."""
    needed = {"yacs": "yacs", "PyYAML": "yaml", "torchvision": "torchvision", "safetensors": "safetensors", "tqdm": "tqdm"}
    needed |= {"filelock": "filelock", "pillow": "PIL", "tensorboard": "tensorboard"}
    missing = [package for package, module in needed.items() if importlib.util.find_spec(module) is None]
    if missing and spec_of("dassl", folder) is None:
        yield Finding("plpp train", "cannot run", f"not installed: {', '.join(missing)}", install("train"))
    else:
        yield Finding("plpp train", f"not installed: {', '.join(missing)}" if missing else "has what it needs")


def _clip(folder: Path) -> Iterator[Finding]:
    spec = spec_of("clip", folder)
    installed = version_of("openai-clip")
    if spec is None:
        mend = "pip install openai-clip 'setuptools<81'"
        yield Finding("clip", "not installed", "backbones and the tokenizer come from it", mend)
        return
    place = Path(place_of(spec))
    if not (place / "simple_tokenizer.py").is_file() or not (place / "bpe_simple_vocab_16e6.txt.gz").is_file():
        mend = "pip uninstall -y clip && pip install openai-clip 'setuptools<81'"
        yield Finding("clip", str(place), "this is another package of that name, not OpenAI's", mend)
        return
    own = place.is_relative_to(folder)
    whose = "this checkout's own" if own else f"openai-clip {installed}" if installed else "OpenAI's"
    yield Finding("clip", f"{place} ({whose})")
    missing = [module for module in ("ftfy", "regex") if importlib.util.find_spec(module) is None]
    if missing:
        found = f"not installed: {', '.join(missing)}"
        yield Finding("clip needs", found, "its tokenizer imports them", f"pip install {' '.join(missing)}")
    if own and installed is None:
        fails = "plpp inspect and plpp-reg's own trainers need OpenAI's package beside the checkout's"
        yield Finding("openai-clip", "not installed", fails, "pip install openai-clip 'setuptools<81'")


def _dassl(folder: Path) -> Iterator[Finding]:
    spec = spec_of("dassl", folder)
    if spec is None:
        yield Finding("dassl", "not installed (only checkouts of CoOp's kind need it)")
        return
    place = place_of(spec)
    roots = [file for file in (folder / "train.py", Path(place) / "engine" / "__init__.py") if file.is_file()]
    missing = missing_imports(roots, [folder, Path(place)], lambda name: spec_of(name, folder) or _elsewhere(name))
    if missing:
        fails = f"it and the checkout import on start, and these are not installed: {', '.join(missing)}"
        yield Finding("dassl", place, fails, install_command(missing))
        return
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-W", "ignore", "-m", "plpp_reg.dassl", "--check"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("plpp: ")
        checkout = Path(place).parent
        mend = f"pip install -r {checkout / 'requirements.txt'} && pip install --no-build-isolation -e {checkout}"
        yield Finding("dassl", place, f"it cannot be imported: {last}", mend)
        return
    yield Finding("dassl", place)
    for line in done.stdout.strip().splitlines() if done.returncode == 1 else []:
        yield Finding("dassl, new torch", "python train.py", line, "python -m plpp_reg.dassl train.py … in its place")


def _devices(folder: Path) -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding(
            "GPU", "none: plpp train computes fp16 in fp32 then; a checkout needs PREC fp32 (some call .cuda() anyway)"
        )
        return
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    precisions = "fp32, fp16, amp" + (", bf16" if torch.cuda.is_bf16_supported() else "")
    if count > 1 and spec_of("dassl", folder) is not None:
        fails = "Dassl's trainers wrap their model in DataParallel then, on which PLPP is refused"
        yield Finding("GPU", f"{names} ({precisions})", fails, "export CUDA_VISIBLE_DEVICES=0")
    else:
        yield Finding("GPU", f"{names} ({precisions})")
