"""One broken file among many runs is named; the table, the report and the sweep of the others go on."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from plpp_reg.commands.cli import main
from plpp_reg.errors import InputError
from plpp_reg.io.files import read_json, read_yaml
from plpp_reg.results import plots, tables
from plpp_reg.results.learned import Learned, no_reader
from plpp_reg.results.report import page, render
from plpp_reg.results.tables.records import find_runs, read_runs

from helpers.records import record

DEEP = "[" * 100_000
TEXTS = {
    "empty": "", "cut": '{"a": ', "deep": DEEP, "deep and whole": DEEP + "]" * 100_000, "deep keys": '{"a":' * 100_000,
    "digits": "1" * 5_000, "not UTF-8": "\udcff", "NUL": "\0", "a list": "[]", "a number": "3", "text": '"x"', "null": "null",
    "nothing in it": "{}", "another byte order": "\ufeff{}",
}  # fmt: skip
WRONG = [None, [], {}, [[]], "", "x", "\ud800", "a" * 5_000, True, -1, 3, 1.5, 10**400, 1e308, float("nan"), float("-inf")]


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: object, place: tuple = ()) -> Iterator[tuple]:
    """Where each value of a nested one is."""
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*place, key))


def changed(content: dict, place: tuple, value: object) -> object:
    """A copy with another value in one place."""
    if not place:
        return value
    content = copy.deepcopy(content)
    *parents, last = place
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return content


def missing_key(content: dict, place: tuple) -> object:
    content = copy.deepcopy(content)
    *parents, last = place
    inner = content
    for key in parents:
        inner = inner[key]
    del inner[last]
    return content


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods, two seeds, and everything in a record that a run writes."""
    for method in ("CoOp", "CoOp_PLPP"):
        for seed in (1, 2):
            config = {"OPTIM.LR": 0.1, "INPUT.SIZE": [2, 2], "TRAINER.NAME": method, "X": None}
            folder = record(tmp_path / "out", method, seed, {"base": 70.0 + seed, "new": 50.0 + seed}, config=config)
            result = json.loads((folder / "result.json").read_text())
            said = {"perplexity": 9.0, "nearest": [[["a", 0.5], ["b", 0.4]]]}
            result |= {
                "trainer": method, "dataset": "dtd", "backbone": "ViT-B/16", "seed": 1, "losses": {"ce": 1.0}, "seconds": 3.0,
                "history": [{"loss": 1.0, "perplexity": 9.0}], "versions": {"torch": "2"}, "few_shot_sha256": "0",
                "pictures_sha256": {"train": "1", "test": "2"}, "learned": {"before": said, "after": said, "of_class": ""},
            }  # fmt: skip
            result["tests"]["new"] |= {"dataset": "dtd", "subsample": "new", "pictures_sha256": {"test": "3"}}
            (folder / "result.json").write_text(json.dumps(result))
    return tmp_path / "out"


def of(runs: Path, method: str, seed: int) -> Path:
    return runs / "base_to_new" / "dtd" / "shots16" / method / f"seed{seed}"


def others_are_there(runs: Path) -> None:
    """The three whole runs are in every table, and the report is written."""
    found = {(r.note["method"], r.note["seed"]) for r in read_runs(runs).records}
    assert found >= {("CoOp", 2), ("CoOp_PLPP", 1), ("CoOp_PLPP", 2)}
    for form in tables.WRITERS:
        text = tables.tables_text(runs, form)
        assert "71.5" in text or form == "csv"


def without_drawing(patch: pytest.MonkeyPatch) -> None:
    """Figures are empty: drawing takes most of a report's time."""

    def picture(name: str, title: str, alt: str, *args: object, **options: object) -> plots.Picture:
        return plots.Picture(name, title, alt, "", b"")

    for name in ("curves", "bars"):
        patch.setattr(plots, name, picture)


