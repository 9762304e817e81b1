"""What an image's file holds is part of a run's identity: hashes of content, remembered as long as no file changes."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from plpp_reg.commands import cli
from plpp_reg.data import DATASETS, DatasetEntry, DataSplit, contents
from plpp_reg.errors import InputError
from plpp_reg.experiments import sweep
from plpp_reg.results.record import read_result

from helpers import engine as helpers
from helpers.bench import Bench
from helpers.resume import Killed, arguments, kill_at


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is old after some ticks of the clock by which files are dated."""
    monkeypatch.setattr(contents, "JUST_NOW", 50 * 10**6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(contents, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "contents"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to be hashed."""
    seen, read = [], contents.content
    monkeypatch.setattr(contents, "content", lambda datum: seen.append(datum.name) or read(datum))
    return seen


def aged(folder: Path) -> None:
    """As if a while had passed since a folder's files were written."""
    time.sleep(max(0.0, max(p.stat().st_ctime for p in folder.rglob("*")) + contents.JUST_NOW / 1e9 - time.time() + 0.02))


def repaint(path: Path) -> None:
    """Another picture of the same size in pixels."""
    with Image.open(path) as image:
        Image.new("RGB", image.size, "white").save(path)


def test_files_are_read_once_and_again_when_one_changes(
    tmp_path: Path, cache: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = helpers.read_tiny(helpers.make_images(tmp_path / "images"))
    with monkeypatch.context() as patch:
        patch.setattr(contents, "JUST_NOW", 3600 * 10**9)
        first = contents.contents_sha256(data.val)
    assert len(reads) == len(data.val) and not cache.exists()  # just written: they may change within a tick of the clock
    aged(tmp_path / "images")
    assert contents.contents_sha256(data.val) == first and len(reads) == 2 * len(data.val)
    assert contents.contents_sha256(data.val) == first and len(reads) == 2 * len(data.val)
    one = Path(data.val[3].impath)
    before = one.stat()
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size, and the same time as far as one can set it
    assert contents.contents_sha256(data.val) != first
    content[-1] ^= 1
    one.write_bytes(content)
    assert contents.contents_sha256(data.val) == first  # the content counts, not the time


def test_the_hash_is_of_content_names_labels_and_order_and_of_no_machine(tmp_path: Path, cache: Path) -> None:
    data = helpers.read_tiny(helpers.make_images(tmp_path / "images"))
    first = contents.contents_sha256(data.test)
    shutil.copytree(tmp_path / "images", tmp_path / "elsewhere")
    assert contents.contents_sha256(helpers.read_tiny(tmp_path / "elsewhere").test) == first
    changes = ({"label": 4}, {"classname": "dog"}, {"name": "x.png"}, {"impath": data.test[1].impath})
    hashes = {contents.contents_sha256([data.test[0]._replace(**change), *data.test[1:]]) for change in changes}
    hashes |= {contents.contents_sha256(data.test[1:]), contents.contents_sha256(data.test[::-1]), first}
    assert len(hashes) == len(changes) + 3


@pytest.mark.parametrize("kept", ["", "0" * 63, "0" * 64 + "\n", "nonsense", "\u00e9"])
def test_a_broken_memory_is_read_anew(tmp_path: Path, cache: Path, reads: list[str], kept: str) -> None:
    data = helpers.read_tiny(helpers.make_images(tmp_path / "images"))
    aged(tmp_path / "images")
    first = contents.contents_sha256(data.val)
    (memory,) = cache.iterdir()
    memory.write_text(kept, encoding="utf-8")
    assert contents.contents_sha256(data.val) == first and len(reads) == 2 * len(data.val)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, cache: Path) -> None:
    data = helpers.read_tiny(helpers.make_images(tmp_path / "images"))
    Path(data.val[2].impath).unlink()
    with pytest.raises(InputError, match=f"image {data.val[2].impath}: expected a readable picture"):
        contents.contents_sha256(data.val)


def test_a_cache_that_cannot_be_written_costs_the_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    data = helpers.read_tiny(helpers.make_images(tmp_path / "images"))
    aged(tmp_path / "images")
    first = contents.contents_sha256(data.val)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(contents, "cache_folder", lambda: tmp_path / "file")
    assert contents.contents_sha256(data.val) == first


def test_clearing_the_cache_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))
    monkeypatch.undo()
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))
    from plpp_reg.data.emoji import cache_folder

    monkeypatch.setattr(contents, "cache_folder", cache_folder)
    data = helpers.read_tiny(helpers.make_images(tmp_path / "images"))
    aged(tmp_path / "images")
    contents.contents_sha256(data.val)
    assert len(list((tmp_path / "cache" / "contents").iterdir())) == 1
    assert cli.main(["cache", "--clear"]) == 0
    assert list((tmp_path / "cache" / "contents").iterdir()) == []


# ---- runs ----------------------------------------------------------------------------------------------------------------


