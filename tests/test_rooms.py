"""The order of the rooms: an import goes only to a room above, inside a function too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import plpp_reg
import plpp_reg.trainers
from plpp_reg.engine import registry
from plpp_reg.experiments import jobs

PACKAGE = Path(plpp_reg.__file__).parent
TRAINERS = Path(plpp_reg.trainers.__file__).parent
ORDER = (
    "errors",
    "io",
    "loss",
    "attachment",
    "clip",
    "data",
    "results",
    "engine",
    "trainers",
    "experiments",
    "prompts",
    "estimate",
    "dassl",
    "commands",
)
# The top of the package knows where its public names are. `trainers` itself is a table, which imports nothing.
ABOVE_ALL = ("plpp_reg", "plpp_reg.trainers", "plpp_reg.configs")
# What a room may load beside the standard library (and, in a function, beside what its rooms above may).
LIBRARIES = {
    "loss": {"torch"},
    "io": {"torch", "safetensors", "filelock", "PIL", "yaml", "numpy"},
    "results": {"matplotlib", "jinja2", "scipy"},
}


def modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in ((PACKAGE, "plpp_reg"), (TRAINERS, "plpp_reg.trainers")):
        for path in folder.rglob("*.py"):
            name = ".".join([prefix, *path.relative_to(folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    room = module.split(".")[1]
    return {"__main__": "commands", "datasets": "data"}.get(room, room)  # the latter is a room's name of before, for a version


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; what is there for type checkers alone is not imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_an_import_goes_to_a_room_above(module: str) -> None:
    if module in ABOVE_ALL:
        return
    room = room_of(module)
    for name in imports(MODULES[module]):
        if name.partition(".")[0] == "plpp_reg" and name not in ABOVE_ALL:
            assert ORDER.index(room_of(name)) <= ORDER.index(room), f"{module} imports {name}"
        elif room in LIBRARIES:
            library = name.partition(".")[0]
            assert library in LIBRARIES[room] | set(sys.stdlib_module_names) | {"plpp_reg", "__future__"}, name


def test_every_room_is_in_the_order() -> None:
    rooms = {room_of(name) for name in MODULES if name != "plpp_reg"}
    assert rooms == set(ORDER) | {"configs"} - ({"configs"} - rooms)


def test_the_table_of_methods_imports_nothing_and_is_right() -> None:
    assert not list(imports(MODULES["plpp_reg.trainers"]))
    for name in plpp_reg.trainers.TRAINERS:
        cls, *_ = registry.find_trainer(name)
        assert plpp_reg.trainers.NODES[name] == cls.Config.node
        assert (name in plpp_reg.trainers.UNTRAINED) != jobs.learns(name)


def test_results_loads_neither_torch_nor_the_engine() -> None:
    results = [name for name in MODULES if name.startswith("plpp_reg.results")]
    code = f"import sys\nfor name in {results!r}: __import__(name)\n"
    code += "print(sorted(n for n in sys.modules if n.partition('.')[0] in ('torch', 'torchvision', 'numpy', 'yacs') "
    code += "or n.startswith('plpp_reg.engine')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_page_for_contributors_has_the_order_and_names_what_is_there() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "contributing.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. `(?:plpp_reg/)?(\w+)(?:/|\.py)`", page, flags=re.MULTILINE)
    assert tuple(listed) == ORDER
    named = [place for place in re.findall(r"`((?:plpp_reg|trainers|configs|tests)/[^`]*)`", page) if "<" not in place]
    assert len(named) > 25
    for place in named:
        assert (root / place).exists(), place
