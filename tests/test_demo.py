"""plpp demo: its table, its picture, and that what is done is not done again."""

from __future__ import annotations

import dataclasses
import io
import statistics

import pytest
from PIL import Image
from scipy import stats

from plpp_reg.commands import cli
from plpp_reg.engine import run
from plpp_reg.experiments import demo
from plpp_reg.results import style
from plpp_reg.results.record import read_result


@pytest.fixture(autouse=True)
def fewer_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is tested on every fifth picture: what a demo does with the figures is asked here, not how good they are."""
    load = run.load_data

    def fewer(*args, **options):
        data = load(*args, **options)
        return dataclasses.replace(data, test=data.test[::5])

    monkeypatch.setattr(run, "load_data", fewer)


def runs_of(base: list[float], new: list[float]) -> list[demo.DemoRun]:
    return [demo.DemoRun(b, n, [3000.0, 40.5], ["cat 0.50"]) for b, n in zip(base, new, strict=True)]


def test_the_table_is_paired_over_seeds():
    plain, treated = runs_of([50, 52, 55], [30, 31, 29]), runs_of([51, 52, 57], [33, 31, 33])
    text = demo.report([20.0, 10.0], {"CoOp": plain, "CoOp_PLPP": treated}, [1, 2, 3])
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "13.3" in rows["zero-shot"]  # harmonic mean of 20 and 10
    assert "52.3 ± 2.5" in rows["CoOp"] and "3,000" in rows["CoOp"] and "40.5" in rows["CoOp"]
    low, high = stats.ttest_rel([33, 31, 33], [30, 31, 29]).confidence_interval(0.95)
    assert f"{(low + high) / 2:+.1f} ± {(high - low) / 2:.1f}" in rows["difference"]


def test_demo_trains_prints_and_draws_and_goes_on(tmp_path, capsys):
    arguments = ["demo", "--seeds", "0", "3", "--output-dir", str(tmp_path / "demo")]
    arguments += ["OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    for name in ("zero-shot", "CoOp", "CoOp_PLPP", "difference", "Nearest words"):
        assert name in first
    assert (tmp_path / "demo" / "demo.txt").read_text() in first
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert min(picture.size) >= 400
    results = {p.parent: read_result(p.parent) for p in (tmp_path / "demo").rglob("result.json")}
    assert {r["seed"] for r in results.values()} == {0, 3}
    assert {r["config"]["DATASET.SUBSAMPLE_CLASSES"] for r in results.values()} == {"base", "new"}
    trained = list((tmp_path / "demo").rglob("model.pth.tar-1"))
    assert len(trained) == 4  # two seeds, plain and PLPP; nothing else is trained
    written = {p: p.stat().st_mtime_ns for p in trained}
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.split("\n\n")[1] == first.split("\n\n")[1]
    assert {p: p.stat().st_mtime_ns for p in trained} == written  # done is not done again


def test_several_methods_stand_in_one_table_each_beside_its_own_plain_one(tmp_path, capsys):
    arguments = ["demo", "--methods", "VPT", "IVLP", "--seeds", "2", "--output-dir", str(tmp_path / "demo")]
    assert cli.main([*arguments, "OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    first = [line.split()[0] for line in lines[2:]]
    assert first == ["zero-shot", "VPT", "IVLP", "IVLP_PLPP", "difference"]
    assert (tmp_path / "demo" / "demo.png").is_file()


def test_several_methods_over_several_seeds(tmp_path, monkeypatch):
    """Which figure stands where; nothing is trained for it."""
    base = {"VPT": [30, 31], "IVLP": [50, 52], "IVLP_PLPP": [51, 55]}  # of seeds 4 and 2
    monkeypatch.setattr(demo.Bench, "evaluate", lambda _, name, half, *more: {"base": 20.0, "new": 10.0}[half])
    monkeypatch.setattr(
        demo.Bench,
        "train_base_to_new",
        lambda _, name, seed: demo.DemoRun(base[name][[4, 2].index(seed)], 40.0, [9.0, 3.0], [f"{name} of {seed}"]),
    )
    said = []
    text = demo.demo([4, 2], tmp_path, (), ["VPT", "IVLP"], said.append)
    assert [line.split(":")[0].split() for line in said] == [[name, "seed", seed] for seed in "42" for name in base]
    first, _, *rows = text.split("\n\n")[0].splitlines()
    assert "2 seeds (mean ± std)" in first and "paired over seeds" in rows[5]
    assert [row.split()[0] for row in rows[:5]] == ["zero-shot", *base, "difference"]
    for row, values in zip(rows[1:4], base.values(), strict=True):
        assert row.split()[1:4] == [f"{statistics.mean(values):.1f}", "±", f"{statistics.stdev(values):.1f}"]
    low, high = stats.ttest_rel(base["IVLP_PLPP"], base["IVLP"]).confidence_interval(0.95)
    assert rows[4].split()[1:4] == [f"{(low + high) / 2:+.1f}", "±", f"{(high - low) / 2:.1f}"]
    assert text.split("\n\n")[1].splitlines()[1:] == [f"  {name}: {name} of 2" for name in base]  # the last seed's
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) >= 250


@pytest.mark.parametrize(
    "names",
    [["VPT"], ["VPT", "PromptKD"], ["CoOp", "CoOp_PLPP"], ["VPT", "IVLP", "IVLP_PLPP"], ["A", "A_PLPP", "B", "B_PLPP", "C"]],
)
def test_any_methods_have_one_picture(names):
    """One pair or none: accuracies by method; more: what PLPP changes in each."""
    runs = {name: [demo.DemoRun(50.0 + seed, 40.0, [9.0, 3.0], ["a"]) for seed in range(2)] for name in names}
    with Image.open(io.BytesIO(demo.draw(runs, [1, 2]))) as picture:
        assert min(picture.size) >= 250


def test_methods_without_labels_and_what_is_said_of_them(tmp_path, capsys):
    folder, short = tmp_path / "demo", ["OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1", "INPUT.VIEWS", "1"]
    arguments = ["demo", "--seeds", "1", "--output-dir", str(folder), "--methods"]
    assert cli.main([*arguments, "PromptKD", "CoOp_KDPL", "FDBPL", *short]) == 0
    text = (folder / "demo.txt").read_text()
    assert text.startswith("Embedded CLIP, emoji, 1 shot,")
    rows = ["PromptKD", "CoOp_KDPL", "CoOp_KDPL_PLPP", "difference", "FDBPL", "FDBPL_PLPP", "difference"]
    assert [line.split()[0] for line in text.splitlines()[2:10]] == ["zero-shot", *rows]
    assert "Without labels, from the teacher of the recipe: PromptKD, CoOp_KDPL, CoOp_KDPL_PLPP, FDBPL, FDBPL_PLPP" in text
    results = [read_result(p.parent) for p in (folder / "PromptKD").rglob("result.json")]
    assert {r["teacher"]["settings"]["templates"] for r in results} == {"sixty"}
    # PromptKD alone, which is done already: without context and without a form with PLPP all figures are there
    (folder / "demo.png").unlink()
    assert cli.main([*arguments, "PromptKD", *short]) == 0
    assert "Nearest words" not in (folder / "demo.txt").read_text() and (folder / "demo.png").is_file()


def test_an_unknown_method(tmp_path, capsys):
    assert cli.main(["demo", "--output-dir", str(tmp_path / "demo"), "--methods", "MaPLE"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'MaPLe'" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("key", demo.DECIDED)
def test_what_the_demo_decides_is_not_set(key, tmp_path, capsys):
    assert cli.main(["demo", "--output-dir", str(tmp_path / "demo"), key, "1"]) == 2
    assert f"plpp demo: expected no {key}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("seeds", [["1", "1"], ["-2"], ["x"]])
def test_bad_seeds(seeds, tmp_path, capsys):
    assert cli.main(["demo", "--output-dir", str(tmp_path / "demo"), "--seeds", *seeds]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("low", "high", "shown"), [(80, 12_000, {"100", "1,000", "10,000"}), (31, 78, {"40", "60"})])
def test_logarithmic_axes_have_plain_numbers(low, high, shown):
    """Text is not read as mathematics, so that names are safe; matplotlib's own labels would be."""
    with style.settings():
        figure = style.figure(4, 4)
        axes = figure.subplots()
        axes.plot([low, high])
        style.logarithmic(axes)
        style.png(figure)
        labels = {text.get_text() for text in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True))}
    assert shown <= labels and not any("$" in text for text in labels)
