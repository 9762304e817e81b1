"""What a report says of how good a run is: zero-shot beside it, classes, mistakes with pictures; and the page in a browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from plpp_reg.commands.cli import main
from plpp_reg.results import plots, report, tables
from plpp_reg.results.evaluation import read
from plpp_reg.results.plots import Level
from plpp_reg.results.record import read_result
from plpp_reg.results.report import mistakes
from plpp_reg.results.report.details import WHOLE, details_of
from plpp_reg.results.report.mistakes import Gallery

from helpers.made_up import made_up_sweep
from helpers.records import record
from helpers.report_page import report_of


@pytest.fixture
def runs(world: Path, tmp_path: Path) -> Path:
    """A finished run of ``plpp train``, and the pictures that it was tested on."""
    folder = tmp_path / "runs"
    shutil.copytree(world / "done", folder / "CoOp")
    return folder


def with_evaluations(folder: Path, zero_shot: dict[str, float]) -> None:
    """Every run of a sweep says what zero-shot CLIP does on each of its tests."""
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        note = result["protocol"]
        for name, test in {note["test"]: result, **result.get("tests", {})}.items():
            figures = {"templates": ["{}."], "metrics": {"accuracy": zero_shot[name]}, "interval": [0.0, 100.0]}
            test["evaluation"] = {"zero_shot": figures}
        path.write_text(json.dumps(result))


# ---- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_table_and_a_report_of_train_runs_say_the_same(runs: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(runs / "CoOp", runs / "twice")
    assert main(["table", str(runs)]) == 0
    printed = capsys.readouterr().out
    result = read_result(runs / "CoOp")
    figures = [*(result["metrics"][name] for name in ("accuracy", "macro_f1", "calibration_error"))]
    figures.append(result["evaluation"]["zero_shot"]["metrics"]["accuracy"])
    cells = " | ".join(f"{value:.2f}" for value in figures)
    for place in ("CoOp", "twice"):  # two folders of one name: each says which
        assert f"CoOp, seed 1, {place} | {cells} | 1 | {place} |" in printed
    page = report_of(runs)
    rows = [" ".join(text.split()) for _, text in page.of("tr", class_="measured")]
    for place in ("CoOp", "twice"):
        assert f"CoOp, seed 1, {place}" + "".join(f"{value:.2f}" for value in figures) + f"1{place}" in rows
    ((_, title),) = page.of("h1")
    assert title == f"Runs of plpp train ({result['backbone']})"


def test_zero_shot_that_runs_tell_is_a_row_and_who_stays_below_is_told(tmp_path: Path) -> None:
    made_up_sweep(tmp_path, ["dtd", "eurosat"], ["CoOp", "CoOp_PLPP"], epochs=0)
    with_evaluations(tmp_path, {"base": 99.0, "new": 20.0})
    (table,) = tables.make_tables(tables.read_runs(tmp_path), published=False)
    rows = [row for row in table.rows if row.label == "ZeroshotCLIP"]
    assert [row.group for row in rows] == ["DTD", "EuroSAT", "Average of 2"]
    assert all(row.cells["base"].value == 99 and row.cells["new"].value == 20 for row in rows)
    low = [note for note in table.notes if note.startswith("Below zero-shot")]
    assert low == []  # by H, which counts
    with_evaluations(tmp_path, {"base": 99.0, "new": 90.0})
    (table,) = tables.make_tables(tables.read_runs(tmp_path), published=False)
    low = [note for note in table.notes if note.startswith("Below zero-shot")]
    assert len(low) == 3 and low[0].startswith("Below zero-shot CLIP on DTD (H, 94.29): CoOp ") and "CoOp_PLPP" in low[0]
    # a run of its own counts, and that alone
    record(tmp_path, "ZeroshotCLIP", 1, {"base": 50.0, "new": 50.0}, "dtd", backbone="ViT-B/16")
    (table,) = tables.make_tables(tables.read_runs(tmp_path), published=False)
    assert [row.cells["base"].value for row in table.rows if row.label == "ZeroshotCLIP"][:2] == [50.0, 99.0]


# ---- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_zero_shot_stands_in_every_figure_of_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_sweep(tmp_path, ["dtd"], ["CoOp", "CoOp_PLPP"], epochs=2)
    made_up_sweep(tmp_path, ["dtd"], ["CoOp", "CoOp_PLPP"], (1, 2), shots=(1, 4), epochs=0)
    with_evaluations(tmp_path, {"base": 70.0, "new": 40.0, "accuracy": 61.0, "test": 61.0})
    for path in tmp_path.glob("base_to_new/**/result.json"):  # a plain run has its perplexities in words' record alone
        result = json.loads(path.read_text())
        plpp = result["protocol"]["method"] == "CoOp_PLPP"
        history = [{"ce": 2.0, **({"ppl": 0.5, "perplexity": 9.0} if plpp else {}), "loss": 2.5, "acc": 50.0}] * 2
        words = {"perplexity": 80.0, "nearest": []}
        result |= {"history": history, "learned": {"before": words, "after": {**words, "perplexity": 20.0}, "of_class": ""}}
        path.write_text(json.dumps(result))
    drawn: dict[str, tuple] = {}
    curves, bars = plots.curves, plots.bars
    monkeypatch.setattr(plots, "curves", lambda *a, **k: (drawn.update({a[1]: (a, k)}), curves(*a, **k))[1])
    monkeypatch.setattr(plots, "bars", lambda *a, **k: (drawn.update({a[1]: (a, k)}), bars(*a, **k))[1])
    report_of(tmp_path)
    assert drawn["DTD: accuracy over shots"][1]["level"] == Level("zero-shot", 61.0)
    _, options = drawn["DTD, 16 shots: accuracy on the training batches"]
    assert options["level"] == Level("zero-shot, test", 70.0)
    (_, _, _, rows, values, *_), _ = drawn["DTD: with PLPP against without"]
    table = next(t for t in tables.make_tables(tables.read_runs(tmp_path)) if t.protocol == "base_to_new")
    plain = next(row for row in table.rows if row.label == "CoOp" and row.kind == "measured")
    assert values["new"][0].mark == pytest.approx(40 - plain.cells["new"].value)
    (_, _, _, lines, *_), _ = drawn["DTD, 16 shots: perplexity of the context"]
    beside = next(x for x in lines if x.label == "CoOp (before, after)")
    assert (beside.x, beside.y) == ([0, 2], [80.0, 20.0])
    # sums of losses of other terms are not set beside each other
    (_, _, _, lines, *_), _ = drawn["DTD, 16 shots: sum of ce + ppl"]
    assert [x.label for x in lines] == ["CoOp_PLPP"] and not any("sum of ce" in title for title in drawn if "ppl" not in title)


# ---- one run -----------------------------------------------------------------------------------------------------------


def test_classes_confusions_and_mistakes_are_those_of_the_record(runs: Path) -> None:
    result = read_result(runs / "CoOp")
    found = read(result)
    page = report_of(runs)
    pictures = page.of("img")
    assert len(pictures) == min(len(found.mistakes), mistakes.A_TEST) > 0
    shown = [" ".join(text.split()) for _, text in page.of("li")]
    for mistake in found.mistakes[: mistakes.A_TEST]:
        assert any(
            f"{mistake.predicted} {100 * mistake.probability:.1f}%" in text
            and f"is {mistake.truth}, {100 * mistake.probability_of_truth:.1f}%" in text
            and mistake.image in text
            for text in shown
        )
    matrix = {text[0]: text[1:] for text in cells_of(page, "Confusion matrix, test")}
    for label, name in enumerate(found.classes):
        counts = {p: n for t, p, n in found.confusion if t == label}
        counts[label] = round(found.per_class["recall"][label] * found.per_class["support"][label] / 100)
        assert matrix[name] == [str(counts.get(p) or "") for p in range(len(found.classes))]
    assert "seconds by phase" in page.text and "image features" in page.text


def cells_of(page, label: str) -> list[list[str]]:
    """The rows of the table in a region."""
    inside, rows = False, []
    for tag, attributes, text in page.elements:
        if attributes.get("role") == "region":
            inside = attributes["aria-label"] == label
        if inside and tag == "tr":
            rows.append([])
        if inside and tag in ("th", "td"):
            rows[-1].append("".join(text))
    return rows[1:]


@pytest.mark.usefixtures("undrawn")
def test_a_picture_is_shown_only_where_it_is_what_was_tested(
    world: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A record of somebody else's may name any file of this machine."""
    path = runs / "CoOp" / "result.json"
    result = json.loads(path.read_text())
    told = result["evaluation"]["mistakes"]
    assert len(told) >= 3
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    told[0]["path"], told[1]["path"] = str(tmp_path / "private.png"), str(tmp_path / "gone.png")
    path.write_text(json.dumps(result))
    page = report_of(runs)
    assert "its file is another one by now" in page.text and "its file is not on this machine" in page.text
    count = min(len(told), mistakes.A_TEST)
    assert len(page.of("img")) == count - 2
    monkeypatch.setattr(report, "Gallery", lambda: Gallery(most_bytes=3000))
    crowded = report_of(runs)
    assert 0 < sum(len(attributes["src"]) for attributes, _ in crowded.of("img")) <= 3000
    assert "the page has no room for more pictures" in crowded.text


