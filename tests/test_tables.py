"""Tables of recorded runs: golden ones, their statistics by hand and by scipy, and what must not be counted."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
from scipy import stats

from plpp_reg.commands.cli import main
from plpp_reg.errors import InputError
from plpp_reg.results import tables
from plpp_reg.results.record import harmonic_mean
from plpp_reg.results.tables import rows

from helpers.records import record

DTD = {
    "CoOp": [(80.0, 50.0), (79.0, 52.0), (81.0, 48.0)],
    "CoOp_PLPP": [(80.5, 55.0), (80.0, 55.5), (80.0, 54.0)],
}
EUROSAT = {
    "CoOp": [(90.0, 60.0), (92.0, 56.0), (91.0, 64.0)],
    "CoOp_PLPP": [(90.0, 62.0), (93.0, 61.0), (92.0, 66.0)],
}


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    for dataset, methods in (("dtd", DTD), ("eurosat", EUROSAT)):
        for method, seeds in methods.items():
            for seed, (base, new) in enumerate(seeds, start=1):
                record(tmp_path, method, seed, {"base": base, "new": new}, dataset)
    return tmp_path


GOLDEN = """\
## base_to_new (ViT-B/16)

| data set | method | base | new | H | seeds | reference |
|---|---|---:|---:|---:|---:|---|
| DTD | CoOp | 80.00 ± 1.00 | 50.00 ± 2.00 | 61.54 ± 1.22 | 3 |  |
| DTD | CoOp_PLPP | 80.17 ± 0.29 | 54.83 ± 0.76 | 65.12 ± 0.56 | 3 |  |
| DTD | CoOp_PLPP - CoOp | +0.17 ± 2.59 | +4.83 ± 3.13 | +3.61 ± 1.77 | 3 |  |
| EuroSAT | CoOp | 91.00 ± 1.00 | 60.00 ± 4.00 | 72.32 ± 2.77 | 3 |  |
| EuroSAT | CoOp_PLPP | 91.67 ± 1.53 | 63.00 ± 2.65 | 74.68 ± 1.92 | 3 |  |
| EuroSAT | CoOp_PLPP - CoOp | +0.67 ± 1.43 | +3.00 ± 4.30 | +2.40 ± 3.59 | 3 |  |
| Average of 2 | CoOp | 85.50 ± 0.50 | 55.00 ± 1.00 | 66.94 ± 0.83 | 3 |  |
| Average of 2 | CoOp_PLPP | 85.92 ± 0.63 | 58.92 ± 0.95 | 69.90 ± 0.69 | 3 |  |
| Average of 2 | CoOp_PLPP - CoOp | +0.42 ± 1.29 | +3.92 ± 0.95 | +2.96 ± 1.05 | 3 |  |

