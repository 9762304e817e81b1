"""`plpp estimate`: the passes and sums of a run, its text and JSON; bad input is one line. Seconds are never tested."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from plpp_reg.clip import load
from plpp_reg.clip.architectures import OPENAI, clip_without_weights, random_clip, without_weights
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.vision import ImageTower
from plpp_reg.commands import cli
from plpp_reg.data import DataSplit
from plpp_reg.engine import registry
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError, install
from plpp_reg.estimate.estimate import LIBRARIES_MIB, Estimate, _part, _rates, estimate, typical_names
from plpp_reg.estimate.operations import Cost, image_cost
from plpp_reg.estimate.throughput import Machine, Throughput
from plpp_reg.estimate.trace import Pass, Passes, passes_of
from plpp_reg.loss import SUFFIX

from counting import NAMES, kept_bytes

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} would be downloaded")

    monkeypatch.setattr(load, "_download", refuse)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation takes a second: what is tested does not depend on the machine."""

    def one(tower, *shape) -> Throughput:  # of what does not learn no more is timed than really would be
        return Throughput(1.0, 1.0, 1.0) if shape[-1] else Throughput(1.0)

    monkeypatch.setattr("plpp_reg.estimate.estimate.text_throughput", one)
    monkeypatch.setattr("plpp_reg.estimate.estimate.image_throughput", one)
    monkeypatch.setattr("plpp_reg.estimate.estimate.plpp_seconds", lambda *_: 1.0)


def without_numbers(name: str) -> PromptTrainer:
    cfg, cls = resolve(RunArguments(trainer=name, backbone="ViT-B/16"))
    data = DataSplit([], [], [], typical_names(5))
    return cls(cfg, data=data, clip_model=clip_without_weights("ViT-B/16"), log=RunLog(quiet=True))


def passes(name: str) -> Passes:
    return passes_of(without_numbers(name), 4, 10)


def test_the_passes_are_the_method_s_own():
    of = {name: passes(name) for name in ("CoOp_PLPP", "CoCoOp_PLPP", "ProGrad", "PromptSRC", "VPT", "ZeroshotCLIP")}
    shape = {name: [(p.tower, p.together, p.prompts, p.backwards) for p in made.step] for name, made in of.items()}
    assert shape == {
        "CoOp_PLPP": [("text", 1, 0, 1)],
        "CoCoOp_PLPP": [("text", 4, 0, 1)],  # each image has its own context
        "ProGrad": [("text", 1, 0, 2)],  # two gradients
        "PromptSRC": [("text", 1, 0, 1), ("image", 4, 4, 1)],
        "VPT": [("image", 4, 8, 1)],
        "ZeroshotCLIP": [],
    }
    assert [p.tower for p in of["PromptSRC"].once] == ["text"] and not of["CoOp_PLPP"].once
    assert of["PromptSRC"].once[0].positions > 20 * of["PromptSRC"].step[0].positions  # 60 templates
    assert of["CoOp_PLPP"].plpp == (16, 16, False) and of["CoCoOp_PLPP"].plpp == (16, 16, True) and of["VPT"].plpp is None
    assert [p.together for p in of["CoCoOp_PLPP"].batch] == [10] and not of["CoCoOp_PLPP"].classes


def test_positions_are_the_tree_s():
    cost = estimate(RunArguments(trainer="CoOp", backbone="ViT-B/16"), classes=9)
    model = without_weights(OPENAI["ViT-B/16"])
    assert cost.positions == PromptLearner(model, typical_names(9), 16).tree().positions


def test_twice_the_classes_take_about_twice_the_text_part():
    few, many = (estimate(RunArguments(trainer="CoOp_PLPP", backbone="ViT-B/16"), classes=n) for n in (100, 200))
    assert many.text.operations == pytest.approx(2 * few.text.operations, rel=0.1)
    assert many.text.mib == pytest.approx(2 * few.text.mib, rel=0.1)
    assert many.steps == 2 * few.steps and many.plpp == few.plpp


