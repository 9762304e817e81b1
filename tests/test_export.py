"""plpp export: a trained prompt as a file for other programs, and the README's lines that use it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import sys
import threading
import types
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from plpp_reg.commands import cli
from plpp_reg.data import DataSplit
from plpp_reg.data.augmentation import build_transform
from plpp_reg.errors import InputError
from plpp_reg.io.pictures import open_picture
from plpp_reg.prompts.export import TOLERANCE, Whole, export
from plpp_reg.prompts.loading import load_run
from plpp_reg.prompts.predict import predict

from helpers import engine as helpers
from helpers.trained import pictures

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(trained_runs: Path) -> Path:
    return trained_runs


@pytest.mark.parametrize("name", ["CoOp", "CSC", "MaPLe", "IVLP", "VPT", "PromptSRC", "CoCoOp", "FDBPL"])
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
    whole = name in ("CoOp", "CSC", "FDBPL")
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


# ---- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The ONNX file of a run by its name, made once by ``plpp export``, which says one line."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def made(name: str) -> Path:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main(["export", str(world / name), str(folder / f"{name}.onnx"), "--format", "onnx"]) == 0
        assert said.getvalue().count("\n") == 1
        return folder / f"{name}.onnx"

    return made


@pytest.mark.parametrize("name", ["CSC", "PromptSRC"])
def test_what_is_exported_gives_the_methods_probabilities(world: Path, name: str) -> None:
    """Before it is a file; as one, what it asks of torch is what a method of the next test does: CoOp or IVLP."""
    trainer = load_run(world / name)
    transform = build_transform(trainer.cfg, train=False)
    pixels = torch.stack([transform.pixels(open_picture(path)) for path in pictures(world)])
    with torch.no_grad():
        rows = Whole(trainer.method, transform.mean, transform.std).eval()(pixels)
    for row, ours in zip(rows, predict(trainer, pictures(world)), strict=True):
        assert dict(zip(trainer.data.classnames, row.tolist(), strict=True)) == pytest.approx(ours.probabilities, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["CoOp", "VPT", "MaPLe", "IVLP", "PromptKD", "FDBPL"])
def test_an_onnx_file_gives_torchs_probabilities(world: Path, name: str, onnx_file: Callable[[str], Path]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file(name))
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    trainer = load_run(world / name)
    assert told["trainer"] == trainer.cfg.TRAINER.NAME and told["input"]["size"] == [32, 32]
    transform = build_transform(trainer.cfg, train=False)
    for images in (pictures(world)[:1], pictures(world)):
        pixels = torch.stack([transform.pixels(open_picture(path)) for path in images])
        (rows,) = session.run(None, {"pixels": pixels.numpy()})
        for row, ours in zip(rows, predict(trainer, images), strict=True):
            wanted = {n.replace("_", " "): p for n, p in ours.probabilities.items()}
            assert dict(zip(told["classnames"], row.tolist(), strict=True)) == pytest.approx(wanted, abs=TOLERANCE)


def test_a_resnets_onnx_file(tiny_resnet: torch.nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    data = DataSplit([], [], [], ["cat", "dog"])
    export(helpers.make_trainer(data, clip_model=tiny_resnet), tmp_path / "p.onnx")  # it compares the two itself
    assert (tmp_path / "p.onnx").stat().st_size > 1000


def test_what_has_no_onnx_file_says_why(world: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert cli.main(["export", str(world / "CoCoOp"), str(tmp_path / "p.onnx")]) == 2
    assert "CoCoOp runs the text tower on every class name again for each image" in capsys.readouterr().err
    assert cli.main(["export", str(world / "CoOp"), str(tmp_path / "p.safetensors"), "--format", "onnx"]) == 2
    assert "expected the name of a file that ends in .onnx" in capsys.readouterr().err
    assert cli.main(["export", str(world / "CoOp"), str(tmp_path / "p.onnx"), "--format", "tflite"]) == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert cli.main(["export", str(world / "CoOp"), str(tmp_path / "p.onnx")]) == 2
    assert 'pip install -e ".[onnx]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_that_computes_something_else_is_not_kept(world: Path, tmp_path: Path, monkeypatch, onnx_file) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    class Wrong:
        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((len(inputs["pixels"]), 5), 0.2, np.float32)]

    exported = types.SimpleNamespace(model_proto=onnx.load(onnx_file("CoOp")))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: exported)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(InputError, match="expected torch's probabilities within 0.0001, got them"):
        export(load_run(world / "CoOp"), tmp_path / "p.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_readmes_service_answers_as_plpp_predict_does(world: Path, onnx_file: Callable[[str], Path]) -> None:
    pytest.importorskip("onnxruntime")
    trainer = load_run(world / "CoOp")
    code = re.search(r"<!-- service -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert sum(bool(line) for line in code.splitlines()) <= 15
    code = code.replace('"prompt.onnx"', repr(str(onnx_file("CoOp")))).replace("8000", "0")
    *lines, last = code.strip().splitlines()
    assert last.endswith(".serve_forever()")
    scope: dict = {}
    exec("\n".join([*lines, "server = " + last.removesuffix(".serve_forever()")]), scope)  # noqa: S102
    threading.Thread(target=scope["server"].serve_forever, daemon=True).start()
    try:
        for path in pictures(world)[::4]:
            address = f"http://127.0.0.1:{scope['server'].server_address[1]}"
            with urllib.request.urlopen(address, Path(path).read_bytes()) as answer:
                told = json.loads(answer.read())
            (ours,) = predict(trainer, [path])
            assert told == pytest.approx({n.replace("_", " "): p for n, p in ours.probabilities.items()}, abs=TOLERANCE)
    finally:
        scope["server"].shutdown()
        scope["server"].server_close()
