"""Whole runs: their files and figures, what stops one, each precision, and checkpoints of upstream."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from plpp_reg.data import DATASETS, DatasetEntry, DataSplit
from plpp_reg.engine import checkpoint
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.trainer import NonFiniteLoss, Trainer
from plpp_reg.errors import InputError
from plpp_reg.trainers.coop import CoOp

from helpers import engine as helpers
from helpers.engine import quietly


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    helpers.make_images(folder / "data")
    helpers.write_backbone(folder / "tiny.pt")
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSplit:
    return helpers.read_tiny(folder / "data")


@pytest.fixture
def arguments(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """RunArguments of a short run through the whole program, by the place of its recipe changes and its options."""
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))

    def make(name: str = "out", trainer: str = "CoOp", opts: tuple = (), recipe: dict | None = None, **more) -> RunArguments:
        config_file = helpers.write_recipe(tmp_path / f"{name}.yaml", **(recipe or {}))
        return RunArguments(
            trainer=trainer,
            root=str(folder / "data"),
            output_dir=str(tmp_path / name),
            config_file=str(config_file),
            backbone=str(folder / "tiny.pt"),
            opts=tuple(map(str, opts)),
            **more,
        )

    return make


def load(run_folder: str | Path, name: str = "model.pth.tar-2") -> dict:
    return torch.load(Path(run_folder) / "prompt_learner" / name, weights_only=True)


# ---- whole runs ----------------------------------------------------------------------------------------------------------


def test_the_flag_is_the_same_run_as_the_name(arguments) -> None:
    named = quietly(arguments("named", "CoOp_PLPP"))
    flagged = quietly(arguments("flagged", "CoOp", ("TRAINER.PLPP.ENABLED", "True")))
    one, two = (load(arguments(name).output_dir) for name in ("named", "flagged"))
    for content in (one, two):
        content["plpp_reg"].pop("seconds")
    helpers.assert_same(one, two)
    assert named["trainer"] == flagged["trainer"] == "CoOp_PLPP"
    assert named["metrics"] == flagged["metrics"] and named["losses"] == flagged["losses"]
    assert {"ce", "ppl", "inverse_ppl"} <= named["losses"].keys()
    plain = quietly(arguments("plain", "CoOp"))
    assert plain["trainer"] == "CoOp" and "ppl" not in plain["losses"]
    assert not torch.equal(load(arguments("plain").output_dir)["state_dict"]["ctx"], one["state_dict"]["ctx"])


def test_a_run_with_zero_weights_is_coops_run(arguments) -> None:
    off = ("TRAINER.PLPP.WEIGHT", "0", "TRAINER.PLPP.INVERSE_WEIGHT", "0")
    quietly(arguments("off", "CoOp_PLPP", off))
    quietly(arguments("plain", "CoOp"))
    one, two = (load(arguments(name).output_dir) for name in ("off", "plain"))
    for content in (one, two):
        content["plpp_reg"].pop("seconds")
    helpers.assert_same(one, two)


def test_files_keys_and_figures_of_a_run(arguments, data: DataSplit) -> None:
    a = arguments("out", "CoOp_PLPP")
    result = quietly(a)
    folder = Path(a.output_dir)
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "log.txt",
        "prompt_learner",
        "result.json",
        "few_shot.json",
        "tensorboard",
    }
    # Only the newest of the epochs: CHECKPOINT_FREQ asks for none between.
    assert {p.name for p in (folder / "prompt_learner").iterdir()} == {"checkpoint", "model.pth.tar-2"}
    assert (folder / "prompt_learner" / "checkpoint").read_text() == "model.pth.tar-2\n"
    content = load(folder)
    assert content.keys() == {"state_dict", "epoch", "optimizer", "scheduler", "val_result", "plpp_reg"}
    assert content["state_dict"].keys() == {"ctx"} and content["epoch"] == 2
    assert content["state_dict"]["ctx"].dtype == torch.float32
    assert [epoch["lr"] for epoch in content["plpp_reg"]["history"]] == pytest.approx([1e-5, 0.05])
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["files_sha256"] == data.sha256() and result["seed"] == 1 and result["seconds"] > 0
    assert result["config"]["OPTIM.LR"] == 0.05 and torch.__version__.startswith(result["versions"]["torch"])
    last = content["plpp_reg"]["history"][-1]
    assert result["losses"] == {name: last[name] for name in ("loss", "ce", "ppl", "inverse_ppl")}
    assert result["versions"]["precision"] == "fp32" and result["versions"]["device"] == "cpu"
    log = (folder / "log.txt").read_text()
    assert log.count(" eta 0:00:00") >= 2  # where Dassl has it; the line of each short epoch
    assert "Evaluate on the *test* set" in log and f"* accuracy: {result['metrics']['accuracy']:.1f}%" in log


def test_checkpoint_frequency_keeps_what_it_names(arguments) -> None:
    a = arguments("out", recipe={"OPTIM__MAX_EPOCH": 5}, opts=("TRAIN.CHECKPOINT_FREQ", "2"))
    quietly(a)
    names = {p.name for p in (Path(a.output_dir) / "prompt_learner").iterdir()}
    assert names == {"checkpoint", "model.pth.tar-2", "model.pth.tar-4", "model.pth.tar-5"}


def test_figures_are_scikit_learns_on_the_final_context(arguments, data: DataSplit) -> None:
    a = arguments("out")
    result = quietly(a)
    trainer = helpers.make_trainer(data)
    trainer.method.saved.ctx.data.copy_(load(a.output_dir)["state_dict"]["ctx"])
    with torch.no_grad():
        logits = torch.cat([helpers.logits_of(trainer, b) for b in trainer.batches("test")])
    truth, guess = [d.label for d in data.test], logits.argmax(1).numpy()
    assert result["metrics"]["accuracy"] == pytest.approx(100 * accuracy_score(truth, guess))
    assert result["metrics"]["error"] == pytest.approx(100 - 100 * accuracy_score(truth, guess))
    assert result["metrics"]["macro_f1"] == pytest.approx(
        100 * f1_score(truth, guess, average="macro", labels=np.unique(truth))
    )


def test_best_val_deploys_the_best_model_on_validation(arguments, monkeypatch: pytest.MonkeyPatch, data: DataSplit) -> None:
    # Epoch 2 is made the best by decree; the last one must not be what is tested.
    accuracies = iter([20.0, 60.0, 60.0, 40.0])
    original, tested = Trainer.classify, []

    def seen(self, split="test"):
        tested.append(self.method.saved.ctx.detach().clone())
        return original(self, split)

    monkeypatch.setattr(Trainer, "test", lambda self, split: {"accuracy": next(accuracies)})
    monkeypatch.setattr(Trainer, "classify", seen)
    a = arguments("out", recipe={"OPTIM__MAX_EPOCH": 4, "TEST__FINAL_MODEL": "best_val"}, opts=("TRAIN.CHECKPOINT_FREQ", "1"))
    quietly(a)
    best = load(a.output_dir, "model-best.pth.tar")
    assert best["val_result"] == 60.0 and best["epoch"] == 2  # the first of equals, as upstream's > has it
    assert best.keys() == load(a.output_dir, "model.pth.tar-4").keys()
    assert torch.equal(tested[0], best["state_dict"]["ctx"])
    assert not torch.equal(tested[0], load(a.output_dir, "model.pth.tar-4")["state_dict"]["ctx"])


def test_best_val_really_measures_the_validation_images(arguments, data: DataSplit) -> None:
    a = arguments("out", recipe={"TEST__FINAL_MODEL": "best_val"})
    quietly(a)
    best = load(a.output_dir, "model-best.pth.tar")
    trainer = helpers.make_trainer(data)
    trainer.method.saved.ctx.data.copy_(best["state_dict"]["ctx"])
    assert trainer.test("val")["accuracy"] == best["val_result"]


@pytest.mark.parametrize("opts", [("TEST.FINAL_MODEL", "best_val"), ("TEST.SPLIT", "val")], ids=str)
def test_a_data_set_without_validation_images_is_refused_before_training(
    arguments, opts: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(helpers, "read_without_val", lambda root: replace(helpers.read_tiny(root), val=[]), raising=False)
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_without_val"))
    a = arguments("out", opts=opts)
    with pytest.raises(InputError, match="val"):
        quietly(a)
    assert not (tmp_path / "out").exists()  # not after the last epoch


# ---- stops ---------------------------------------------------------------------------------------------------------------


def break_loss(monkeypatch: pytest.MonkeyPatch, name: str, value: float, epoch: int) -> None:
    """Let ``name`` be ``value`` from the second batch of ``epoch`` (0, 1, ...) on."""
    original = Trainer.step
    compute = Trainer.losses
    now = {"bad": False}

    def step(self, batch, index=0, **options):
        now["bad"] = self.state.epoch == epoch and index >= 1
        return original(self, batch, index, **options)

    def spoiled(self, *args):
        losses, logs = compute(self, *args)
        return {n: loss * value if n == name and now["bad"] else loss for n, loss in losses.items()}, logs

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "losses", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ce", "ppl", "inverse_ppl"])
def test_a_non_finite_loss_stops_with_its_name_and_keeps_the_last_good_checkpoint(
    arguments, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    a = arguments("out", "CoOp_PLPP", recipe={"OPTIM__MAX_EPOCH": 3})
    with monkeypatch.context() as patched:
        break_loss(patched, name, value, epoch=1)
        with pytest.raises(NonFiniteLoss, match=rf"loss '{name}' is {value} in epoch 2, batch 2.*model\.pth\.tar-1"):
            quietly(a)
    folder = Path(a.output_dir)
    assert not (folder / "result.json").exists()
    assert {p.name for p in (folder / "prompt_learner").iterdir()} == {"checkpoint", "model.pth.tar-1"}
    assert load(folder, "model.pth.tar-1")["state_dict"]["ctx"].isfinite().all()
    # The cause being gone, the same command goes on, to what it would have been.
    quietly(a)
    quietly(arguments("whole", "CoOp_PLPP", recipe={"OPTIM__MAX_EPOCH": 3}))
    assert torch.equal(
        load(folder, "model.pth.tar-3")["state_dict"]["ctx"],
        load(arguments("whole").output_dir, "model.pth.tar-3")["state_dict"]["ctx"],
    )


def test_a_non_finite_loss_in_the_first_epoch_says_that_there_is_no_checkpoint(
    arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_loss(monkeypatch, "ce", math.nan, epoch=0)
    with pytest.raises(NonFiniteLoss, match="no checkpoint was written yet"):
        quietly(arguments("out"))


def test_a_context_that_became_non_finite_is_never_saved_as_good(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    # A finite loss can have a NaN gradient (an fp16 overflow): in the last batch of an epoch no later loss shows it before
    # the checkpoint is written.
    original = CoOp.losses
    seen = {"batches": 0}

    def compute(self, batch, classes):
        losses = original(self, batch, classes)
        seen["batches"] += 1
        if seen["batches"] == 8:  # 4 batches an epoch: the last of epoch 2
            losses["ce"].register_hook(lambda grad: grad * math.nan)
        return losses

    monkeypatch.setattr(CoOp, "losses", compute)
    a = arguments("out", recipe={"OPTIM__MAX_EPOCH": 3})
    with pytest.raises(NonFiniteLoss):
        quietly(a)
    kept = checkpoint.newest(Path(a.output_dir) / "prompt_learner")
    assert checkpoint.load(kept)["state_dict"]["ctx"].isfinite().all()


# ---- precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp", "fp16"])
def test_each_precision_trains_and_tests_on_cpu(arguments, precision: str, capsys: pytest.CaptureFixture) -> None:
    a = arguments("out", "CoOp_PLPP", ("USE_CUDA", "False", "TRAINER.COOP.PREC", precision))
    result, _ = run(a)
    assert all(math.isfinite(value) for value in result["losses"].values())
    assert {"ce", "ppl", "inverse_ppl"} <= result["losses"].keys()
    ctx = load(a.output_dir)["state_dict"]["ctx"]
    assert ctx.dtype == torch.float32 and ctx.isfinite().all()
    log = capsys.readouterr().out
    assert log == (Path(a.output_dir) / "log.txt").read_text()
    assert ("fp16 needs a GPU: computing in fp32" in log) == (precision == "fp16")
    assert ("autocast to bfloat16" in log) == (precision == "amp")


def test_fp16_on_cpu_is_fp32_to_the_bit_and_the_others_are_not(arguments) -> None:
    contexts = {}
    torch.manual_seed(1)
    start = torch.empty(3, helpers.WIDTH).normal_(std=0.02)
    for precision in ("fp32", "fp16", "bf16", "amp"):
        a = arguments(precision, opts=("USE_CUDA", "False", "TRAINER.COOP.PREC", precision))
        quietly(a)
        contexts[precision] = load(a.output_dir)["state_dict"]["ctx"]
    assert torch.equal(contexts["fp16"], contexts["fp32"])
    for precision in ("bf16", "amp"):  # they compute in another precision, but the same thing
        assert not torch.equal(contexts[precision], contexts["fp32"])
        moved, reference = (contexts[p].flatten() - start.flatten() for p in (precision, "fp32"))
        assert F.cosine_similarity(moved, reference, dim=0) > 0.9


# ---- checkpoints of upstream ---------------------------------------------------------------------------------------------


class DasslScheduler(torch.optim.lr_scheduler.LRScheduler):
    """As Dassl's warm-up keeps it: the schedule that follows is an attribute, so it is in the state_dict, object and all."""

    def __init__(self, optimizer, successor):
        self.successor = successor
        super().__init__(optimizer)

    def get_lr(self):
        return [1e-5 for _ in self.base_lrs]


