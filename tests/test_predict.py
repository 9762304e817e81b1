"""plpp predict and plpp export: a trained prompt on one's own pictures and class names."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from plpp_reg.commands import cli
from plpp_reg.errors import InputError
from plpp_reg.prompts.predict import export, find_images, load_run, predict

from helpers import engine as helpers

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a backbone and a trained run of several methods each."""
    folder = tmp_path_factory.mktemp("predict")
    helpers.register()
    helpers.make_images(folder / "images")
    backbone = helpers.write_backbone(folder / "clip.pt")
    recipe = helpers.write_recipe(
        folder / "recipe.yaml",
        OPTIM__MAX_EPOCH=1,
        INPUT__PIXEL_MEAN=[0.48145466, 0.4578275, 0.40821073],  # clip.load's, for the README's lines
        INPUT__PIXEL_STD=[0.26862954, 0.26130258, 0.27577711],
        TRAINER__MAPLE={"PROMPT_DEPTH": 1, "PREC": "fp32"},
        TRAINER__COCOOP={"N_CTX": 2, "PREC": "fp32"},
        TRAINER__VPT={"PREC": "fp32"},
        TRAINER__IVLP={"PROMPT_DEPTH_TEXT": 1, "PROMPT_DEPTH_VISION": 1, "PREC": "fp32"},
        TRAINER__PROMPTSRC={"PROMPT_DEPTH_TEXT": 1, "PROMPT_DEPTH_VISION": 1, "PREC": "fp32"},
    )
    dataset = folder / "dataset.yaml"
    dataset.write_text("DATASET:\n  NAME: tiny\n")
    fixed = ["--root", str(folder / "images"), "--config-file", str(recipe), "--dataset-config-file", str(dataset)]
    for name, trainer, opts in (
        ("CoOp", "CoOp_PLPP", []),
        ("MaPLe", "MaPLe", []),
        ("CoCoOp", "CoCoOp", []),
        ("CSC", "CoOp", ["TRAINER.COOP.CSC", "True"]),
        ("IVLP", "IVLP_PLPP", []),
        ("VPT", "VPT", []),
        ("PromptSRC", "PromptSRC", []),
    ):
        out = ["--backbone", str(backbone), "--trainer", trainer, "--output-dir", str(folder / name)]
        assert cli.main(["train", *fixed, *out, *opts]) == 0
    return folder


def pictures(world: Path) -> list[str]:
    return [str(p) for p in sorted((world / "images" / "test").rglob("*.png"))]


@pytest.mark.parametrize("name", ["CoOp", "MaPLe", "CoCoOp", "CSC"])
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


@pytest.mark.parametrize("name", ["CoOp", "MaPLe", "CoCoOp"])
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
        (["{world}/CoOp", "{world}/recipe.yaml"], "expected a readable picture"),
        (["{world}/CoOp", "{world}/empty"], "expected pictures"),
        (["{world}/CoOp", "{world}/images", "--classes", "a", "a"], "expected different names, got 'a' and 'a'"),
        (["{world}/CoOp", "{world}/images", "--classes", "red_panda", "red panda"], "got 'red_panda' and 'red panda'"),
        (["{world}/CoOp", "{world}/images", "--classes", "Tea", "tea "], "got 'Tea' and 'tea '"),
        (["{world}/CoOp", "{world}/images", "--classes", "cat,dog"], "expected two names or more, with spaces between them"),
        (["{world}/CoOp", "{world}/images", "--classes", "a", "_"], "--classes: expected names, got '_'"),
        (["{world}/CoOp", "{world}/images", "--top", "0"], "--top: expected a number >= 1, got 0"),
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


def test_a_run_that_learned_nothing_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("TRAINER:\n  NAME: ZeroshotCLIP\n")
    assert cli.main(["predict", str(tmp_path / "run"), pictures(world)[0]]) == 2
    assert "expected a run that has learned prompts, ZeroshotCLIP has no checkpoint" in capsys.readouterr().err


def test_folders_and_files_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in find_images([tmp_path, tmp_path / "notes.txt"])] == ["a.jpg", "b.PNG", "notes.txt"]


