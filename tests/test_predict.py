"""plpp predict: a trained prompt on one's own pictures and class names."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.commands import cli
from plpp_reg.engine import checkpoint
from plpp_reg.errors import InputError
from plpp_reg.prompts import predict as predicting
from plpp_reg.prompts.loading import load_run
from plpp_reg.prompts.predict import find_images, predict

from helpers import engine as helpers
from helpers.trained import TAUGHT, pictures


@pytest.fixture(scope="module")
def world(trained_runs: Path) -> Path:
    return trained_runs


@pytest.mark.parametrize("name", ["CoOp", "MaPLe", "CoCoOp", "CSC", "CoOp_KDPL", "FDBPL", "PromptKD"])
def test_predictions_are_those_of_the_runs_own_test(world: Path, name: str) -> None:
    found = list(predict(load_run(world / name), pictures(world)))
    assert all(sum(p.probabilities.values()) == pytest.approx(1, abs=1e-5) for p in found)
    assert all(list(p.probabilities.values()) == sorted(p.probabilities.values(), reverse=True) for p in found)
    truth = [helpers.CLASSNAMES[int(Path(p.image).parent.name)] for p in found]
    accuracy = 100 * np.mean([next(iter(p.probabilities)) == t for p, t in zip(found, truth, strict=True)])
    result = json.loads((world / name / "result.json").read_text())
    assert accuracy == pytest.approx(result["metrics"]["accuracy"])


def test_a_batch_gives_what_each_image_gives_alone(world: Path) -> None:
    trainer = load_run(world / "CoOp")
    together = list(predict(trainer, pictures(world)))
    for one in together[:3]:
        (alone,) = predict(trainer, [one.image])
        assert alone.probabilities == pytest.approx(one.probabilities, abs=1e-5)


@pytest.mark.parametrize("name", ["CoOp", "MaPLe", "CoCoOp", "CoOp_KDPL", "FDBPL", "PromptKD"])
def test_other_class_names(world: Path, name: str) -> None:
    (found,) = predict(load_run(world / name, ["red panda", "tea"]), pictures(world)[:1])
    assert set(found.probabilities) == {"red panda", "tea"}


def test_class_specific_context_belongs_to_its_classes(world: Path) -> None:
    with pytest.raises(InputError, match="expected shared context"):
        load_run(world / "CSC", ["a", "b", "c", "d", "e"])


def test_the_command_prints_and_writes_json(world: Path, capsys: pytest.CaptureFixture) -> None:
    folder = str(world / "images" / "test" / "0")
    assert cli.main(["predict", str(world / "CoOp"), folder]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all(re.search(r"0/\d\.png\b.*%", line) for line in lines)
    assert cli.main(["predict", str(world / "CoOp"), folder, "--classes", "a cat", "a dog", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 and set(rows[0]["probabilities"]) == {"a cat", "a dog"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "{world}/images"], "expected a run's folder"),
        (["{world}/CoOp", "nowhere.png"], "no such file or folder"),
        (["{world}/CoOp", "{world}/empty"], "expected pictures"),
        (["{world}/CoOp", "{world}/images", "--classes", "a", "a"], "expected different names, got 'a' and 'a'"),
        (["{world}/CoOp", "{world}/images", "--classes", "red_panda", "red panda"], "got 'red_panda' and 'red panda'"),
        (["{world}/CoOp", "{world}/images", "--classes", "Tea", "tea "], "got 'Tea' and 'tea '"),
        (["{world}/CoOp", "{world}/images", "--classes", "cat,dog"], "expected two names or more, with spaces between them"),
        (["{world}/CoOp", "{world}/images", "--classes", "a", "_"], "--classes: expected names, got '_'"),
        (["{world}/CoOp", "{world}/images", "--classes", "d\u2019or", "d'or"], "which CLIP reads as one"),
        (["{world}/CoOp", "{world}/images", "--top", "0"], "--top: expected a number >= 1, got 0"),
        (["{world}/CoOp", "{world}/images", "--workers", "-1"], "--workers: expected a number, 0 to 1024, got -1"),
        (["{world}/CoOp", "{world}/images", "--device", "tpu"], "--device: expected cpu, cuda or cuda:<number>, got 'tpu'"),
        (["{world}/CoOp", "{world}/images", "--device", "cuda:99"], "--device cuda:99: expected one of"),
        (["{world}/images", "{world}/images"], "or a checkpoint; "),
        (["{world}/clip.pt", "{world}/images"], "expected keys state_dict and epoch"),
    ],
)
def test_bad_input_is_one_line(world: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    (world / "empty").mkdir(exist_ok=True)
    assert cli.main(["predict", *(a.format(world=world) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1


def test_the_callers_own_computing_is_left_alone(world: Path) -> None:
    trainer = load_run(world / "CoOp")
    trainer.precision = "amp"
    for _ in predict(trainer, pictures(world)[:1]):
        assert not torch.is_autocast_enabled("cpu")


def test_a_run_that_learns_nothing_predicts_by_its_template(world: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    keys = (world / "CoOp" / "config.yaml").read_text().replace("NAME: CoOp_PLPP", "NAME: ZeroshotCLIP")
    (tmp_path / "run" / "config.yaml").write_text(keys)
    assert cli.main(["predict", str(tmp_path / "run"), pictures(world)[0]]) == 2
    assert "does not say its class names: give them with --classes" in capsys.readouterr().err
    assert cli.main(["predict", str(tmp_path / "run"), pictures(world)[0], "--classes", "cat", "tea"]) == 0


def test_a_run_without_a_checkpoint_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text((world / "CoOp" / "config.yaml").read_text())
    assert cli.main(["predict", str(tmp_path), pictures(world)[0]]) == 2
    assert "expected a run that has learned prompts, CoOp_PLPP has no checkpoint" in capsys.readouterr().err


def test_the_folder_of_a_test_predicts_what_was_tested(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On other classes than the run's own: base to new."""
    run = ["--root", str(world / "images"), "--config-file", str(world / "recipe.yaml"), "--backbone", str(world / "clip.pt")]
    opts = ["DATASET.NAME", "tiny", "DATASET.SUBSAMPLE_CLASSES", "new"]
    shutil.copytree(world / "CoOp", tmp_path / "run")
    argv = ["--trainer", "CoOp", "--eval-only", "--model-dir", str(tmp_path / "run"), "--output-dir", str(tmp_path / "test")]
    assert cli.main(["train", *run, *argv, *opts]) == 0
    new = [p for p in pictures(world) if int(Path(p).parent.name) >= 3]
    found = list(predict(load_run(tmp_path / "test"), new))
    assert set(found[0].probabilities) == set(helpers.CLASSNAMES[3:])
    truth = [helpers.CLASSNAMES[int(Path(p.image).parent.name)] for p in found]
    accuracy = 100 * np.mean([next(iter(p.probabilities)) == t for p, t in zip(found, truth, strict=True)])
    assert accuracy == pytest.approx(json.loads((tmp_path / "test" / "result.json").read_text())["metrics"]["accuracy"])
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["predict", str(tmp_path / "test"), new[0]]) == 2
    assert "which is not there any more" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["CoOp", "CSC", "CoCoOp", "MaPLe", "IVLP", "VPT", "PromptSRC"])
