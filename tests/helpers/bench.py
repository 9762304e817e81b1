"""A small protocol of one's own on the tiny data set, for the tests of plans and of sweeps."""

from __future__ import annotations

from pathlib import Path

import yaml

from plpp_reg.experiments.jobs import Choice, Job, plan
from plpp_reg.results import tables

from helpers import engine as helpers

PROTOCOL = {
    "table": "halves",
    "methods": ["ZeroshotCLIP", "CoOp", "CoOp_PLPP"],
    "datasets": ["tiny"],
    "seeds": [1, 2],
    "shots": [2],
    "set": {"DATASET.SUBSAMPLE_CLASSES": "base"},
    "test": "base",
    "tests": {"new": {"DATASET.SUBSAMPLE_CLASSES": "new"}},
}


class Bench:
    """A small protocol of one's own, on the tiny data set and a tiny model."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.images = helpers.make_images(place / "images")
        self.backbone = helpers.write_backbone(place / "tiny.pt")
        self.recipe = helpers.write_recipe(place / "recipe.yaml")
        self.output = place / "out"
        self.protocol = place / "small.yaml"
        self.write()

    def write(self, **changes: object) -> None:
        content = {**PROTOCOL, "recipe": [str(self.recipe)], **changes}
        self.protocol.write_text(yaml.safe_dump(content))

    def choice(self, **changes: object) -> Choice:
        return Choice(root=str(self.images), backbone=str(self.backbone))._replace(**changes)

    def plan(self, **changes: object) -> list[Job]:
        return plan(str(self.protocol), self.choice(**changes), self.output)

    def argv(self, *more: str) -> list[str]:
        flags = ["--root", str(self.images), "--backbone", str(self.backbone), "--output", str(self.output)]
        return ["run", str(self.protocol), *flags, *more]

    def tables(self, output: Path | None = None) -> dict[str, str]:
        return {form: tables.tables_text(output or self.output, form) for form in tables.WRITERS}
