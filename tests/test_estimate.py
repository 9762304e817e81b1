"""`plpp estimate`: the passes and sums of a run, its text and JSON; bad input is one line. Seconds are never tested."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from plpp_reg.clip import load
from plpp_reg.clip.architectures import OPENAI, Architecture, clip_without_weights, random_clip, without_weights
from plpp_reg.clip.vision import ImageTower
from plpp_reg.commands import cli
from plpp_reg.data import DataSplit
from plpp_reg.engine import registry
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError, install
from plpp_reg.estimate.estimate import LIBRARIES_MIB, Estimate, estimate, swapped_parameters, typical_names
from plpp_reg.estimate.text import as_text
from plpp_reg.estimate.trace import ALL, IMAGE, OTHER, PLPP, TEXT, Passes, Tracer, passes_of
from plpp_reg.loss import SUFFIX

from counting import NAMES

ROOT = Path(__file__).parent.parent
SHALLOW = (
    *("TRAINER.MAPLE.PROMPT_DEPTH", "2", "TRAINER.VPT.PROMPT_DEPTH_VISION", "3", "TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", "2"),
    *("TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", "2", "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", "2"),
)


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} would be downloaded")

    monkeypatch.setattr(load, "_download", refuse)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A floating-point operation takes a second: what is tested does not depend on the machine."""
    monkeypatch.setattr(
        "plpp_reg.estimate.estimate.operation_seconds", lambda operations, _: {op: float(op.flops) for op in operations}
    )
    monkeypatch.setattr("plpp_reg.estimate.estimate.overhead", lambda _: 0.0)
    monkeypatch.setattr("plpp_reg.estimate.estimate.plpp_seconds", lambda *_: 1.0)


