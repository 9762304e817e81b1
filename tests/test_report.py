"""plpp report: what is on the page, what may not be, and that nobody's file name becomes markup."""

from __future__ import annotations

import io
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from plpp_reg.commands.cli import main
from plpp_reg.prompts.recorded import PromptReader
from plpp_reg.results import plots, style, tables
from plpp_reg.results.report.grids import plain_forms
from plpp_reg.results.report.runs import pairs_of, runs_of
from plpp_reg.results.tables import records
from plpp_reg.results.tables.rows import title_of
from plpp_reg.results.tables.settings import Name

from helpers.made_up import METHODS, SHORT, complete, made_up_sweep
from helpers.records import record
from helpers.report_page import Page, report_of


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("sweep")
    made_up_sweep(folder, ["dtd", "eurosat"], ["CoOp", "CoOp_PLPP"], epochs=3)
    made_up_sweep(folder, ["dtd"], ["CoOp", "CoOp_PLPP"], (1, 2), shots=(1, 4), epochs=0)
    return folder, report_of(folder)


def test_every_runs_configuration_is_there(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    shown = [text for _, text in page.of("pre", class_="config")]
    runs = [path.parent for path in folder.rglob("result.json")]
    assert len(shown) == len(runs) == 2 * 2 * 3 + 2 * 2 * 2
    for run in runs:
        assert sum(f'OUTPUT_DIR: "made up, {run.as_posix()}"' in text for text in shown) == 1
    assert all("OPTIM.LR: 0.002" in text for text in shown)
    cards = page.of("details", class_="run")
    assert len(cards) == len(runs) and "base_to_new: dtd, 16 shots, CoOp_PLPP, seed 2" in cards[4][1]


@pytest.mark.usefixtures("undrawn")
def test_the_pages_figures_are_those_of_the_tables(sweep: tuple[Path, Page], tmp_path: Path) -> None:
    folder, page = sweep
    made = tables.make_tables(tables.read_runs(folder))
    shown = " ".join(page.text.split())
    rows = [" ".join(text.split()) for _, text in page.of("tr")]
    for table in made:
        for row in table.rows:
            for column, figure in row.cells.items():
                assert f"{figure.value:.2f}" in shown, (row.label, column)
        last = table.rows[-1]
        values = " ".join(
            f"{f.value:{'+' if last.kind == 'difference' else ''}.2f}" + ("" if math.isnan(f.spread) else f" ± {f.spread:.2f}")
            for f in (last.cells[c] for c in table.columns)
        )
        flat = values.replace(" ", "")
        assert any(r.replace(" ", "").startswith(f"{last.label}{flat}".replace(" ", "")) for r in rows), values
    assert any("(published)" in row for row in rows)
    without = report_of(folder, output=tmp_path / "page.html", published=False)
    assert "(published)" not in " ".join(text for _, text in without.of("tr"))


def test_an_overview_has_a_column_a_data_set_and_the_average_first(sweep: tuple[Path, Page]) -> None:
    _, page = sweep
    head = next(text for _, text in page.of("thead"))
    assert re.sub(r"\s", "", head) == "methodAverageof2DTDEuroSAT"
    captions = [text for _, text in page.of("caption")]
    assert captions[0] == "base_to_new (ViT-B/16): H, a column a data set"
    opened = [attributes for attributes, _ in page.of("details") if "open" in attributes]
    assert opened  # the first overview is seen without a click


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_all_data_sets_and_methods_is_whole(tmp_path: Path) -> None:
    made_up_sweep(tmp_path, seeds=(1, 2), epochs=0)
    page = report_of(tmp_path)
    head, *_ = (text for _, text in page.of("thead"))  # of the overview
    assert re.sub(r"\s", "", head) == re.sub(r"\s", "", "method Average of 11 " + " ".join(map(title_of, SHORT)))
    overview = [text for _, text in page.of("tr", class_="measured")][: len(METHODS)]
    assert {re.match(r"\w+?(?=\d)", text).group() for text in overview} == set(METHODS) and len(METHODS) == 12
    assert all(len(re.findall(r"\d\d\.\d\d ± ", text)) == 12 for text in overview)  # the average, and a figure a data set
    assert "Missing" not in page.text and len(page.of("details", class_="run")) == 11 * 12 * 2


@pytest.mark.usefixtures("undrawn")
def test_a_difference_is_bold_where_its_interval_leaves_out_0(tmp_path: Path) -> None:
    for seed, (plain, treated) in enumerate([(50.0, 52.0), (51.0, 53.1), (52.0, 53.9)], start=1):
        record(tmp_path, "CoOp", seed, {"base": 80.0 + seed, "new": plain}, backbone="embedded")
        record(tmp_path, "CoOp_PLPP", seed, {"base": 80.0 - seed, "new": treated}, backbone="embedded")
    page = report_of(tmp_path)
    bold = {text for _, text in page.of("span", class_="clear")}
    assert bold == {"+2.00"}  # new: +2.0, +2.1, +1.9; base: -2, -4, -6 has the interval -4 ± 4.97


@pytest.mark.usefixtures("undrawn")
def test_figures_are_drawn_of_the_right_numbers(
    sweep: tuple[Path, Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = sweep
    drawn: dict[str, tuple] = {}

    def seen(draw):
        def wrapper(name, title, *args, **kwargs):
            drawn[title] = args
            return draw(name, title, *args, **kwargs)

        return wrapper

    monkeypatch.setattr(plots, "curves", seen(plots.curves))
    monkeypatch.setattr(plots, "bars", seen(plots.bars))
    report_of(folder, output=tmp_path / "page.html")
    by_protocol = {table.protocol: table for table in tables.make_tables(tables.read_runs(folder))}
    _, rows, values, *_ = drawn["CoOp_PLPP - CoOp"]
    assert rows == ["DTD", "EuroSAT", "Average of 2"] and list(values) == ["base", "new", "H"]
    differences = [row for row in by_protocol["base_to_new"].rows if row.kind == "difference"]
    assert values["new"] == [plots.Bar(*row.cells["new"]) for row in differences]
    alt, lines, *_ = drawn["DTD: accuracy over shots"]
    row = next(r for r in by_protocol["few_shot"].rows if r.label == "CoOp_PLPP" and r.kind == "measured")
    line = next(x for x in lines if x.label == "CoOp_PLPP")
    assert line.x == [1.0, 4.0] and line.y == [row.cells["1"].value, row.cells["4"].value]
    assert line.high[1] == pytest.approx(row.cells["4"].value + row.cells["4"].spread)
    assert line.low[1] == pytest.approx(row.cells["4"].value - row.cells["4"].spread)
    assert f"4 shots {row.cells['4'].value:.2f} ± {row.cells['4'].spread:.2f}" in alt
    _, lines, *_ = drawn["DTD, 16 shots: perplexity of the context"]
    assert [x.label for x in lines] == ["CoOp_PLPP"]  # nothing else logs it
    histories = [
        PromptReader().history(path.parent) for path in sorted(folder.glob("base_to_new/dtd/*/CoOp_PLPP/*/result.json"))
    ]
    assert len(histories) == 3
    second = [epochs[1]["perplexity"] for epochs in histories]
    assert lines[0].y[1] == pytest.approx(sum(second) / 3)
    assert (lines[0].low[1], lines[0].high[1]) == (min(second), max(second))
    _, lines, *_ = drawn["EuroSAT, 16 shots: loss ce"]
    assert [x.label for x in lines] == ["CoOp", "CoOp_PLPP"]
    assert not any("loss lr" in title or "loss acc" in title for title in drawn)


def test_pngs_lie_beside_the_page_and_are_pictures(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    linked = [attributes["href"] for attributes, text in page.of("a") if text == "PNG"]
    assert len(linked) == len(set(linked)) == len(page.of("figure")) > 6
    for name in linked:
        with Image.open(folder / name) as picture:
            assert picture.width > 600 and picture.convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 255)


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
NASTY = [HOSTILE, "_h $\\frac{1$ $x_$ {{ 7 * 7 }}{% raw %} fill: #1f5fa8 &lt;b&gt; \ud800 \x00\x1b\u202e", "a" * 300]


@pytest.mark.parametrize("name", NASTY, ids=["markup", "odd", "long"])
def test_hostile_names_are_text(tmp_path: Path, name: str) -> None:
    shots = {"protocol": "few_shot", "backbone": "embedded"}
    for i, (method, dataset) in enumerate([("CoOp", "dtd"), ("CoOp_PLPP", "dtd"), ("CoOp_PLPP", "ucf101")], start=1):
        folder = record(tmp_path, method, i, {"accuracy": 50.0}, dataset, **shots)
        complete(folder, random.Random(0), 2, plpp=True)
        result = json.loads((folder / "result.json").read_text())
        note = result["protocol"] | {"method": method + name if i == 1 else method, "dataset": name, "variant": name * (i == 3)}
        result |= {"protocol": note, "config": {name: name}, "versions": {name: name}, "losses": {name: 1.0}}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "job.json").write_text(json.dumps(note))
        path = folder / "prompt_learner" / "model.pth.tar-2"
        state = torch.load(path, weights_only=True)
        for epoch in state["plpp_reg"]["history"]:
            epoch[name.replace("\ud800", "")] = 1.0
        torch.save(state, path)
    failed = record(tmp_path, "MaPLe", 9, {"accuracy": 0.0}, finished=False, **shots)
    (failed / "failed.json").write_text(json.dumps({"error": name, "log": [name]}))
    page = report_of(tmp_path)
    shown = name.replace("\ud800", "?").replace("\x00", "\ufffd")
    config = next(text for _, text in page.of("pre", class_="config") if "CoOp" not in text)
    assert json.dumps(name, ensure_ascii=False).replace("\ud800", "?") in config
    assert shown in page.text.replace("\x00", "\ufffd")
    assert "49" not in page.of("h1")[0][1]


@pytest.mark.usefixtures("undrawn")
def test_missing_and_failed_runs_are_named_and_not_counted(tmp_path: Path) -> None:
    made_up_sweep(tmp_path, ["dtd"], ["CoOp"], (1, 2), epochs=0)
    for done in tmp_path.rglob("result.json"):
        done.with_name("failed.json").write_text(json.dumps({"error": "it is busy", "log": ["no word of this"]}))
    record(tmp_path, "CoOp", 3, {"base": 0.0, "new": 0.0}, finished=False)
    failed = record(tmp_path, "CoOp", 4, {"base": 0.0, "new": 0.0}, finished=False)
    (failed / "failed.json").write_text(json.dumps({"error": "loss 'ce' is nan", "log": ["last words"]}))
    broken = record(tmp_path, "CoOp", 5, {"base": 0.0, "new": 0.0})
    (broken / "job.json").write_text("{")
    page = report_of(tmp_path)
    ((_, said),) = page.of("section", class_="warn")
    said = " ".join(said.split())
    assert "Missing, 3 of 5 runs." in said
    assert "base_to_new: dtd, 16 shots, CoOp, seed 3: not finished" in said
    assert "base_to_new: dtd, 16 shots, CoOp, seed 4: failed: loss 'ce' is nan" in said and "last words" in said
    assert "it is busy" not in page.text and "no word of this" not in page.text  # of runs that have a result
    assert "seed5: its job.json cannot be read" in said
    row = next(text for _, text in page.of("tr", class_="measured") if text.startswith("CoOp"))
    assert row.endswith("2")  # of two seeds
    assert len(page.of("details", class_="run")) == 5


@pytest.mark.parametrize("result", [{}, {"metrics": {}}, {"metrics": {"accuracy": "high"}}, {"metrics": 3}, {"tests": [1]}])
@pytest.mark.usefixtures("undrawn")
def test_a_record_without_figures_is_missing(tmp_path: Path, result: dict) -> None:
    made_up_sweep(tmp_path, ["dtd"], ["CoOp"], (1,), epochs=0)
    folder = record(tmp_path, "CoOp", 2, {"base": 1.0, "new": 1.0})
    whole = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(whole | result if result else []))
    ((_, said),) = report_of(tmp_path).of("section", class_="warn")
    assert "CoOp, seed 2" in said and "Missing, 1 of 2 runs." in said


def test_a_folder_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for place, words in ((tmp_path, "expected recorded runs"), (tmp_path / "none", "expected a folder")):
        assert main(["report", str(place)]) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("undrawn")
def test_output_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    made_up_sweep(runs, ["dtd"], ["CoOp", "CoOp_PLPP"], (1, 2), epochs=0)
    assert main(["report", str(runs), "--output", str(out / "mine.html")]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["mine.html", "mine_files"]
    assert not (runs / "report.html").exists()
    before = (out / "mine.html").read_bytes()
    assert main(["report", str(runs), "--output", str(out)]) == 2
    assert "expected the name of a file" in capsys.readouterr().err

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("plpp_reg.io.files.os.fsync", full)
    assert main(["report", str(runs), "--output", str(out / "mine.html")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (out / "mine.html").read_bytes() == before and not list(out.rglob("*.tmp"))


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_a_figure_takes_its_colours_from_the_page_and_is_the_same_twice() -> None:
    lines = [plots.Line("_CoOp $a_$", plots.Style(0, plain=True), [1, 2], [3.0, 4.0], [2.0, 3.0], [4.0, 5.0])]
    first, second = (plots.curves("n", "t <&>", "alt", lines, "x", "y", ticks=[1, 2]) for _ in range(2))
    assert first == second
    assert not any(colour in first.svg for colour in style.LIGHT.values())
    for variable in ("ink", "grid", "s0"):
        assert f"var(--{variable})" in first.svg
    assert "_CoOp $a_$" in first.svg  # neither hidden from the legend nor read as mathematics
    assert "<style" not in first.svg and "<metadata" not in first.svg and "font-family" not in first.svg
    with Image.open(io.BytesIO(first.png)) as picture:
        assert picture.format == "PNG"


def test_two_figures_share_no_id() -> None:
    values = {"base": [plots.Bar(1.0, 2.0), None]}
    svgs = [plots.bars(name, "t", "alt", ["a", "b"], values, "x").svg for name in ("one", "two")]
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in svgs]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip(svgs, ids, strict=True):
        assert set(re.findall(r'xlink:href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) == own


def test_a_method_and_its_plain_one_share_a_colour() -> None:
    found = plots.styles(["Zeroshot", "A", "A_PLPP", "B", "B_PLPP"], {"A_PLPP": "A", "B_PLPP": "B"})
    assert found["A"].colour == found["A_PLPP"].colour != found["B"].colour == found["B_PLPP"].colour
    assert found["A"].plain and not found["A_PLPP"].plain
    assert found["Zeroshot"].colour not in (found["A"].colour, found["B"].colour)


def test_figures_colour_rows_alike_as_the_tables_compare_them(tmp_path: Path) -> None:
    for method, lr, seed in (("CoOp", 1, 1), ("CoOp", 2, 2), ("CoOp", 2, 3), ("CoOp_PLPP", 1, 1), ("KgCoOp_PLPP", 1, 1)):
        record(tmp_path, method, seed, {"accuracy": 50.0}, protocol="few_shot", config={"OPTIM.LR": lr})
    found = records.find_runs(tmp_path)
    runs = runs_of(found, records.as_runs(found).records)
    pairs = pairs_of(runs)
    usual, treated, plain_one = Name("CoOp"), Name("CoOp_PLPP"), Name("CoOp", "", "LR=1")
    assert pairs == [(treated, plain_one)]
    plain = plain_forms(list(dict.fromkeys(run.method for run in runs)), pairs)
    assert plain == {treated: plain_one, Name("KgCoOp_PLPP"): None}
    look = plots.styles([usual, plain_one, treated], plain)
    assert look[plain_one].colour == look[treated].colour != look[usual].colour


def test_zero_shot_outside_a_protocol_is_one_row_whatever_training_was_set(tmp_path: Path) -> None:
    for trainer in ("ZeroshotCLIP", "my.own:Zeroshot"):
        for lr in (1, 2):
            folder = tmp_path / trainer / str(lr)
            folder.mkdir(parents=True)
            result = {"trainer": trainer, "dataset": "dtd", "seed": 1, "config": {"OPTIM.LR": lr}}
            (folder / "result.json").write_text(json.dumps({**result, "files_sha256": "", "metrics": {"accuracy": 1.0}}))
    methods = [str(run.method) for run in runs_of(records.find_runs(tmp_path), [])]
    assert sorted(methods) == ["ZeroshotCLIP", "ZeroshotCLIP", "my.own:Zeroshot", "my.own:Zeroshot (LR=2)"]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_are_told_from_the_background_light_and_dark(sweep: tuple[Path, Page]) -> None:
    """WCAG: 4.5 for text, 3 for lines."""
    ((_, sheet),) = sweep[1].of("style")
    for block, colours in zip(re.findall(r":root \{(.*?)\}", sheet, re.DOTALL), (style.LIGHT, style.DARK), strict=True):
        own = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        assert own.items() >= colours.items()
        for name in ("ink", "muted", "link", "warn"):
            assert min(contrast(own[name], own[ground]) for ground in ("page", "soft", "warn-soft")) >= 4.5, name
        assert all(contrast(own[f"s{i}"], own["page"]) >= 3 for i in range(len(style.SERIES)))
