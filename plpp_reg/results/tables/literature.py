"""Published figures: rows of their own, marked as such, each with its source."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Mapping, Sequence
from importlib import resources

from plpp_reg.loss import SUFFIX
from plpp_reg.results.tables.rows import Row, title_of
from plpp_reg.results.tables.series import AVERAGE, Figure, H
from plpp_reg.results.tables.settings import Name

PUBLISHED_NAMES = {"CLIP": "ZeroshotCLIP", "Zero-shot CLIP": "ZeroshotCLIP", "Deep Vision Prompting": "VPT"}
TARGET_COLUMNS = {"ImageNet_source": "source", "Average_targets": AVERAGE}
FILES = {"halves": ("base_to_new", "base_to_new_by_shots"), "targets": ("cross_dataset", "domain_generalization")}


@functools.cache
def read_published(name: str) -> list[dict[str, str]]:
    """A file of plpp_reg/results/published/, every value as it is printed."""
    text = resources.files("plpp_reg.results.published").joinpath(f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def our_name(method: str) -> str:
    """``"CoOp [rerun in DePT]"`` -> CoOp, ``"CoOp+PLPP [ICLR24 submission]"`` -> CoOp_PLPP: whose figures a row has."""
    plain = re.split(r" [\[(]", method)[0].replace("+PLPP", SUFFIX)
    return PUBLISHED_NAMES.get(plain, plain)


def published_rows(
    title: str, form: str, backbone: str, dataset: str, shots: int, methods: Sequence[str], columns: Sequence[str]
) -> list[Row]:
    """Rows of the literature for these methods, where ours are comparable: the same backbone, data set and shots."""
    if backbone != "ViT-B/16":
        return []
    if form == "targets":
        return _published_targets(title, dataset, shots, methods, columns)
    if form == "shots":
        return _published_shots(title, dataset, methods, columns)
    rows = []
    for file in FILES[form]:
        for line in read_published(file):
            wanted = (
                line["dataset"] == dataset and int(line.get("shots") or 16) == shots and our_name(line["method"]) in methods
            )
            if wanted and not (file == "base_to_new_by_shots" and shots == 16):  # those stand in base_to_new too
                cells = {c: Figure(float(line[k])) for c, k in (("base", "base"), ("new", "new"), (H, "hm")) if line[k]}
                rows.append(_published(title, file, line, cells))
    return rows


def _published(title: str, file: str, line: Mapping[str, str], cells: Mapping[str, Figure]) -> Row:
    wrong = [
        f"{m['column']} as printed, {m['follows']} follows: {m['note']}"
        for m in read_published("misprints")
        if m["file"] == file and m["method"] == line["method"] and m["dataset"] == line.get("dataset", "")
        if m["shots"] == line.get("shots", "")
    ]
    name = Name(our_name(line["method"]))
    return Row(title, line["method"], "published", name, cells, source="; ".join([line["source"], *wrong]))


def _published_shots(title: str, dataset: str, methods: Sequence[str], columns: Sequence[str]) -> list[Row]:
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for line in read_published("few_shot"):
        if line["dataset"] == dataset and our_name(line["method"]) in methods and line["shots"] in columns:
            found.setdefault((line["method"], line["source"]), {})[line["shots"]] = Figure(float(line["accuracy"]))
    return [
        _published(title, "few_shot", {"method": m, "source": source, "dataset": dataset}, cells)
        for (m, source), cells in found.items()
    ]


def _published_targets(title: str, dataset: str, shots: int, methods: Sequence[str], columns: Sequence[str]) -> list[Row]:
    if dataset != "ImageNet" or shots != 16:
        return []
    rows = []
    for file in FILES["targets"]:
        lines = read_published(file)
        named = {TARGET_COLUMNS.get(k, k): k for k in lines[0] if k not in ("method", "source")}
        ours = {column: column if column in ("source", AVERAGE) else title_of(column) for column in columns}
        if sorted(ours.values()) != sorted(named):
            continue  # other targets: their average is another figure
        for line in lines:
            other_backbone = re.search(r"\[(RN50|ViT-B/32|ViT-H/14)\]", line["method"])
            if our_name(line["method"]) in methods and not other_backbone:
                cells = {c: Figure(float(line[named[t]])) for c, t in ours.items() if line[named[t]]}
                rows.append(_published(title, file, line, cells))
    return rows
