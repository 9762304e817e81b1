"""The published figures: they parse, and what does not follow from its own row is exactly what misprints.csv records."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest

from plpp_reg.results import record as results
from plpp_reg.results.tables import literature

FOLDER = Path(literature.__file__).parents[1] / "published"
NAMES = {
    "base_to_new",
    "base_to_new_by_shots",
    "cross_dataset",
    "domain_generalization",
    "few_shot",
    "promptkd_teacher",
    "promptkd_imagenet",
}
PRINTED_TO = {"base_to_new": 0.011, "base_to_new_by_shots": 0.011}  # base and new are rounded to 0.01, and so is H
TEXT = {"method", "dataset", "source", "shots", "studied", "value"}

Wrong = set[tuple[str, str, str, str, str]]


def test_every_file_is_there_and_every_figure_is_an_accuracy() -> None:
    assert {path.stem for path in FOLDER.glob("*.csv")} == NAMES | {"misprints"}
    assert (len(literature.read_published("base_to_new")), len(literature.read_published("few_shot"))) == (404, 142)
    for name in NAMES:
        for line in literature.read_published(name):
            assert line["source"], (name, line)
            for key, value in line.items():
                if key not in TEXT and not key.startswith("n_") and value:
                    assert 10 < float(value) < 100, (name, key, line)


def test_promptkds_own_studies_agree_with_each_other() -> None:
    lines = literature.read_published("promptkd_imagenet")
    for line in lines:
        assert line["hm"] or line["base"]
        if line["hm"] and line["base"]:
            h = results.harmonic_mean(float(line["base"]), float(line["new"]))
            assert abs(h - float(line["hm"])) < PRINTED_TO["base_to_new"], line
    usual = {(line["studied"], line["value"]): (line["base"], line["new"], line["hm"]) for line in lines}
    base, new, h = usual["images a class", "64"]  # the setting that the other studies start from
    assert usual["teacher", "PromptSRC ViT-L/14"][:2] == (base, new) and usual["temperature", "1"][2] == h


def recorded(columns: set[str]) -> Wrong:
    found = literature.read_published("misprints")
    return {(m["file"], m["method"], m["dataset"], m["shots"], m["column"]) for m in found if m["column"] in columns}


def test_the_recorded_misprints_are_the_only_rows_whose_h_does_not_follow() -> None:
    wrong: Wrong = set()
    for name in ("base_to_new", "base_to_new_by_shots"):
        for line in literature.read_published(name):
            if not line["base"]:  # PLPP's first version: the average H alone is public
                assert line["dataset"] == "Average" and "PLPP" in line["method"]
                continue
            h = results.harmonic_mean(float(line["base"]), float(line["new"]))
            if abs(h - float(line["hm"])) > PRINTED_TO[name]:
                wrong.add((name, line["method"], line["dataset"], line.get("shots", ""), "hm"))
    assert wrong == recorded({"hm"})


def test_the_recorded_misprints_are_the_only_averages_that_do_not_follow() -> None:
    wrong: Wrong = set()
    by_method: dict[str, dict[str, dict[str, str]]] = {}
    for line in literature.read_published("base_to_new"):
        by_method.setdefault(line["method"], {})[line["dataset"]] = line
    whole = [method for method, lines in by_method.items() if len(lines) == 12]
    assert len(whole) == 31
    for method in whole:
        lines = by_method[method]
        for column in ("base", "new"):
            mean = statistics.fmean(float(line[column]) for d, line in lines.items() if d != "Average")
            if abs(mean - float(lines["Average"][column])) > 0.011:
                wrong.add(("base_to_new", method, "Average", "", column))
    for name, first in (("cross_dataset", 2), ("domain_generalization", 2)):
        for line in literature.read_published(name):
            targets = [v for k, v in list(line.items())[first:-2]]
            if all(targets) and line["Average_targets"]:
                if abs(statistics.fmean(map(float, targets)) - float(line["Average_targets"])) > 0.011:
                    wrong.add((name, line["method"], "", "", "Average_targets"))
    assert wrong == recorded({"base", "new", "Average_targets"})


def test_what_follows_is_what_the_misprints_say() -> None:
    for m in literature.read_published("misprints"):
        (line,) = [
            line
            for line in literature.read_published(m["file"])
            if line["method"] == m["method"] and line.get("dataset", "") == m["dataset"] and line.get("shots", "") == m["shots"]
        ]
        assert line[m["column"]] == m["printed"]
        if m["column"] == "hm":
            assert results.harmonic_mean(float(line["base"]), float(line["new"])) == pytest.approx(
                float(m["follows"]), abs=0.006
            )


def test_the_readme_counts_the_rows() -> None:
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.csv"):
        with path.open(newline="") as file:
            assert f"| {path.name} | {len(list(csv.DictReader(file)))} |" in text, path.name


@pytest.mark.parametrize(
    ("printed", "ours"),
    [
        ("CLIP", "ZeroshotCLIP"),
        ("CoOp", "CoOp"),
        ("CoOp [rerun in DePT]", "CoOp"),
        ("CoOp+PLPP [ICLR24 submission]", "CoOp_PLPP"),
        ("CoCoOp [PLPP ICLR24 submission baseline]", "CoCoOp"),
        ("IVLP (4+4 ctx, depth 9, 20 ep)", "IVLP"),
        ("CoOp+ATPrompt", "CoOp+ATPrompt"),
        ("DePT (CoOp+DePT)", "DePT"),
    ],
)
def test_whose_figures_a_row_has(printed: str, ours: str) -> None:
    assert literature.our_name(printed) == ours