def upstream_checkpoint(data: DataSplit, n_ctx: int = 3, dtype: torch.dtype = torch.float16, warmup: bool = False) -> dict:
    """What Dassl's save_model writes for CoOp."""
    generator = torch.Generator().manual_seed(11)
    ctx = torch.nn.Parameter(torch.randn(n_ctx, helpers.WIDTH, generator=generator).mul(0.5).to(dtype))
    optimizer = torch.optim.SGD([ctx], lr=0.002, momentum=0.9)
    ctx.grad = torch.ones_like(ctx)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0)
    if warmup:
        schedule = DasslScheduler(optimizer, schedule)
    classes = len(data.classnames)
    return {
        "state_dict": {
            "ctx": ctx.detach(),
            "token_prefix": torch.randn(classes, 1, helpers.WIDTH).to(dtype),
            "token_suffix": torch.randn(classes, 76 - n_ctx, helpers.WIDTH).to(dtype),
        },
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "val_result": None,
    }


# 9 of 10 published recipes warm up, so `warmup` is what somebody's file looks like.
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("name", ["model.pth.tar-50", "model-best.pth.tar"])
def test_an_upstream_checkpoint_evaluates(arguments, data: DataSplit, tmp_path: Path, name: str, warmup: bool) -> None:
    content = upstream_checkpoint(data, warmup=warmup)
    inside = tmp_path / "theirs" / "prompt_learner"
    inside.mkdir(parents=True)
    torch.save(content, inside / name)
    epoch = 50 if name.endswith("-50") else None
    a = arguments("out", eval_only=True, model_dir=str(tmp_path / "theirs"), load_epoch=epoch)
    result = quietly(a)
    trainer = helpers.make_trainer(data)
    untrained = trainer.method.encode_classes().features
    trainer.method.saved.ctx.data.copy_(content["state_dict"]["ctx"].float())
    trained = trainer.method.encode_classes().features
    assert (trained - untrained).abs().max() > 0.1  # another classifier than the one that was built
    assert result["metrics"] == trainer.test()
    assert not (Path(a.output_dir) / "prompt_learner").exists()
    assert helpers.files_below(tmp_path / "theirs") == ["prompt_learner", f"prompt_learner/{name}"]