def test_upstreams_own_checkpoints_predict_as_ours(world: Path, name: str, tmp_path: Path) -> None:
    """Without a configuration: the method and its settings are read off the tensors, the class names off their tokens."""
    ours = load_run(world / name)
    content = checkpoint.load(checkpoint.find(world / name, ours.method.model_name, None))
    state, table = dict(content["state_dict"]), ours.clip_model.token_embedding.weight.detach()
    (learner,) = [m for m in ours.method.modules() if isinstance(m, PromptLearner)] or [None]
    if learner is not None:  # upstream keeps the vectors of what follows the context, 77 positions long
        suffix = [[t for t in prompt[1:] if t >= 0] for prompt in learner.prompts]
        rows = torch.stack([table[torch.tensor(ids + [0] * (60 - len(ids)))] for ids in suffix])
        state["token_suffix" if "ctx" in state else "prompt_learner.token_suffix"] = rows
    if name in ("MaPLe", "IVLP", "VPT", "PromptSRC"):  # and the frozen towers
        state["image_encoder.conv1.weight"] = ours.clip_model.visual.conv1.weight.detach()
    place = tmp_path / ours.method.model_name
    checkpoint.save(place, {"state_dict": state, "epoch": 5, "optimizer": {}, "scheduler": {}, "val_result": None})
    classes = [] if name not in ("VPT",) else helpers.CLASSNAMES
    theirs = load_run(tmp_path, classes, backbone=str(world / "clip.pt"))
    for a, b in zip(predict(ours, pictures(world)), predict(theirs, pictures(world)), strict=True):
        spelled = {n.replace("_", " "): p for n, p in a.probabilities.items()}
        assert spelled == pytest.approx({n.replace("_", " "): p for n, p in b.probabilities.items()}, abs=1e-5)
    if name == "CoOp":
        with pytest.raises(InputError, match="--backbone: expected the CLIP that .* was trained on"):
            load_run(tmp_path)
        (found,) = predict(load_run(tmp_path, ["owl", "bee"], backbone=str(world / "clip.pt")), pictures(world)[:1])
        assert set(found.probabilities) == {"owl", "bee"}


