"""What the documentation and configs/ name exists: command lines resolve, configuration files merge, links lead to files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from plpp_reg import cli
from plpp_reg.engine import config, registry
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.protocols import Choice, plan
from plpp_reg.regularizer import settings_defaults

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "protocols"]


def command_lines() -> list[str]:
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    return [part.split(" #")[0].strip() for line in lines for part in re.findall(r"(?:^|&& )(plpp [^&`]+)", line.strip())]


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_means_something(line):
    args = cli._parser().parse_args(shlex.split(line)[1:])
    cli._check_opts(args.opts)
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
    assert cfg.TRAINER.PLPP.ENABLED == name.endswith(registry.SUFFIX)


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
