"""What a script imports when it starts, read off its source and that of its own modules: nothing is imported here."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# modules whose package has another name on PyPI
PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "dassl": "",  # not on PyPI
    "open_clip": "open_clip_torch",
    "pkg_resources": "'setuptools<81'",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}
Find = Callable[[str], importlib.machinery.ModuleSpec | None]


def missing_imports(roots: list[Path], own: list[Path], find: Find) -> list[str]:
    """Modules, by their top-level names, that ``roots`` and what they load of ``own`` folders import, and that are not there.

    Args:
        roots: Python files.
        own: folders whose modules are read in turn; of any other it counts whether it is there.
        find: what ``import name`` of a top-level module finds, None: nothing.

    An import inside a function, or in a ``try`` that catches its failure, does not count.
    """
    missing: set[str] = set()
    queue, seen = list(roots), set(roots)
    while queue:
        file = queue.pop()
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # python itself will say what is wrong with it
        for level, name, members in _statements(tree):
            if level:
                found = _files(file.parents[level - 1], name, members)
            else:
                top, _, rest = name.partition(".")
                if top in sys.stdlib_module_names:
                    continue
                spec = find(top)
                if spec is None:
                    missing.add(top)
                    continue
                places = [Path(place) for place in spec.submodule_search_locations or []]
                found = [Path(spec.origin)] if spec.origin else []
                found += [f for place in places for f in _files(place, rest, members)]
            for path in found:
                if path not in seen and any(path.is_relative_to(folder) for folder in own):
                    seen.add(path)
                    queue.append(path)
    return sorted(missing)


def install_command(modules: list[str]) -> str:
    """The line that installs them."""
    return f"pip install {' '.join(PACKAGES.get(module, module) for module in modules if PACKAGES.get(module, module))}"


def _statements(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """(level, module, names imported from it) of each import that runs when the module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Try) and node.handlers:
            for part in (*node.orelse, *node.finalbody):
                yield from _statements(ast.Module([part], []))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _statements(node)


def _files(folder: Path, name: str, members: list[str]) -> list[Path]:
    """The files below ``folder`` that importing ``name`` of it, and ``members`` of that, loads."""
    parts = [part for part in name.split(".") if part]
    chains = [parts[: i + 1] for i in range(len(parts))] + [[*parts, member] for member in members]
    paths = [folder.joinpath(*chain) for chain in chains]
    return [f for path in [folder, *paths] for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()]