def test_of_many_classes_the_worst_are_shown_and_the_rest_is_counted() -> None:
    classes = [f"c{i}" for i in range(50)]
    per_class = {"recall": [50.0] * 50, "precision": [50.0] * 50, "f1": [50.0] * 50, "support": [4] * 50}
    confusion = [[i, (i + 1) % 50, 2] for i in range(50)] + [[7, 30, 0]]
    metrics = {"accuracy": 50.0, "error": 50.0, "macro_f1": 50.0}
    told = {"images": 200, "interval": [43.0, 57.0], "zero_shot": None, "difference": None, "classes": classes}
    told |= {"per_class": per_class, "confusion": confusion, "mistakes": []}
    (detail,) = details_of({"metrics": metrics, "evaluation": told}, "test", "CoOp", Gallery())
    assert len(detail.matrix.rows) == WHOLE and detail.matrix.of == 50 and detail.matrix.names[-1] == "all others"
    assert all(sum(count for count, _ in cells) == 4 for _, cells in detail.matrix.rows)
    assert detail.wrong == 100


@pytest.mark.parametrize("change", [{"evaluation": None}, {"evaluation": {"classes": 3}}, {"evaluation": [1]}])
@pytest.mark.usefixtures("undrawn")
def test_a_record_without_it_or_with_something_else_loses_that_alone(runs: Path, change: dict) -> None:
    path = runs / "CoOp" / "result.json"
    result = json.loads(path.read_text()) | change
    if change["evaluation"] is None:
        del result["evaluation"], result["phases"]  # of an earlier version
    path.write_text(json.dumps(result))
    page = report_of(runs)
    assert ("Not read. its result.json: expected how good" in page.text) == (change["evaluation"] is not None)
    assert main(["table", str(runs)]) == 0 and page.of("pre", class_="config")