def test_a_batch_takes_its_images_part():
    opts = ("DATALOADER.TRAIN_X.BATCH_SIZE", "8")
    four, eight = (estimate(RunArguments(trainer="MaPLe", backbone="ViT-B/16", opts=o), classes=4) for o in ((), opts))
    assert eight.image.operations == pytest.approx(2 * four.image.operations) and eight.text == four.text


def test_a_run_is_its_steps_and_its_images():
    opts = ("OPTIM.MAX_EPOCH", "3", "DATASET.NUM_SHOTS", "4", "DATALOADER.TRAIN_X.BATCH_SIZE", "8")
    cost = estimate(RunArguments(trainer="CoOp", backbone="ViT-B/16", opts=opts), classes=5)
    assert (cost.steps, cost.epochs, cost.batch) == (2, 3, 8)  # 20 images, encoded as one batch
    an_image = image_cost(ImageTower(without_weights(OPENAI["ViT-B/16"])), 1).forward
    assert cost.ahead.operations == cost.ahead.seconds == pytest.approx(20 * an_image)
    assert cost.test.operations == pytest.approx(cost.text.operations / 2 + 1000 * an_image, rel=0.01)
    assert cost.run_seconds == pytest.approx(3 * (2 * cost.step.seconds + cost.ahead.seconds))
    two_views = 2 * 20 * 512 * 4 / 2**30  # GiB
    for views, max_gib, encoded in ((2, 10, 2), (2, two_views, 2), (2, 0.9 * two_views, 3), (2, 0, 3), (1, 0, 1), (0, 0, 3)):
        more = (*opts, "INPUT.VIEWS", str(views), "FEATURES.MAX_GIB", str(max_gib))
        some = estimate(RunArguments(trainer="CoOp", backbone="ViT-B/16", opts=more), classes=5)
        assert some.run_seconds == pytest.approx(3 * 2 * cost.step.seconds + encoded * cost.ahead.seconds), (views, max_gib)


def test_without_a_number_the_data_set_is_read(monkeypatch):
    data = DataSplit([None] * 50, [], [None] * 70, ["cat", "dog"])
    monkeypatch.setattr("plpp_reg.estimate.estimate.load_data", lambda cfg: data)
    cost = estimate(RunArguments(trainer="CoOp", backbone="ViT-B/16"))
    assert (cost.classes, cost.steps, cost.test_images, cost.assumed) == (2, 1, 70, [])


@pytest.mark.parametrize("name", registry.trainer_names())
def test_every_trainer_has_an_estimate(name):
    cost = estimate(RunArguments(trainer=name, backbone="ViT-B/16"), classes=3)
    assert cost.test.operations > 0 and (cost.plpp.seconds > 0) == name.endswith(SUFFIX)
    assert (cost.run_seconds > 0) == (cost.steps > 0) == (not name.startswith("Zeroshot"))


PUBLISHED = [("RN50", 102.01), ("RN50x64", 623.26), ("ViT-B/16", 149.62), ("ViT-L/14", 427.62)]


