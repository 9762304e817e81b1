"""What the documentation and configs/ name exists: command lines resolve, configuration files merge, links lead to files."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import warnings
from pathlib import Path

import pytest

from plpp_reg.commands import cli
from plpp_reg.engine import config, registry
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.experiments.jobs import Choice, plan
from plpp_reg.loss import SUFFIX
from plpp_reg.loss.regularizer import settings_defaults

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "protocols"]


def command_lines() -> list[str]:
    texts = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES]
    lines = [line for text in texts for line in text.splitlines()]
    return [part.split(" #")[0].strip() for line in lines for part in re.findall(r"(?:^|&& )(plpp [^&`]+)", line.strip())]


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_means_something(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    args = cli._parsed(shlex.split(line)[1:])
    if args.command == "train":
        fields = {name: getattr(args, name) for name in RunArguments._fields}
        resolve(RunArguments(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}))
    if args.command == "run":
        assert plan(args.protocol, Choice(**{name: getattr(args, name) for name in Choice._fields}), args.output)


def test_there_are_command_lines_to_check():
    assert len(command_lines()) >= 5


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_configuration_file_merges(file):
    config.merge_file(config.get_cfg_default(), file)


@pytest.mark.parametrize("name", registry.trainer_names())
@pytest.mark.parametrize("backbone", ["", "ViT-B/16"])
def test_every_trainer_resolves_without_a_file(name, backbone):
    cfg, _ = resolve(RunArguments(trainer=name, backbone=backbone))
    assert cfg.TRAINER.NAME == name and "normalize" in cfg.INPUT.TRANSFORMS
    assert cfg.TRAINER.PLPP.ENABLED == name.endswith(SUFFIX)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_on_the_method_lists_every_setting_with_its_default():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for name, default in settings_defaults().items():
        row = re.search(rf"\| `{name}` \| `?([^|`]+)`? \|", text)
        assert row is not None, f"{name} is not in the table"
        assert row[1].strip() == str(default), f"{name}: the page says {row[1]}, the code {default}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strict: a page outside the navigation, a link, an anchor or a name in a docstring that leads nowhere is an error."""
    from sphinx.cmd.build import build_main  # not while tests are collected

    place = tmp_path_factory.mktemp("site")
    build = ["-W", "--keep-going", "-q", "-d", str(place / "doctrees"), str(ROOT / "docs"), str(place / "html")]
    with contextlib.redirect_stderr(io.StringIO()) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Sphinx's extensions use what a later Sphinx will not have
        status = build_main(build)
    assert status == 0, said.getvalue()[-4000:]
    return place / "html"


def test_the_site_has_every_page_and_the_docstrings(site):
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {path.stem for path in site.glob("*.html")}
    reference = (site / "api.html").read_text(encoding="utf-8")
    for name in (
        "PerplexityRegularizer",
        "loss.functional.plpp",
        "attach",
        "with_plpp",
        "clip.text.TextTower",
        "clip.prompts.PromptLearner",
        "engine.method.Method.losses",
    ):
        assert f'id="plpp_reg.{name}"' in reference


def test_reading_the_site_fetches_nothing(site):
    in_html = r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*"
    in_css = r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\s]*"
    read = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(read) > 10
    for path in read:
        assert not re.findall(f"{in_html}|{in_css}", path.read_text(encoding="utf-8")), path.name


def test_what_readme_guide_and_examples_import_is_said_to_be_public():
    table = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    rows = [re.sub("[`|]", " ", line).split() for line in table if line[:1] == "|"]
    words = {word.strip(",;").rpartition(".")[2] for row in rows for word in row}
    modules = {row[0] for row in rows if row and row[0].startswith("plpp_reg")} | {"plpp_reg"}
    texts = [page.read_text(encoding="utf-8") for page in [*PAGES, *sorted((ROOT / "examples").glob("*.py"))]]
    found = [m for text in texts for m in re.findall(r"from (plpp_reg[\w.]*) import ([A-Za-z_][\w, ]*)", text)]
    assert len(found) > 10
    for module, names in found:
        assert any(module == m or module.startswith(f"{m}.") for m in modules), module
        for name in names.split(","):
            known = name.strip() in words or module.rpartition(".")[2] in ("prompts", "text", "vision", "functional")
            assert known, f"{module} {name}"