METHODS = ["CoOp", "CoOp_PLPP"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench whose sweep has run; tests work on copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
        made = Bench(tmp_path_factory.mktemp("bench"))
        assert len(ran(made)[0]) == 4
    return made


@pytest.fixture
def bench(done: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The finished one beside pictures of its own with the same content. Its model is that of ``done``: a path that counts."""
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    copy = Bench(tmp_path)
    copy.backbone = done.backbone
    shutil.copytree(done.output, copy.output)
    return copy


def ran(bench: Bench) -> tuple[list[str], list[str]]:
    """Run what is left: which jobs that was, and what was said."""
    said: list[str] = []
    seen: list[str] = []

    def runner(left):
        seen.extend(job.label for job in left)
        return sweep.one_after_another(left)

    assert sweep.sweep(bench.plan(methods=METHODS), say=said.append, runner=runner) == []
    return seen, said


def test_other_pictures_under_the_same_names_are_run_anew(bench: Bench) -> None:
    jobs = [job.label for job in bench.plan(methods=METHODS)]
    assert ran(bench)[0] == []
    for job in bench.plan(methods=["CoOp"]):
        assert set(read_result(job.folder)["pictures_sha256"]) == {"train", "test"}
        assert set(read_result(job.folder)["tests"]["new"]["pictures_sha256"]) == {"test"}
    before = read_result(bench.plan(methods=["CoOp"])[0].folder)
    for path in (bench.images / "train" / "0").iterdir():
        repaint(path)
    again, said = ran(bench)
    assert again == jobs and sum("it is now" in line for line in said) == 4
    after = read_result(bench.plan(methods=["CoOp"])[0].folder)
    assert after["files_sha256"] == before["files_sha256"] and after["losses"] != before["losses"]
    assert after["pictures_sha256"]["test"] == before["pictures_sha256"]["test"]
    assert after["pictures_sha256"]["train"] != before["pictures_sha256"]["train"]
    repaint(bench.images / "test" / "4" / "1.png")  # of the further test alone: the prompts are tested again
    again, said = ran(bench)
    assert again == jobs and not any("it is now" in line for line in said)
    last = read_result(bench.plan(methods=["CoOp"])[0].folder)
    assert last["losses"] == after["losses"] and last["metrics"] == after["metrics"]
    assert last["tests"]["new"]["pictures_sha256"] != after["tests"]["new"]["pictures_sha256"]


def test_runs_made_before_keep_counting_with_a_word(bench: Bench) -> None:
    for job in bench.plan(methods=["CoOp"]):
        result = read_result(job.folder)
        for part in (result, *result["tests"].values()):
            part.pop("pictures_sha256")
        (job.folder / "result.json").write_text(json.dumps(result))
    seen, said = ran(bench)
    assert seen == [] and said[0] == "4 of 4 runs are there already"
    assert said[1].startswith("2 of them were made before the content of images was recorded")
    assert "saw different" not in bench.tables()["markdown"]


def test_a_table_says_which_runs_saw_other_pictures(bench: Bench) -> None:
    assert "pictures" not in bench.tables()["markdown"]
    jobs = bench.plan(methods=["CoOp_PLPP"])
    for job, names in zip(jobs, (["test"], ["train", "new"]), strict=True):
        result = read_result(job.folder)
        for name in names:
            if name == "new":
                result["tests"]["new"]["pictures_sha256"]["test"] = "0" * 64
            else:
                result["pictures_sha256"][name] = "0" * 64
        (job.folder / "result.json").write_text(json.dumps(result))
    table = bench.tables()["markdown"]
    assert "Runs of CoOp_PLPP (tiny, 2 shots) were tested (base) on different pictures: seeds 1 / 2." in table
    assert "Runs of CoOp_PLPP (tiny, 2 shots) were tested (new) on different pictures: seeds 1 / 2." in table
    assert "CoOp_PLPP and CoOp (tiny, 2 shots, seed 1) saw different pictures: base." in table
    assert "CoOp_PLPP and CoOp (tiny, 2 shots, seed 2) saw different pictures: new, training." in table
    assert "Runs of CoOp (" not in table


@pytest.mark.parametrize("old", [False, True])
def test_a_killed_run_does_not_go_on_with_other_pictures(
    resumable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_and_noisy: None, old: bool
) -> None:
    shutil.copytree(resumable, tmp_path / "world")
    mine, out = tmp_path / "world", tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_at(patch, "step", 6)
        if old:  # as a version before this wrote it
            patch.setattr("plpp_reg.engine.run.pictures_sha256", lambda data, parts: {})
        with pytest.raises(Killed):
            helpers.quietly(arguments(mine, out))
    repaint(mine / "data" / "train" / "2" / "3.png")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if old:
        helpers.quietly(arguments(mine, out))
        assert "their names alone are compared" in (out / "log.txt").read_text()
    else:
        with pytest.raises(InputError, match="expected a run on the same terms .pictures: "):
            helpers.quietly(arguments(mine, out))
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_split_of_nothing_has_a_hash(cache: Path) -> None:
    empty = DataSplit([], [], [], [])
    assert contents.contents_sha256(empty.train) == contents.contents_sha256(empty.test)