def test_upstreams_students_of_promptkd_predict_by_the_teacher_that_a_test_names(world: Path, tmp_path: Path) -> None:
    """Its file has the student alone: it says nothing of its teacher, whose class features it predicts by."""
    ours = load_run(world / "PromptKD")
    state = {name: tensor.clone() for name, tensor in ours.method.saved.state_dict().items()}
    state["image_encoder.conv1.weight"] = ours.clip_model.visual.conv1.weight.detach()
    state["VPT_image_trans.conv1.1.num_batches_tracked"] = torch.tensor(640)
    checkpoint.save(tmp_path / "theirs/VLPromptLearner", {"state_dict": state, "epoch": 20}, best=True)
    with pytest.raises(InputError, match="got a student of PromptKD, whose class features are its teacher's: plpp train"):
        load_run(tmp_path / "theirs/VLPromptLearner/model-best.pth.tar", backbone=str(world / "clip.pt"))
    fixed = ["--config-file", str(world / "recipe.yaml"), "--dataset-config-file", str(world / "dataset.yaml")]
    fixed += ["--root", str(world / "images"), "--backbone", str(world / "clip.pt"), "--trainer", "PromptKD"]
    test = ["--eval-only", "--model-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "test")]
    assert cli.main(["train", *fixed, *test, *TAUGHT]) == 0
    results = [json.loads((place / "result.json").read_text()) for place in (tmp_path / "test", world / "PromptKD")]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["teacher"] == results[1]["teacher"]  # the one that was asked
    theirs = load_run(tmp_path / "test")
    for a, b in zip(predict(ours, pictures(world)), predict(theirs, pictures(world)), strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_folders_and_files_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_images([tmp_path, tmp_path / "notes.txt"])
    assert [p.name for p in found.paths] == ["a.jpg", "b.PNG", "notes.txt"]
    assert found.remarks == [f"not used in {str(tmp_path)!r}: 1 file (.txt 1)"]


def test_what_is_passed_over_in_a_folder_is_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Files that are no pictures by their names, links to folders (which may be loops); not what is hidden."""
    shots, elsewhere = tmp_path / "shots", tmp_path / "elsewhere"
    (shots / "below").mkdir(parents=True)
    elsewhere.mkdir()
    for place in (shots / "a.png", shots / "below" / "b.png", elsewhere / "c.png"):
        shutil.copy(pictures(world)[0], place)
    for name in ("1.HEIC", "2.heic", "below/3.heic", "below/notes.txt", "._a.png", ".DS_Store"):
        (shots / name).write_bytes(b"x")
    (shots / "loop").symlink_to(shots)
    (shots / "below" / "more").symlink_to(elsewhere)
    capsys.readouterr()
    for form in ([], ["--json"], ["--csv"]):
        assert cli.main(["predict", str(world / "CoOp"), str(shots), *form]) == 0
        out, err = capsys.readouterr()
        assert out.count(".png") == 2
        links = f"2 links to folders ({str(shots / 'below' / 'more')!r}, {str(shots / 'loop')!r})"
        assert [line.removeprefix(f"plpp: not used in {str(shots)!r}: ") for line in err.splitlines()] == [
            "4 files (.heic 3, .txt 1)",
            links,
        ]
    for path in (shots / "a.png", shots / "below" / "b.png"):
        path.unlink()
    assert cli.main(["predict", str(world / "CoOp"), str(shots)]) == 2
    assert f"got 4 files (.heic 3, .txt 1) and {links}" in capsys.readouterr().err


def test_a_checkpoint_is_read_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, load = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path: read.append(path) or load(path))
    path = checkpoint.find(world / "CoOp", "prompt_learner", None)
    for place, more in ((world / "CoOp", {}), (path, {}), (path, {"classes": ["owl", "bee"]})):
        read.clear()
        load_run(place, **more)
        assert read == [path]


def test_classes_of_one_name_are_told_apart(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainer = load_run(world / "CoOp")
    picture = pictures(world)[0]
    (plain,) = predict(trainer, [picture])
    names = ["cat", "tea", "tea", "cat", "map"]  # the prompts stay those they are
    monkeypatch.setattr(trainer, "data", dataclasses.replace(trainer.data, classnames=names))
    (found,) = predict(trainer, [picture])
    assert set(found.probabilities) == {"cat (class 0)", "tea (class 1)", "tea (class 2)", "cat (class 3)", "map"}
    assert list(found.probabilities.values()) == pytest.approx(list(plain.probabilities.values()))
    monkeypatch.setattr("plpp_reg.prompts.loading.load_run", lambda *_, **__: trainer)
    capsys.readouterr()
    assert cli.main(["predict", str(world / "CoOp"), picture, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert sum(row["probabilities"].values()) == pytest.approx(1) and len(row["probabilities"]) == 5


@pytest.fixture(scope="module")
def mixed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Pictures, three of which cannot be read; and those three."""
    folder, good = tmp_path_factory.mktemp("mixed"), pictures(world)[:3]
    (folder / "a, b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\0IHDR\xa8\xa1\xdeZ")
    (folder / "b.jpg").write_bytes(b"no picture")
    os.mkfifo(folder / "pipe.png")
    bad = [str(folder / name) for name in ("a, b.png", "b.jpg", "pipe.png")]
    return [good[0], bad[0], good[1], bad[1], bad[2], good[2]], bad


def test_a_picture_that_cannot_be_read_is_an_entry_and_the_others_go_on(
    world: Path, mixed: tuple[list[str], list[str]], capsys: pytest.CaptureFixture
) -> None:
    images, bad = mixed
    capsys.readouterr()
    told = {}
    for form in ([], ["--json"], ["--csv"]):
        assert cli.main(["predict", str(world / "CoOp"), *images, *form]) == 1
        said = capsys.readouterr()
        assert said.err == "plpp: 3 of 6 images could not be read\n"
        told["".join(form)] = said.out
    alone = {p.image: p for p in predict(load_run(world / "CoOp"), [i for i in images if i not in bad])}
    text, rows, table = told[""].splitlines(), json.loads(told["--json"]), list(csv.DictReader(told["--csv"].splitlines()))
    assert [row["image"] for row in rows] == [row["image"] for row in table] == images
    for line, row, cells in zip(text, rows, table, strict=True):
        if row["image"] in bad:
            assert "probabilities" not in row and row["error"] == cells["error"] and cells["class"] == cells["tea"] == ""
            assert line == f"{row['image']}  not read: {row['error']}" and row["error"].startswith(
                "expected a readable picture"
            )
        else:
            p = alone[row["image"]]
            assert "error" not in row and cells["error"] == "" and cells["class"] == next(iter(p.probabilities)) in line
            assert row["probabilities"] == pytest.approx(p.probabilities, abs=1e-6)
            assert {name: float(cells[name]) for name in helpers.CLASSNAMES} == pytest.approx(p.probabilities, abs=1e-6)
    for only in (bad[:1], bad):
        assert cli.main(["predict", str(world / "CoOp"), *only]) == 1


def test_images_are_streamed_and_any_number_of_threads_gives_the_same(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, images, opened = load_run(world / "CoOp"), pictures(world) * 4, []
    size = trainer.cfg.DATALOADER.TEST.BATCH_SIZE
    opener = predicting.open_picture
    monkeypatch.setattr(predicting, "open_picture", lambda path: opened.append(path) or opener(path))
    for given, prediction in enumerate(found := predict(trainer, images, threads=3)):
        assert len(opened) <= size * (given // size + 2), "more than the batch and the one ahead"
        assert prediction.image == images[given]
    assert len(opened) == len(images) and list(found) == []
    assert list(predict(trainer, images[:9])) == list(predict(trainer, images[:9], threads=5))


def test_a_bar_shows_in_a_terminal_alone(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    argv = ["predict", str(world / "CoOp"), str(world / "images"), "--json"]
    capsys.readouterr()
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and len(json.loads(out)) == len(list((world / "images").rglob("*.png")))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # of no columns it would show nothing
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert cli.main(argv) == 0
    assert capsys.readouterr().out == out
    shown = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while part := os.read(ours, 4096):
            shown += part
    assert b" images" in shown and b"%" in shown
