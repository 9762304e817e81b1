"""The Python of README.md and docs/ runs as it stands, page by page, on the embedded model; so do the examples of docstrings.

What a page needs before it and a reader would only trip over stands in the page as an ``invisible-code-block``.
"""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
SYBIL = Sybil([PythonCodeBlockParser(), SkipParser()])

# `skip: next` in a page, for a snippet that cannot run here, with its reason; each is named here too
NOT_RUN = {
    "README.md": [
        "needs a file that was exported: tests/test_export.py runs it on a small model",
        "needs OpenAI's weights: tests/test_export.py runs it on a small model",
    ],
    "hosts.md": ["needs Dassl: tests/test_dassl.py"],
}
OPTIONAL = [] if find_spec("transformers") else ["needs transformers"]


def has_python(path: Path) -> bool:
    return re.search(r"^ *```python", path.read_text(encoding="utf-8"), re.M) is not None


def examples_of_docstrings() -> list[str]:
    files = [path for folder in ("plpp_reg", "trainers") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [path.relative_to(ROOT) for path in files if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found]


@pytest.fixture(autouse=True)
def a_readers_place(tmp_path, monkeypatch):
    """An empty folder with the repository's configs/ and examples/ at hand."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if has_python(path)])
def test_the_python_of_a_page_runs(name):
    skipped = []
    for example in SYBIL.parse(PAGES[name]).examples():
        try:
            example.evaluate()
        except SkipTest as e:
            skipped.append(str(e))
    assert [reason for reason in skipped if reason not in OPTIONAL] == NOT_RUN.get(name, [])


@pytest.mark.parametrize("name", PAGES)
def test_no_block_is_of_a_language_that_nobody_runs(name):
    """A ```py, or Python that is only indented, would be passed over; command lines are tests/test_docs.py's."""
    text = PAGES[name].read_text(encoding="utf-8")
    assert set(re.findall(r"^ *```(\S+)", text, re.M)) <= {"python", "bash", "text", "{toctree}", "{eval-rst}"}
    unfenced = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.M | re.S)
    assert not re.findall(r"^ {4}(?:from|import|class|def|>>>) .*", unfenced, re.M)


@pytest.mark.parametrize("name", examples_of_docstrings())
def test_the_examples_of_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted and not failed


def test_the_guide_shows_the_example_as_it_is():
    source = (ROOT / "examples" / "own_method.py").read_text(encoding="utf-8")
    assert source.partition("\n\n")[2] in PAGES["guide.md"].read_text(encoding="utf-8")