@pytest.mark.parametrize(("name", "millions"), PUBLISHED)
def test_sizes_are_the_published_models(name, millions):
    model = clip_without_weights(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert all(p.is_meta for p in model.parameters())


def test_a_file_gives_its_own_sizes(tmp_path, make_clip):
    torch.save(make_clip(width=64, layers=2).state_dict(), tmp_path / "tiny.pt")
    model = clip_without_weights(str(tmp_path / "tiny.pt"))
    assert model.ln_final.weight.shape == (64,) and model.ln_final.weight.is_meta


def test_names_are_different_and_the_same_each_time():
    names = typical_names(1000)
    assert len(set(names)) == 1000 and names[:10] == typical_names(10)


def test_json_has_every_field(capsys):
    assert cli.main(["estimate", "--trainer", "CoOp_PLPP", "--classes", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == list(Estimate._fields)
    assert {part: list(printed[part]) for part in ("step", "text", "plpp")} == dict.fromkeys(
        ("step", "text", "plpp"), ["seconds", "operations", "mib"]
    )


def test_it_takes_the_flags_that_train_takes(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("plpp_reg.estimate.estimate.estimate", lambda run, classes: seen.append(run) or estimate(run, classes))
    flags = ["--seed", "3", "--output-dir", "nowhere", "--transforms", "random_flip", "normalize", "OPTIM.MAX_EPOCH", "7"]
    assert cli.main(["estimate", "--backbone", "ViT-B/16", "--classes", "4", *flags]) == 0
    assert "7 epochs of" in capsys.readouterr().out
    (run,) = seen
    assert (run.seed, run.output_dir, run.transforms) == (3, "nowhere", ("random_flip", "normalize"))


def test_the_text_says_what_is_assumed(capsys):
    assert cli.main(["estimate", "--backbone", "ViT-B/16", "--classes", "4"]) == 0
    out = capsys.readouterr().out
    assert "MiB: 571 the model, over it the most of" in out and "frozen image features, " in out and " a test\n" in out
    assert "not counted   the process itself (some 700 MiB on a CPU)" in out
    assert "4 class names of typical length" in out and "1,000 test images" in out and "once a (view, image)" in out


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--classes", "none"], "'none'"),
        (["--classes", "0"], "expected an integer from 1"),
        (["--backbone", "ViT-B/17", "--classes", "3"], "'ViT-B/16'"),
        (["--backbone", "open_clip:ViT-B-32/x", "--classes", "3"], "weights of open_clip:ViT-B-32 (a tag or a file) 'x'"),
        (["--backbone", "open_clip:coca_ViT-B-32/laion2b_s13b_b90k", "--classes", "3"], "'multimodal_cfg'"),
        (["--backbone", "open_clip:ViT-B-16-SigLIP/webli", "--classes", "3"], "OpenAI's architecture"),
        (["--backbone", "open_clip:ViT-bigG-14/laion2b_s39b_b160k", "--classes", "3"], "'mlp_ratio'"),
        (["--trainer", "Coop", "--classes", "3"], "'CoOp'"),
        (["--trainer", "VPT_PLPP", "--classes", "3"], "VPT"),
        (["--class", "3"], "'--classes'"),
        (["--classes", "3", "OPTIM.LRR", "1"], "'OPTIM.LR'"),
        (["--classes", "3", "DATALOADER.TRAIN_X.BATCH_SIZE", "0"], "DATALOADER.TRAIN_X.BATCH_SIZE"),
        (["--root", "nowhere", "DATASET.NAME", "DescribableTextures"], "--classes N"),
        (["--backbone", "RN50x4", "--trainer", "MaPLe", "--classes", "3", "INPUT.SIZE", "(288,288)"], "vision transformer"),
    ],
)
def test_bad_input_is_one_line(argv, names, capsys):
    assert cli.main(["estimate", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plpp: ") and error.count("\n") == 1 and names in error, error


def test_the_page_s_table_is_that_of_the_recorded_file():
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    recorded = page.split("<!-- table of ")[1].split(" -->")[0]
    command = [sys.executable, "-W", "ignore", "benchmarks/cost.py", "--markdown", "--json", recorded]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() in page


@pytest.mark.parametrize("name", ["CoOp_PLPP", "MaPLe", "ZeroshotCLIP"])
def test_the_peak_is_the_most_of_a_step_the_features_and_a_test(name):
    opts = ("DATALOADER.TRAIN_X.BATCH_SIZE", "32")
    cost = estimate(RunArguments(trainer=name, backbone="ViT-B/16", opts=opts), classes=10)
    model_mib = 4 * 149.62e6 / 2**20
    most = {"CoOp_PLPP": cost.ahead, "MaPLe": cost.step, "ZeroshotCLIP": cost.test}[name]
    assert most.mib == max(cost.step.mib, cost.ahead.mib, cost.test.mib) > 0
    assert cost.model_mib == pytest.approx(model_mib, rel=1e-3)
    assert cost.peak_mib == pytest.approx(cost.model_mib + most.mib)


def test_what_torch_itself_holds_is_in_each_part_of_the_peak(monkeypatch):
    run = RunArguments(trainer="CoOp_PLPP", backbone="ViT-B/16")
    plain = estimate(run, classes=10)
    features = 20 * 4 * 64 * 197 * 768 / 2**20  # 20 widths a row of float32, 64 images of 197 positions
    assert plain.ahead.mib == plain.test.mib == pytest.approx(20 + features)
    monkeypatch.setitem(LIBRARIES_MIB, "cpu", 50.0)
    more = estimate(run, classes=10)
    for part in ("step", "ahead", "test"):
        assert getattr(more, part).mib == pytest.approx(30 + getattr(plain, part).mib)


def test_a_chunk_is_made_again_when_the_images_are_freed():
    """Of many classes the text tower runs in chunks, before the images: the two never live at once."""
    for name in ("MaPLe", "PromptSRC"):
        few, many = (estimate(RunArguments(trainer=name, backbone="ViT-B/16"), classes=n) for n in (100, 1000))
        assert few.step.mib > few.text.mib + few.image.mib
        assert many.text.mib < many.step.mib < 0.8 * (many.text.mib + many.image.mib)


def test_a_step_s_memory_is_what_autograd_keeps_gradients_and_a_layer_at_work():
    names = DataSplit([], [], [], NAMES)
    run = RunArguments(trainer="CoOp_PLPP", backbone="ViT-B/16", opts=("INPUT.SIZE", "(32,32)"))
    sizes = OPENAI["ViT-B/16"]._replace(
        embed_dim=32, resolution=32, vision_layers=1, vision_width=64, width=128, heads=2, layers=4
    )
    cost = estimate(run, data=names, clip_model=without_weights(sizes))
    cfg, cls = resolve(run)
    trainer = cls(cfg, data=names, clip_model=random_clip(sizes), log=RunLog(quiet=True))
    batch = {"features": trainer.normalize(torch.randn(4, 32)), "label": torch.zeros(4, dtype=torch.long)}
    kept = kept_bytes(lambda: trainer.compute_losses(batch), nn.ModuleList([trainer.clip_model, trainer.regularizer])) / 2**20
    assert kept < cost.text.mib + cost.plpp.mib < 1.25 * kept  # PLPP's is an upper bound
    gradients = 2 * 4 * 16 * 128 / 2**20
    tree = PromptLearner(trainer.clip_model, NAMES, 16).tree()
    rows = max(tree.prefix_length, *(len(chunk.nodes.token) for chunk in tree.chunks))
    working = max(15 * 4 * 128 * rows, 4 * 16 * (49408 + 4 * 10 * 128)) / 2**20
    assert cost.step.mib == pytest.approx(20 + cost.text.mib + cost.plpp.mib + gradients + working, rel=0.01)


def test_a_tower_whose_first_pass_is_frozen_is_timed_as_one_that_learns():
    one = Cost(forward=3.0, backward=4.0)
    step = [Pass(tower, one, 1, 5, learns=learns, backwards=learns) for tower in ("text", "image") for learns in (False, True)]
    rates = _rates(without_numbers("MaPLe"), Passes(step, [], [], [], None), Machine(torch.device("cpu")))
    for tower in ("text", "image"):
        assert _part(rates, [p for p in step if p.tower == tower]).seconds == 3 + 3 + 4


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RuntimeError("Tensor.item() cannot be called on meta tensors"), InputError, "run on shapes alone"),
        (NotImplementedError("no kernel"), InputError, "run on shapes alone"),
        (RuntimeError("no metadata of layer 3"), RuntimeError, "^no metadata of layer 3$"),
    ],
)
def test_only_what_shapes_cannot_do_is_told_so(error, raised, message, monkeypatch):
    def fails(*_):
        raise error

    trainer = without_numbers("CoOp")
    monkeypatch.setattr(trainer, "compute_losses", fails)
    with pytest.raises(raised, match=message):
        passes_of(trainer, 4, 10)


def test_open_clip_that_is_missing_is_installed_from_the_clone(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=re.escape(install("open_clip"))):
        clip_without_weights("open_clip:ViT-B-32/openai")


def test_the_benchmark_measures_and_predicts(tmp_path):
    out = tmp_path / "cost.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "benchmarks/cost.py",
        "--quick",
        "--cases",
        "CoOp_PLPP-10-32",
        "--json",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["seconds"] > 0 and row["predicted_mib"] > 0
    assert row["predicted_seconds"] == pytest.approx(sum(row["predicted_parts"].values()))
    assert row["predicted_parts"]["text"] > 0 and row["predicted_parts"]["plpp"] > 0