@pytest.fixture
def three_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on their number: one layer after another asks the same of torch, which takes long to note."""
    for name in ("ViT-B/16", "ViT-L/14"):
        monkeypatch.setitem(OPENAI, name, OPENAI[name]._replace(vision_layers=3, layers=3))


def run_of(trainer: str, *opts: str) -> RunArguments:
    """On three layers."""
    return RunArguments(trainer=trainer, backbone="ViT-B/16", opts=(*SHALLOW, *opts))


def mib_of(*sizes: Architecture) -> float:
    return sum(p.nbytes for each in sizes for p in without_weights(each).parameters()) / 2**20


def without_numbers(run: RunArguments) -> Trainer:
    cfg, cls = resolve(run)
    data = DataSplit([], [], [], typical_names(5))
    with swapped_parameters():
        return Trainer(cls, cfg, data=data, clip_model=clip_without_weights("ViT-B/16"), log=RunLog(quiet=True))


def passes(run: RunArguments) -> Passes:
    return passes_of(without_numbers(run), {"train": 4, "test": 10}, {"train": 64, "test": 64})


def flops_of_images(count: int) -> int:
    tower, pixels = ImageTower(without_weights(OPENAI["ViT-B/16"])), torch.empty(count, 3, 224, 224, device="meta")
    return Tracer().of(lambda: tower(pixels)).flops()


def test_the_passes_are_the_method_s_own(three_layers):
    names = ("CoOp", "CoOp_PLPP", "CoCoOp_PLPP", "ProGrad", "PromptSRC", "VPT", "ZeroshotCLIP")
    of = {name: passes(run_of(name)) for name in names}
    text, image = ({name: made.step.flops(tower) for name, made in of.items()} for tower in (TEXT, IMAGE))
    assert 2 * text["CoOp_PLPP"] < 1.01 * text["CoCoOp_PLPP"]  # each of the four images has its own context
    assert text["ProGrad"] == pytest.approx(1.5 * text["CoOp"], rel=0.05)  # one way there, two back
    assert text["VPT"] == text["ZeroshotCLIP"] == image["CoOp_PLPP"] == image["CoCoOp_PLPP"] == image["ZeroshotCLIP"] == 0
    assert image["VPT"] > 2 * image["PromptSRC"] / 3 > flops_of_images(4)
    once = of["PromptSRC"].once
    assert once.flops(TEXT) == once.flops() > 5 * text["PromptSRC"] and not of["CoOp_PLPP"].once.flops()  # 60 templates
    plpp = {name: made.plpp for name, made in of.items()}
    assert plpp["CoOp_PLPP"] == [((1, 16, 512), (1, 16, 512))] and plpp["VPT"] == []
    assert plpp["CoCoOp_PLPP"] == [((4, 4, 512), (4, 4, 512))]
    assert of["CoOp_PLPP"].step.flops(PLPP) == 2 * 16 * 512 * (49408 + 10)  # each vector meets each word
    test = of["CoCoOp_PLPP"]
    assert not test.classes.flops() and test.batch.flops(TEXT) > 2 * test.few.flops(TEXT)  # ten images, and four
    assert (
        of["ZeroshotCLIP"].frozen["test"].flops() == flops_of_images(64) == 16 * of["ZeroshotCLIP"].few_frozen["test"].flops()
    )


def test_each_tower_has_its_own_way_back():
    step = passes(RunArguments(trainer="MaPLe_PLPP", backbone="ViT-B/16")).step
    model = without_weights(OPENAI["ViT-B/16"])
    rows = [torch.randn(2, 768, device="meta", requires_grad=True) for _ in range(9)]
    pixels, tower = torch.empty(4, 3, 224, 224, device="meta"), ImageTower(model)
    alone = Tracer().of(lambda: tower(pixels, rows[0], rows[1:]).sum().backward()).flops()
    assert step.flops(IMAGE) == pytest.approx(alone, rel=1e-3)  # MaPLe's maps to the visual prompts beside
    assert step.flops() == sum(step.flops(tower) for tower in (TEXT, IMAGE, PLPP, OTHER))
    assert step.flops(OTHER) < 1e-3 * step.flops() < step.flops(TEXT) < step.flops(IMAGE)


def test_twice_the_classes_take_about_twice_the_text_part(three_layers):
    few, many = (estimate(run_of("CoOp_PLPP"), classes=n) for n in (100, 200))
    assert many.text.operations == pytest.approx(2 * few.text.operations, rel=0.1)
    assert many.text.mib == pytest.approx(2 * few.text.mib, rel=0.1)
    assert many.steps == 2 * few.steps and many.plpp == few.plpp


def test_a_batch_takes_its_images_part(three_layers):
    opts = ("DATALOADER.TRAIN_X.BATCH_SIZE", "8")
    four, eight = (estimate(run_of("MaPLe", *o), classes=4) for o in ((), opts))
    assert eight.image.operations == pytest.approx(2 * four.image.operations, rel=1e-3) and eight.text == four.text


def test_a_run_is_its_steps_and_its_images(three_layers):
    opts = ("OPTIM.MAX_EPOCH", "3", "DATASET.NUM_SHOTS", "4", "DATALOADER.TRAIN_X.BATCH_SIZE", "8")
    cost = estimate(run_of("CoOp", *opts), classes=5)
    assert (cost.steps, cost.epochs, cost.batch) == (2, 3, 8)  # 20 images, encoded as one batch
    an_image = flops_of_images(1)
    assert cost.ahead.operations == cost.ahead.seconds == pytest.approx(20 * an_image)
    assert cost.test.operations == pytest.approx(cost.text.operations / 2 + 1000 * an_image, rel=0.01)
    assert cost.run_seconds == pytest.approx(3 * (2 * cost.step.seconds + cost.ahead.seconds))
    two_views = 2 * 20 * 512 * 4 / 2**30  # GiB
    for views, max_gib, encoded in ((2, 10, 2), (2, two_views, 2), (2, 0.9 * two_views, 3), (2, 0, 3), (1, 0, 1), (0, 0, 3)):
        some = estimate(run_of("CoOp", *opts, "INPUT.VIEWS", str(views), "FEATURES.MAX_GIB", str(max_gib)), classes=5)
        assert some.run_seconds == pytest.approx(3 * 2 * cost.step.seconds + encoded * cost.ahead.seconds), (views, max_gib)


def test_without_a_number_the_data_set_is_read(three_layers, monkeypatch):
    data = DataSplit([None] * 50, [], [None] * 70, ["cat", "dog"])
    monkeypatch.setattr("plpp_reg.estimate.estimate.load_data", lambda cfg: data)
    cost = estimate(run_of("CoOp"))
    assert (cost.classes, cost.steps, cost.test_images, cost.assumed) == (2, 1, 70, [])


# X_PLPP of each method that has one, X of the others, and of one both
ESTIMATED = [name for name in registry.trainer_names() if f"{name}{SUFFIX}" not in registry.trainer_names()] + ["CoOp"]


@pytest.fixture(scope="module")
def embedded() -> torch.nn.Module:
    return clip_without_weights("embedded")


@pytest.mark.parametrize("name", ESTIMATED)
def test_every_trainer_has_an_estimate(name, embedded):
    cost = estimate(RunArguments(trainer=name), classes=3, clip_model=embedded)
    assert cost.test.operations > 0 and (cost.plpp.seconds > 0) == name.endswith(SUFFIX)
    assert (cost.run_seconds > 0) == (cost.steps > 0) == (not name.startswith("Zeroshot"))


def test_the_papers_teacher_needs_no_weights(three_layers):
    cost = estimate(run_of("CoOp_KDPL_PLPP"), classes=3)  # ViT-H/14 of open_clip's
    assert cost.ahead.operations > 5 * 16 * 3 * flops_of_images(1) and cost.model_mib > 3000


def test_a_teachers_passes_and_what_the_store_gets_are_counted(three_layers):
    teacher = ("TEACHER.TRAINER", "ZeroshotCLIP", "TEACHER.BACKBONE", "ViT-L/14")
    small = ("DATASET.NUM_SHOTS", "4", "OPTIM.MAX_EPOCH", "3")
    cost = estimate(run_of("PromptKD", *teacher, *small), classes=5)
    tower, pixels = ImageTower(without_weights(OPENAI["ViT-L/14"])), torch.empty(1, 3, 224, 224, device="meta")
    assert cost.ahead.operations == pytest.approx(20 * Tracer().of(lambda: tower(pixels)).flops())
    assert cost.views == 3 and cost.kept_gib == pytest.approx(3 * 20 * 768 * 4 / 2**30)
    assert cost.model_mib == pytest.approx(mib_of(OPENAI["ViT-B/16"], OPENAI["ViT-L/14"]))  # both are there
    more = ("INPUT.VIEWS", "2", "FEATURES.MAX_GIB", str(cost.kept_gib / 2))
    unfit = estimate(run_of("PromptKD", *teacher, *small, *more), classes=5)
    assert unfit.views == 3 and "they do not fit" in as_text(unfit) and "they do not fit" not in as_text(cost)


def test_a_teacher_that_shares_the_students_tower_costs_no_passes_of_its_own(three_layers):
    costs = {name: estimate(run_of(name, "TEACHER.BACKBONE", ""), classes=3) for name in ("CoOp", "FDBPL")}
    assert costs["FDBPL"].ahead.operations == costs["CoOp"].ahead.operations > 0


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


def test_it_takes_the_flags_that_train_takes(capsys, monkeypatch, three_layers):
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


def test_the_page_s_table_is_that_of_the_recorded_file(capsys, monkeypatch):
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    recorded = page.split("<!-- table of ")[1].split(" -->")[0]
    monkeypatch.setattr(sys, "argv", ["cost.py", "--markdown", "--json", str(ROOT / recorded)])
    importlib.import_module("cost").main()
    assert capsys.readouterr().out.strip() in page


@pytest.mark.parametrize("name", ["CoOp_PLPP", "MaPLe", "ZeroshotCLIP"])
def test_the_peak_is_the_most_of_a_step_the_features_and_a_test(name, three_layers):
    cost = estimate(run_of(name, "DATALOADER.TRAIN_X.BATCH_SIZE", "64"), classes=10)
    most = {"CoOp_PLPP": cost.ahead, "MaPLe": cost.step, "ZeroshotCLIP": cost.test}[name]
    assert most.mib == max(cost.step.mib, cost.ahead.mib, cost.test.mib) > 0
    assert cost.model_mib == pytest.approx(mib_of(OPENAI["ViT-B/16"]))
    assert cost.peak_mib == pytest.approx(cost.model_mib + most.mib)


def test_what_torch_itself_holds_is_in_each_part_of_the_peak(three_layers, monkeypatch):
    plain = estimate(run_of("CoOp_PLPP"), classes=10)
    monkeypatch.setitem(LIBRARIES_MIB, "cpu", 50.0)
    more = estimate(run_of("CoOp_PLPP"), classes=10)
    for part in ("step", "ahead", "test"):
        assert getattr(more, part).mib == pytest.approx(30 + getattr(plain, part).mib)


def test_a_chunk_is_made_again_when_the_images_are_freed(three_layers, monkeypatch):
    """Of many classes the text tower runs in chunks, before the images: the two never live at once."""
    monkeypatch.setattr("plpp_reg.trainers.promptsrc.SIXTY", ("a photo of a {}.",))  # of which no step is made
    for name in ("MaPLe", "PromptSRC"):
        run = run_of(name, "MODEL.TEXT_MEMORY_MIB", "256")  # of twelve layers 1024 are as many rows
        few, many = (estimate(run, classes=n) for n in (100, 1000))
        assert few.step.mib > few.text.mib + few.image.mib
        assert many.text.mib < many.step.mib < 0.8 * (many.text.mib + many.image.mib)


@pytest.mark.parametrize("name", ["CoOp", "CoCoOp", "MaPLe", "PromptSRC"])
def test_a_step_s_memory_is_what_lives_in_a_real_one(name):
    names = DataSplit([], [], [], NAMES)
    run = RunArguments(trainer=name, backbone="ViT-B/16", opts=("INPUT.SIZE", "(32,32)"))
    sizes = OPENAI["ViT-B/16"]._replace(
        embed_dim=32, resolution=32, vision_layers=9, vision_width=64, width=128, heads=2, layers=9
    )
    cost = estimate(run, data=names, clip_model=without_weights(sizes))
    cfg, cls = resolve(run)
    trainer = Trainer(cls, cfg, data=names, clip_model=random_clip(sizes), log=RunLog(quiet=True))

    def step() -> None:
        count = cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        batch = {"label": torch.zeros(count, dtype=torch.long)}
        if trainer.method.inputs.pixels:
            batch["img"] = torch.randn(count, 3, 32, 32)
        if trainer.method.inputs.of("train"):
            batch["features"] = normalize(torch.randn(count, 32))
        trainer.step(batch)

    tracer = Tracer()
    tracer.of(step)
    assert cost.step.mib - LIBRARIES_MIB["cpu"] == pytest.approx(tracer.of(step).most[ALL] / 2**20, rel=0.02)


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

    trainer = without_numbers(RunArguments(trainer="CoOp", backbone="ViT-B/16"))
    monkeypatch.setattr(trainer, "losses", fails)
    with pytest.raises(raised, match=message):
        passes_of(trainer, {"train": 4, "test": 10}, {"train": 64, "test": 64})


def test_open_clip_that_is_missing_is_installed_from_the_clone(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=re.escape(install("open_clip"))):
        clip_without_weights("open_clip:ViT-B-32/openai")