# ---- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium, where Playwright and one are installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        place = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if place is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium")
        made = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def address(world: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of a run of ``plpp train`` and of a sweep."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(world / "done", folder / "CoOp")
    made_up_sweep(folder / "sweep", ["dtd", "eurosat"], ["CoOp", "CoOp_PLPP"], epochs=0)
    report_of(folder)
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
@pytest.mark.parametrize("scripts", [True, False])
def test_the_page_in_a_browser(browser, address: str, width: int, scheme: str, scripts: bool) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert not said and [url for url in asked if not url.startswith("data:")] == [address]
    assert page.locator("html").bounding_box()["width"] <= width  # nothing makes the page wider than the screen
    ground = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") if scripts else None
    assert ground in (None, "rgb(20, 23, 26)" if scheme == "dark" else "rgb(255, 255, 255)")
    figure = page.locator("figure:visible").first
    small = figure.bounding_box()["height"]
    figure.locator("label").click()
    assert figure.bounding_box()["height"] > max(small, 700)  # by HTML alone
    figure.locator("label").click()
    assert figure.bounding_box()["height"] == small
    table = page.locator("table.sortable:visible").first
    rows = table.locator("tbody tr.measured th")
    before = rows.all_inner_texts()
    table.locator("thead th").first.click()
    page.wait_for_timeout(100)
    after = rows.all_inner_texts()
    assert sorted(after) == sorted(before) and (after == before) != (scripts and before != sorted(before, reverse=True))
    boxes = page.locator("input[type=search]")
    assert (boxes.count() > 0) == scripts
    if scripts:
        page.locator("details").evaluate_all("all => all.forEach(e => e.open = true)")
        table = page.locator("input[type=search] + .scroll").first
        rows = table.locator("tbody tr:not(.group)")
        of_eurosat = table.locator("tr[data-group=EuroSAT]").count()
        for word, left in (("no such row", 0), ("eurosat", of_eurosat), ("", rows.count())):
            boxes.first.fill(word)
            assert rows.filter(visible=True).count() == left
    context.close()


@pytest.mark.usefixtures("undrawn")
def test_a_test_beside_a_training_run_hides_none_of_its_curves(runs: Path) -> None:
    """Its number of shots is that of its configuration, and says nothing: a test takes none."""
    tested = read_result(runs / "CoOp")
    tested |= {"history": [], "losses": {}, "learned": None, "tested": {"checkpoint": "x", "classnames": []}}
    shots = tested["config"]["DATASET.NUM_SHOTS"]
    tested["config"]["DATASET.NUM_SHOTS"] = 10 * max(1, shots)
    before = report_of(runs)
    (runs / "CoOp" / "eval").mkdir()
    (runs / "CoOp" / "eval" / "result.json").write_text(json.dumps(tested))
    after = report_of(runs)
    drawn = [
        [attributes["aria-label"] for _, attributes, _ in page.elements if attributes.get("role") == "img"]
        for page in (before, after)
    ]
    assert drawn[0] == drawn[1] != []
    groups = [" ".join(text.split()) for _, text in after.of("tr", class_="group")]
    assert not any(f"{10 * shots} shots" in group for group in groups)
    titles = [" ".join(text.split()) for _, text in after.of("summary")]
    method, dataset = tested["trainer"], tested["dataset"]
    assert any(title.startswith(f"{method} on ") and title.endswith("seed 1, in CoOp/eval") for title in titles), (
        titles,
        dataset,
    )