Accuracy in percent, mean ± sample standard deviation over seeds. Differences are paired over seeds, ± half the 95% interval \
(Student's t). H is the harmonic mean of the mean base and the mean new accuracy, in the average too; its spread is that of \
each seed's H.
"""


def test_golden_markdown(halves: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["table", str(halves), "--no-published"]) == 0
    assert capsys.readouterr().out == GOLDEN


def test_the_golden_figures_are_right() -> None:
    """By hand and scipy, not by the code that made them."""
    base, new = zip(*DTD["CoOp"], strict=True)
    assert f"{statistics.fmean(new):.2f} ± {statistics.stdev(new):.2f}" == "50.00 ± 2.00"
    assert f"{2 * 80 * 50 / 130:.2f}" == "61.54"  # H of the averages
    average, treated = (
        [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(DTD[m], EUROSAT[m], strict=True)]
        for m in ("CoOp", "CoOp_PLPP")
    )
    assert f"{harmonic_mean(85.5, 55.0):.2f}" == "66.94"
    interval = stats.ttest_rel([b for _, b in treated], [b for _, b in average]).confidence_interval(0.95)
    assert f"{(interval.high + interval.low) / 2:+.2f} ± {(interval.high - interval.low) / 2:.2f}" == "+3.92 ± 0.95"
    h = stats.ttest_rel([harmonic_mean(*x) for x in treated], [harmonic_mean(*x) for x in average]).confidence_interval(0.95)
    assert f"{(h.high + h.low) / 2:+.2f} ± {(h.high - h.low) / 2:.2f}" == "+2.96 ± 1.05"


def test_mean_h_beside_h_of_the_averages(halves: Path) -> None:
    text = tables.tables_text(halves, "markdown", mean_h=True, published=False)
    line = next(x for x in text.splitlines() if x.startswith("| Average of 2 | CoOp |"))
    assert line.split("|")[5].strip().startswith("66.94")
    assert line.split("|")[6].strip() == f"{(2 * 80 * 50 / 130 + 2 * 91 * 60 / 151) / 2:.2f}" == "66.93"


def figures(text: str, **wanted: str) -> dict[str, float]:
    rows = [row for row in csv.DictReader(io.StringIO(text)) if all(row[k] == v for k, v in wanted.items())]
    return {row["column"]: float(row["value"]) for row in rows}


def test_csv_has_every_figure_unrounded(halves: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert main(["table", str(halves), "--format", "csv", "--output", str(path)]) == 0
    text = path.read_text()
    found = figures(text, group="Average of 2", method="CoOp", kind="measured")
    assert found == {"base": 85.5, "new": 55.0, "H": harmonic_mean(85.5, 55.0)}
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["group"] == "DTD" and row["column"] == "new"]
    assert [float(row["spread"]) for row in rows if (row["method"], row["kind"]) == ("CoOp", "measured")] == [2.0]


def test_golden_latex(halves: Path) -> None:
    text = tables.tables_text(halves, "latex", published=False)
    assert r"DTD & CoOp\_PLPP & 80.17 $\pm$ 0.29 & 54.83 $\pm$ 0.76 & 65.12 $\pm$ 0.56 & 3 \\" in text
    assert text.count(r"\midrule") == 3 and r"\caption{base\_to\_new, ViT-B/16. Accuracy" in text
    assert text.count("{") == text.count("}")


def test_published_rows_stand_by_themselves_with_their_source(halves: Path) -> None:
    rows = [line.split(" | ") for line in tables.tables_text(halves, "markdown").splitlines() if "(published)" in line]
    dtd = {row[1]: row for row in rows if row[0] == "| DTD"}
    assert "CoOp (published)" in dtd and "CoOp [rerun in DePT] (published)" in dtd
    assert dtd["CoOp (published)"][2:5] == ["79.44", "41.18", "54.24"] and "PromptKD" in dtd["CoOp (published)"][6]
    assert not any("CoCoOp" in row[1] or "ATPrompt" in row[1] for row in rows)
    assert not any(row[0].startswith("| Average") for row in rows)  # theirs is over 11 data sets
    measured = figures(tables.tables_text(halves, "csv"), group="DTD", method="CoOp", kind="measured")
    assert measured["base"] == 80.0  # published figures enter no mean of ours


def test_published_averages_stand_beside_the_papers_eleven_alone(tmp_path: Path) -> None:
    short = ["imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397"]
    for dataset in [*short, "dtd", "eurosat", "ucf101"]:
        for method in ("CoOp", "CoOp_PLPP"):
            record(tmp_path, method, 1, {"base": 80.0, "new": 60.0}, dataset)
    text = tables.tables_text(tmp_path, "markdown")
    assert "| Average of 11 | CoOp (published) | 82.69 | 63.22 | 71.66 |" in text
    plpp = next(line for line in text.splitlines() if "CoOp+PLPP [ICLR24 submission] (published)" in line)
    assert "|  |  | 71.44 |" in plpp
    misprint = next(line for line in text.splitlines() if "Average of 11 | CoOp [rerun in DePT]" in line)
    assert "new as printed, 69.99 follows: not the mean of its rows" in misprint
    order = [line.split(" | ")[0] for line in text.splitlines() if "| CoOp |" in line]
    assert order == [f"| {name}" for name in (*rows.PAPERS, "Average of 11")]


def test_no_published_row_beside_another_model_or_other_shots(tmp_path: Path) -> None:
    record(tmp_path / "a", "CoOp", 1, {"base": 80.0, "new": 60.0}, backbone="RN50")
    record(tmp_path / "b", "CoOp", 1, {"base": 80.0, "new": 60.0}, shots=4)
    for folder in ("a", "b"):
        assert "(published)" not in tables.tables_text(tmp_path / folder, "markdown")


def test_few_shot_table(tmp_path: Path) -> None:
    for dataset, offset in (("dtd", 0.0), ("ucf101", 10.0)):
        record(tmp_path, "ZeroshotCLIP", 1, {"accuracy": 40.0 + offset}, dataset, protocol="few_shot", shots=1)
        for shots in (1, 16):
            for seed in (1, 2):
                accuracy = {"accuracy": 45.0 + shots + seed + offset}
                record(tmp_path, "CoOp", seed, accuracy, dataset, protocol="few_shot", shots=shots)
    text = tables.tables_text(tmp_path, "markdown", published=False)
    assert "| data set | method | 1 | 16 | seeds | reference |" in text
    assert "| DTD | ZeroshotCLIP | 40.00 | 40.00 | 1 |" in text  # the same at any number of shots
    assert "| DTD | CoOp | 47.50 ± 0.71 | 62.50 ± 0.71 | 2 |" in text
    assert "| Average of 2 | CoOp | 52.50 ± 0.71 | 67.50 ± 0.71 | 2 |" in text
    record(tmp_path, "CoOp", 3, {"accuracy": 50.0}, "dtd", protocol="few_shot", shots=1)
    text = tables.tables_text(tmp_path, "markdown", published=False)
    assert "| DTD | CoOp | 48.33 ± 1.53 | 62.50 ± 0.71 | 2-3 |" in text
    assert "| Average of 2 | CoOp | 52.50 ± 0.71 | 67.50 ± 0.71 | 2 |" in text  # of the seeds that every data set has


def test_targets_table_beside_published_figures(tmp_path: Path) -> None:
    targets = {"source": 71.0, "imagenetv2": 64.0, "imagenet_sketch": 48.0, "imagenet_a": 50.0, "imagenet_r": 76.0}
    for seed in (1, 2):
        record(tmp_path, "CoOp", seed, {k: v + seed for k, v in targets.items()}, "imagenet", protocol="domain_generalization")
    text = tables.tables_text(tmp_path, "markdown")
    columns = "source | ImageNetV2 | ImageNet-Sketch | ImageNet-A | ImageNet-R | average"
    assert f"| data set | method | {columns} | seeds | reference |" in text
    ours = " | ".join(f"{v:.2f} ± 0.71" for v in (72.5, 65.5, 49.5, 51.5, 77.5, 61.0))
    assert f"| ImageNet | CoOp | {ours} | 2 |" in text
    assert "| ImageNet | CoOp (published) | 71.51 | 64.20 | 47.99 | 49.71 | 75.21 | 59.28 |" in text
    assert "RN50" not in text and "CLIP-" not in text


def test_a_variant_is_paired_with_the_plain_method(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        record(tmp_path, "CoOp", seed, {"base": 70.0 + seed, "new": 60.0})
        record(tmp_path, "CoOp_PLPP", seed, {"base": 71.0 + seed, "new": 60.0})
        record(tmp_path, "CoOp_PLPP", seed, {"base": 72.0 + seed, "new": 60.0}, variant="TOP_K=3")
    text = tables.tables_text(tmp_path, "markdown", published=False)
    assert "| DTD | CoOp_PLPP - CoOp | +1.00 ± 0.00 | +0.00 ± 0.00 |" in text
    assert "| DTD | CoOp_PLPP TOP_K=3 - CoOp | +2.00 ± 0.00 | +0.00 ± 0.00 |" in text


def test_rows_of_promptkd_are_marked_as_transductive_and_compared_with_nothing(tmp_path: Path) -> None:
    for method, base in (("CoOp", 80.0), ("CoOp_PLPP", 81.0), ("PromptKD", 90.0)):
        for seed in (1, 2):
            record(tmp_path, method, seed, {"base": base + seed, "new": 60.0 + seed}, "dtd")
    text = tables.tables_text(tmp_path, "markdown")
    labels = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| DTD | ")]
    ours = [label for label in labels if label.startswith("PromptKD")]
    assert "PromptKD (transductive)" in ours and "PromptKD (published, transductive)" in ours
    assert [label for label in labels if "transductive" in label] == ours
    assert "CoOp_PLPP - CoOp" in labels and not [label for label in ours if " - " in label]
    assert "Rows marked transductive were trained on the images and the names of the new classes, without labels" in text
    assert "transductive" in tables.tables_text(tmp_path, "latex") and "transductive" in tables.tables_text(tmp_path, "csv")


def test_of_targets_the_literatures_students_alone_are_marked(tmp_path: Path) -> None:
    """They learn from each target's images; a student of ours of the source does not."""
    targets = ("caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397", "dtd")
    accuracies = {"source": 70.0, **dict.fromkeys((*targets, "eurosat", "ucf101"), 60.0)}
    record(tmp_path, "PromptKD", 1, accuracies, "imagenet", protocol="cross_dataset")
    text = tables.tables_text(tmp_path, "markdown")
    labels = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ImageNet | ")]
    assert labels == ["PromptKD", "PromptKD (transductive) (published)"]
    assert "were trained on images and the names of the data sets that they are tested on, without labels" in text


def test_few_shots_of_the_trained_classes_bear_no_mark(tmp_path: Path) -> None:
    for shots in (1, 2):
        record(tmp_path, "PromptKD", 1, {"accuracy": 50.0 + shots}, "dtd", protocol="few_shot", shots=shots)
    assert "transductive" not in tables.tables_text(tmp_path, "markdown", published=False)


def test_pairs_are_by_seed_not_by_place(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        record(tmp_path, "CoOp", seed, {"base": 10.0 * seed, "new": 50.0})
    for seed in (2, 3, 4):
        record(tmp_path, "CoOp_PLPP", seed, {"base": 10.0 * seed + 1, "new": 50.0})
    text = tables.tables_text(tmp_path, "markdown", published=False)
    assert "| DTD | CoOp_PLPP - CoOp | +1.00 ± 0.00 | +0.00 ± 0.00 |" in text
    assert text.splitlines()[6].endswith("| 2 |  |")


def test_what_is_missing_or_failed_is_named_and_not_counted(halves: Path) -> None:
    record(halves, "CoOp", 4, {"base": 0.0, "new": 0.0}, finished=False)
    failed = record(halves, "CoOp", 5, {"base": 0.0, "new": 0.0}, "eurosat", finished=False)
    (failed / "failed.json").write_text(json.dumps({"error": "loss 'ce' is nan", "log": []}))
    cut = record(halves, "CoOp", 6, {"base": 0.0, "new": 0.0})
    (cut / "result.json").write_text((cut / "result.json").read_text()[:50])
    stale = record(halves, "CoOp", 7, {"base": 0.0, "new": 0.0})
    (stale / "job.json").write_text((stale / "job.json").read_text().replace('"key": "0"', '"key": "1"'))
    other = record(halves / "superseded", "CoOp", 8, {"base": 0.0, "new": 0.0})
    assert (other / "result.json").is_file()
    text = tables.tables_text(halves, "markdown", published=False)
    assert text.startswith(GOLDEN)
    assert text[len(GOLDEN) :].strip().splitlines() == [
        "Missing, 4 runs:",
        "",
        "- base_to_new: dtd, 16 shots, CoOp, seed 4: not finished",
        "- base_to_new: dtd, 16 shots, CoOp, seed 6: its result.json cannot be read",
        "- base_to_new: dtd, 16 shots, CoOp, seed 7: not run yet with these settings",
        "- base_to_new: eurosat, 16 shots, CoOp, seed 5: failed: loss 'ce' is nan",
    ]
    assert "missing" in tables.tables_text(halves, "csv") and "% missing: base_to_new" in tables.tables_text(halves, "latex")


def test_an_average_lacks_a_method_that_lacks_a_data_set(halves: Path) -> None:
    record(halves, "KgCoOp", 1, {"base": 99.0, "new": 99.0})
    text = tables.tables_text(halves, "markdown", published=False)
    assert "| DTD | KgCoOp | 99.00 | 99.00 | 99.00 | 1 |" in text and "| Average of 2 | KgCoOp" not in text
    assert "- KgCoOp is not in Average of 2: it lacks EuroSAT." in text.splitlines()
    assert "| Average of 2 | CoOp | 85.50 ± 0.50 |" in text


def test_a_folder_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match="expected a folder that plpp run wrote"):
        tables.read_runs(tmp_path / "none")
    assert main(["table", str(tmp_path)]) == 2
    assert "expected runs of plpp run or plpp train in it, got none" in capsys.readouterr().err