@pytest.mark.parametrize("name", ["result.json", "job.json", "failed.json", "config.yaml"])
@pytest.mark.parametrize("kind", [*TEXTS, "folder", "link to itself"])
def test_a_broken_file_is_named_and_the_others_go_on(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, kind: str
) -> None:
    if kind != "cut":  # the others are drawn alike: what is broken is in no figure
        without_drawing(monkeypatch)
    broken = of(runs, "CoOp", 1)
    if name in ("failed.json", "config.yaml"):
        (broken / "result.json").unlink()  # a failure or a configuration is read of runs without a result
    path = broken / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_bytes(TEXTS[kind].encode("utf-8", "surrogateescape"))
    others_are_there(runs)
    missing = read_runs(runs).missing
    assert len(missing) == 1 or name == "job.json", missing
    assert main(["table", str(runs)]) == 0 and main(["report", str(runs)]) == 0
    assert "Traceback" not in "".join(capsys.readouterr())
    if name == "result.json":
        assert "its result.json cannot be read" in missing[0] and "seed 1" in missing[0]


def test_a_wrong_value_anywhere_in_a_record_stops_no_table(runs: Path) -> None:
    broken, count = of(runs, "CoOp", 1), 0
    for name in ("result.json", "job.json"):
        path = broken / name
        whole = json.loads(path.read_text())
        for place in places(whole):
            spoilt = [changed(whole, place, value) for value in (*WRONG, {"x": []}, nested(900))]
            for content in [*spoilt, *([missing_key(whole, place)] if place else [])]:
                path.write_text(json.dumps(content))
                count += 1
                try:
                    found = read_runs(runs)
                    assert len(found.records) >= 3
                    text = tables.WRITERS["csv"](tables.make_tables(found), found.missing)
                    assert text.encode("utf-8", "replace")
                except Exception as e:
                    raise AssertionError(f"{name}, {place}: {path.read_text()[:300]}") from e
        path.write_text(json.dumps(whole))
    assert count > 1_000


def test_a_wrong_value_anywhere_in_a_record_stops_no_report(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    broken = of(runs, "CoOp", 1)
    for name in ("result.json", "job.json"):
        path = broken / name
        whole = json.loads(path.read_text())
        for i, place in enumerate(places(whole)):
            for value in (WRONG[i % len(WRONG)], 10**400, nested(900)):
                path.write_text(json.dumps(changed(whole, place, value)))
                try:
                    found = find_runs(runs)
                    render(page(runs, found, False, "files", Learned(no_reader)))
                except Exception as e:
                    raise AssertionError(f"{name}, {place}: {path.read_text()[:300]}") from e
        path.write_text(json.dumps(whole))


@pytest.mark.parametrize("kind", TEXTS)
def test_a_sweep_runs_what_has_a_broken_result_anew(kind: str, tmp_path: Path) -> None:
    from plpp_reg.results.record import read_if_whole

    (tmp_path / "result.json").write_bytes(TEXTS[kind].encode("utf-8", "surrogateescape"))
    assert read_if_whole(tmp_path) is None


TENFOLD = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9)]
BOMB = "\n".join([f"a0: &a0 [{', '.join('x' * 10)}]", *TENFOLD])


@pytest.mark.parametrize(
    "text",
    ["[" * 3_000 + "]" * 3_000, "a: " + "1" * 5_000, "a: \0", "a: 2024-13-45", "a: &a [*a]", "? [a]: b", "a: !!float x",
     "a: !!timestamp x", "a: !!bool x", "a: !!python/object/apply:os.system [ls]", "a: *b", "<<: 5", "\udcff", BOMB],
    ids=lambda text: text[:12].encode("ascii", "backslashreplace").decode(),
)  # fmt: skip
def test_yaml_that_is_none_or_too_much_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="config file") as e:
        read_yaml(path, "config file")
    assert len(str(e.value)) < 1_000


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "result.json")
        with pytest.raises(InputError, match="expected a file"):
            read_json(tmp_path / "result.json")
