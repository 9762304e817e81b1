"""`plpp estimate`: what is counted is what torch counts and keeps; bad input is one line. Seconds are never tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plpp_reg import cli
from plpp_reg.clip import load
from plpp_reg.clip.architectures import OPENAI, clip_without_weights, without_weights
from plpp_reg.clip.operations import image_cost, text_cost
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.throughput import Throughput
from plpp_reg.clip.vision import ImageTower
from plpp_reg.datasets import DataSplit
from plpp_reg.engine import registry
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.passes import Passes, passes_of
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.estimate import Estimate, estimate, typical_names

ROOT = Path(__file__).parent.parent
NAMES = ["cat", "red panda", "traffic light", "fire truck red", "dog", "red cat dog", "red cat"]
KINDS = {  # G, class-specific, position, memory bound in MiB, whether PLPP reads
    "shared": (1, False, "end", 1024, True),
    "shared, without PLPP": (1, False, "end", 1024, False),
    "class-specific": (1, True, "end", 1024, True),
    "class-specific, without PLPP": (1, True, "end", 1024, False),
    "middle": (1, False, "middle", 1024, True),
    "front": (1, False, "front", 1024, True),
    "an image each (CoCoOp)": (3, False, "end", 1024, True),
    "in chunks": (1, False, "end", 0.2, True),
}


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} would be downloaded")

    monkeypatch.setattr(load, "_download", refuse)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation takes a second: what is tested does not depend on the machine."""
    one = Throughput(1.0, 1.0, 1.0)
    monkeypatch.setattr("plpp_reg.estimate.text_throughput", lambda *_: one)
    monkeypatch.setattr("plpp_reg.estimate.image_throughput", lambda *_: one)
    monkeypatch.setattr("plpp_reg.estimate.plpp_seconds", lambda *_: 1.0)


def text_pass(model, kind: str):
    """The tower, the tree, and a function that runs it; of KINDS."""
    groups, class_specific, position, mib, need_hidden = KINDS[kind]
    tower = TextTower(model, mib)
    prompts = PromptLearner(model, NAMES, 4, class_specific=class_specific, position=position)
    tree, context = prompts.tree(tower.max_nodes(groups)), prompts.ctx.flatten(0, -2).expand(groups, -1, -1)

    def run() -> torch.Tensor:
        out = tower(tree, context, need_hidden=need_hidden)
        return out.features.sum() + (out.hidden.sum() if need_hidden else 0)

    return text_cost(tower, tree, groups, need_hidden), run


def counted(run) -> tuple[int, int]:
    """torch's own operations of forward and backward; the plain attention, because it counts no other on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        out = run()
        forward = count.get_total_flops()
        if out.requires_grad:
            out.backward()
    return forward, count.get_total_flops() - forward


def kept_bytes(run, model) -> int:
    """What autograd keeps, each storage once, the frozen weights aside."""
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: no other comes to its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_the_text_tower_are_those_that_torch_counts(kind, make_clip):
    cost, run = text_pass(make_clip(layers=4), kind)
    forward, backward = counted(run)
    assert cost.forward == forward
    assert cost.backward == pytest.approx(backward, rel=0.03)


@pytest.mark.parametrize(("images", "prompts"), [(2, 0), (3, 2), (1, 5)])
def test_operations_of_the_image_tower_are_those_that_torch_counts(images, prompts, make_clip):
    model = make_clip(vision_layers=3)
    rows = torch.randn(prompts, 64, requires_grad=True) if prompts else None
    cost = image_cost(ImageTower(model), images, prompts, learns=prompts > 0)
    forward, backward = counted(lambda: ImageTower(model)(torch.randn(images, 3, 32, 32), rows).sum())
    assert cost.forward == forward
    assert cost.backward == pytest.approx(backward, rel=0.03)


def test_operations_of_a_resnet_are_those_that_torch_counts(tiny_resnet):
    forward, _ = counted(lambda: ImageTower(tiny_resnet)(torch.randn(2, 3, 32, 32)).sum())
    assert image_cost(ImageTower(tiny_resnet), 2).forward == pytest.approx(forward, rel=0.01)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "in chunks"])  # autograd keeps little there until backward
def test_bytes_are_those_that_autograd_keeps(kind, make_clip):
    model = make_clip(layers=4)
    cost, run = text_pass(model, kind)
    assert kept_bytes(run, model) == pytest.approx(cost.kept, rel=0.2)


def test_bytes_of_images_are_those_that_autograd_keeps(make_clip):
    model, rows = make_clip(vision_layers=4), torch.randn(2, 64, requires_grad=True)
    kept = kept_bytes(lambda: ImageTower(model)(torch.randn(3, 3, 32, 32), rows), model)
    assert kept == pytest.approx(image_cost(ImageTower(model), 3, 2, learns=True).kept, rel=0.05)


def test_a_memory_bound_lowers_the_bytes_and_runs_chunks_twice(make_clip):
    whole, in_chunks = text_pass(make_clip(layers=4), "shared")[0], text_pass(make_clip(layers=4), "in chunks")[0]
    assert in_chunks.kept < 0.6 * whole.kept
    assert in_chunks.backward > 1.5 * whole.backward


def test_what_is_not_learned_keeps_nothing(make_clip):
    model = make_clip()
    tree = PromptLearner(model, NAMES, 4).tree()
    cost = text_cost(TextTower(model), tree, learns=False)
    assert cost.forward > 0 and cost.backward == cost.kept == 0


def passes(name: str, batch: int = 4, classes: int = 5, *opts: str) -> Passes:
    cfg, cls = resolve(RunArguments(trainer=name, backbone="ViT-B/16", opts=opts))
    data = DataSplit([], [], [], typical_names(classes))
    trainer = cls(cfg, data=data, clip_model=clip_without_weights("ViT-B/16"), log=RunLog(quiet=True))
    return passes_of(trainer, batch, 10)


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
    assert (cost.steps, cost.epochs, cost.batch) == (2, 3, 8)  # 20 images
    assert cost.ahead.operations == pytest.approx(20 * image_cost(ImageTower(without_weights(OPENAI["ViT-B/16"])), 1).forward)
    assert cost.run_seconds == pytest.approx(3 * (2 * cost.step.seconds + cost.ahead.seconds))


def test_without_a_number_the_data_set_is_read(monkeypatch):
    data = DataSplit([None] * 50, [], [None] * 70, ["cat", "dog"])
    monkeypatch.setattr("plpp_reg.estimate.load_data", lambda cfg: data)
    cost = estimate(RunArguments(trainer="CoOp", backbone="ViT-B/16"))
    assert (cost.classes, cost.steps, cost.test_images, cost.assumed) == (2, 1, 70, [])


@pytest.mark.parametrize("name", registry.trainer_names())
def test_every_trainer_has_an_estimate(name):
    cost = estimate(RunArguments(trainer=name, backbone="ViT-B/16"), classes=3)
    assert cost.test.operations > 0 and (cost.plpp.seconds > 0) == name.endswith(registry.SUFFIX)
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


def test_the_text_says_what_is_assumed(capsys):
    assert cli.main(["estimate", "--backbone", "ViT-B/16", "--classes", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 class names of typical length" in out and "1,000 test images" in out and "once an (epoch, image)" in out


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--classes", "none"], "'none'"),
        (["--classes", "0"], "expected an integer from 1"),
        (["--backbone", "ViT-B/17", "--classes", "3"], "'ViT-B/16'"),
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