def test_upstream_weights_are_taken_and_its_token_vectors_are_not(data: DataSplit, tmp_path: Path) -> None:
    content = upstream_checkpoint(data)
    content["state_dict"] = {f"module.{k}": v for k, v in content["state_dict"].items()}  # of a DataParallel run
    torch.save(content, tmp_path / "model.pth.tar-50")
    trainer = helpers.make_trainer(data)
    trainer.saving.load_weights(tmp_path / "model.pth.tar-50")
    assert torch.equal(trainer.method.saved.ctx, content["state_dict"]["module.ctx"].float())
    assert trainer.method.saved.ctx.dtype == torch.float32


def test_an_upstream_checkpoint_cannot_be_resumed_and_says_so(arguments, data: DataSplit, tmp_path: Path) -> None:
    inside = tmp_path / "theirs" / "prompt_learner"
    inside.mkdir(parents=True)
    torch.save(upstream_checkpoint(data), inside / "model.pth.tar-50")
    (inside / "checkpoint").write_text("model.pth.tar-50\n")
    with pytest.raises(InputError, match="--eval-only"):
        quietly(arguments("out", resume=str(tmp_path / "theirs")))


def test_init_weights_start_the_training(arguments, data: DataSplit, tmp_path: Path) -> None:
    content = upstream_checkpoint(data)
    torch.save(content, tmp_path / "start.pth")
    a = arguments("out", opts=("MODEL.INIT_WEIGHTS", str(tmp_path / "start.pth"), "OPTIM.MAX_EPOCH", "1"))
    quietly(a)
    ctx = load(a.output_dir, "model.pth.tar-1")["state_dict"]["ctx"]
    start = content["state_dict"]["ctx"].float()
    assert not torch.equal(ctx, start)  # one epoch at 1e-5
    torch.testing.assert_close(ctx, start, rtol=0, atol=1e-3)