@pytest.mark.parametrize("name", ["CoOp", "CSC", "MaPLe", "IVLP", "VPT", "PromptSRC", "CoCoOp"])
def test_an_exported_file_holds_what_was_learned(world: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Class features only where the README's ten lines classify with them."""
    trainer = load_run(world / name)
    capsys.readouterr()
    assert cli.main(["export", str(world / name), str(tmp_path / "prompt.safetensors")]) == 0
    said = capsys.readouterr().out.splitlines()
    with safe_open(tmp_path / "prompt.safetensors", "pt") as file:
        names = set(file.keys())
        for key, value in trainer.method.saved.state_dict().items():
            assert torch.equal(file.get_tensor(key), value)
        assert json.loads(file.metadata()["trainer"]) == trainer.cfg.TRAINER.NAME
        left_out = json.loads(file.metadata()["left_out"])
    whole = name in ("CoOp", "CSC")
    assert ("class_features" in names) == whole == (left_out == "")
    assert len(said) == (1 if whole else 2)
    if not whole:
        assert left_out in said[1] and "plpp predict" in said[1]


def test_the_readmes_ten_lines_give_the_same_probabilities(world: Path, tmp_path: Path) -> None:
    trainer, picture = load_run(world / "CoOp"), pictures(world)[4]
    export(trainer, tmp_path / "prompt.safetensors")
    code = re.search(r"<!-- export -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert sum(bool(line) for line in code.splitlines()) <= 10
    code = code.replace('"prompt.safetensors"', repr(str(tmp_path / "prompt.safetensors"))).replace('"dog.jpg"', repr(picture))
    code = code.replace('clip.load("ViT-B/16", "cpu")', "(model, clip.clip._transform(model.visual.input_resolution))")
    scope: dict = {"model": helpers.tiny_clip()}
    exec(code, scope)  # noqa: S102
    (ours,) = predict(trainer, [picture])
    theirs = dict(zip(scope["names"], scope["probabilities"].flatten().tolist(), strict=True))
    assert theirs == pytest.approx({n.replace("_", " "): p for n, p in ours.probabilities.items()}, abs=1e-4)


def test_export_writes_nothing_half(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("plpp_reg.io.files.os.fsync", full)
    with pytest.raises(InputError, match=r"prompt.safetensors.*expected a place to write to, got disk full"):
        export(load_run(world / "CoOp"), tmp_path / "prompt.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("{world}/CoOp/config.yaml", "expected the name of a file that ends in .safetensors"),
        ("{tmp}", "expected the name of a file"),
        ("{tmp}/folder.safetensors", "expected the name of a file"),
        ("{world}/recipe.yaml/prompt.safetensors", "expected a place to write to"),
    ],
)
def test_a_place_that_is_not_for_an_export_is_one_line(
    world: Path, tmp_path: Path, file: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    before = {p: p.read_bytes() for p in world.rglob("*.yaml")}
    assert cli.main(["export", str(world / "CoOp"), file.format(world=world, tmp=tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    assert before == {p: p.read_bytes() for p in world.rglob("*.yaml")}


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
    monkeypatch.setattr("plpp_reg.prompts.predict.load_run", lambda *_, **__: trainer)
    capsys.readouterr()
    assert cli.main(["predict", str(world / "CoOp"), picture, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert sum(row["probabilities"].values()) == pytest.approx(1) and len(row["probabilities"]) == 5


def test_a_picture_that_cannot_be_read_is_named_and_the_others_go_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = pictures(world)[:3]
    bad = [tmp_path / "a.png", tmp_path / "b.jpg"]
    bad[0].write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\0IHDR\xa8\xa1\xdeZ")
    bad[1].write_bytes(b"no picture")
    capsys.readouterr()
    assert cli.main(["predict", str(world / "CoOp"), *map(str, good)]) == 0
    alone = capsys.readouterr().out
    mixed = [good[0], bad[0], good[1], bad[1], good[2]]
    assert cli.main(["predict", str(world / "CoOp"), *map(str, mixed)]) == 1
    said = capsys.readouterr()
    assert said.out == alone
    assert [line.split(": ")[:2] for line in said.err.splitlines()] == [["plpp", f"image {path}"] for path in bad]
    assert cli.main(["predict", str(world / "CoOp"), *map(str, mixed), "--json"]) == 1
    assert [row["image"] for row in json.loads(capsys.readouterr().out)] == list(map(str, good))
    assert cli.main(["predict", str(world / "CoOp"), *map(str, bad)]) == 1
    assert cli.main(["predict", str(world / "CoOp"), str(bad[0])]) == 2  # nothing else was asked for
