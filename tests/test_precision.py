"""Each method, with PLPP and without, in each precision on each kind of backbone; what is computed in, what is read ahead."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from plpp_reg.data import DATASETS
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.registry import find_trainer
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.trainers import TRAINERS
from plpp_reg.trainers.zeroshot import ZeroshotCLIP, ZeroshotCLIP2

from helpers import engine as helpers
from helpers import methods as mh
from helpers.methods import METHODS, NAMES, WITH_TEXT, build

ZEROSHOT = {"ZeroshotCLIP": ZeroshotCLIP, "ZeroshotCLIP2": ZeroshotCLIP2}
ALL_LOSSES = {
    "CoOp": {"ce"},
    "CoCoOp": {"ce"},
    "KgCoOp": {"ce", "kg"},
    "ProGrad": {"ce", "kl"},
    "MaPLe": {"ce"},
    "IVLP": {"ce"},
    "VPT": {"ce"},
    "PromptSRC": {"ce", "scl_text", "scl_image", "scl_logits"},
}
WITHOUT_TEACHER = [name for name in TRAINERS if not find_trainer(name)[0].distils]
NEEDS_VIT = {"MaPLe", "IVLP", "VPT", "PromptSRC"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", mh.ENTRY)


class Lines(RunLog):
    """Keeps what it is told."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)


def two_steps(method: str, plpp: bool, precision: str, resnet: bool) -> tuple[Trainer, dict[str, float], Tensor]:
    """An epoch of two steps: the trainer, its history's only row, and logits of a test batch."""
    weights = "fp32" if precision == "fp16" else precision  # on a CPU load_clip is asked for what the trainer falls back on
    log = Lines(quiet=True)
    options = ("OPTIM.MAX_EPOCH", 1, "OPTIM.WARMUP_EPOCH", -1)
    trainer = build(method, *options, plpp=plpp, clip_model=mh.clip_of(weights, resnet), log=log, PREC=precision)
    batches = helpers.fixed_batches(3, size=2)
    mh.Batches(trainer, batches[:2])
    trainer.train()
    with torch.no_grad(), trainer.computing():
        return trainer, trainer.state.history[-1], helpers.logits_of(trainer, batches[2])


@functools.cache
def in_float32(method: str, plpp: bool, resnet: bool) -> tuple[dict[str, float], Tensor]:
    return two_steps(method, plpp, "fp32", resnet)[1:]


def zero_shot_logits(cls: type[ZeroshotCLIP], precision: str, resnet: bool) -> Tensor:
    cfg = helpers.make_cfg("USE_CUDA", False, "TRAINER.ZEROSHOT.PREC", precision)
    trainer = Trainer(cls, cfg, data=mh.no_images(NAMES), clip_model=mh.clip_of(precision, resnet), log=RunLog(quiet=True))
    assert trainer.precision == precision
    with torch.no_grad(), trainer.computing():
        return helpers.logits_of(trainer, helpers.fixed_batches(1)[0])


@pytest.mark.parametrize("resnet", [False, True], ids=["ViT", "ResNet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
@pytest.mark.parametrize("plpp", [False, True], ids=["plain", "PLPP"])
@pytest.mark.parametrize("method", WITHOUT_TEACHER)
def test_two_steps_of_each_method_in_each_precision_on_each_backbone(
    method: str, plpp: bool, precision: str, resnet: bool
) -> None:
    name = method + ("_PLPP" if plpp else "")
    if plpp and method not in WITH_TEXT:
        with pytest.raises(InputError, match=f"{method} learns no text context, so PLPP has nothing to act on"):
            find_trainer(name)
        return
    assert find_trainer(name)[0].__name__ == method
    if method in ZEROSHOT:
        logits, exact = (zero_shot_logits(ZEROSHOT[method], p, resnet) for p in (precision, "fp32"))
        assert logits.isfinite().all() and (logits - exact).abs().max() < 0.3
        assert torch.equal(logits, exact) == (precision == "fp32")
        return
    if resnet and method in NEEDS_VIT:
        with pytest.raises(InputError, match="visual prompts: expected a backbone with a vision transformer"):
            two_steps(method, plpp, precision, resnet)
        return
    trainer, row, logits = two_steps(method, plpp, precision, resnet)
    named = ALL_LOSSES[method] | ({"ppl", "inverse_ppl"} if plpp else set())
    assert set(row) == {"loss", "acc", "lr", *named, *(("perplexity",) if plpp else ())}
    assert set(trainer.state.loss_names) == {"loss", *named} and trainer.precision == precision
    assert all(math.isfinite(value) for value in row.values())
    assert row["loss"] == pytest.approx(sum(row[key] for key in named), rel=1e-5)
    assert all(p.dtype == torch.float32 and p.grad.any() for p in trainer.parameters)
    last = trainer.log.lines[-2]  # before "Finish training": the batch's figure and the mean so far, of every loss
    assert all(f" {key} " in last and f"({row[key]:.4f})" in last.split(f" {key} ")[1] for key in {"loss", *named})
    # The same thing in another precision: CLIP's scale of 14 makes a bfloat16 cosine's last digit 0.1.
    exact_row, exact_logits = in_float32(method, plpp, resnet)
    assert logits.dtype == torch.float32 and (logits - exact_logits).abs().max() < 0.3
    for key in named:
        assert row[key] == pytest.approx(exact_row[key], rel=0.05, abs=0.02), key
    assert (row["loss"] == exact_row["loss"]) == (precision == "fp32")


@pytest.mark.parametrize("method", METHODS)
def test_fp16_on_a_cpu_is_fp32_to_the_bit_and_says_so(method: str, capsys: pytest.CaptureFixture) -> None:
    plpp = method in WITH_TEXT
    _, row, logits = two_steps(method, plpp, "fp16", resnet=False)
    exact_row, exact_logits = in_float32(method, plpp, False)
    assert row == exact_row and logits.equal(exact_logits)
    for precision, line in (("fp16", "PREC fp16 needs a GPU: computing in fp32 on this CPU"), ("amp", "without loss scaling")):
        capsys.readouterr()
        trainer = build(method, PREC=precision, log=RunLog())
        assert line in capsys.readouterr().out
        assert trainer.precision == {"fp16": "fp32", "amp": "amp"}[precision] and not trainer.scaler.is_enabled()


# ---- what is read ahead, what is computed in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "ahead"), [("CoOp", ["train", "test"]), ("PromptSRC", ["train"]), ("IVLP", [])], ids=lambda value: str(value)
)
def test_the_frozen_tower_sees_the_images_whose_features_are_read(method: str, ahead: list[str]) -> None:
    trainer = build(method)
    (batch,) = helpers.fixed_batches(1, size=2)
    asked: list[str] = []

    class Loader(list):
        batch_sampler = SimpleNamespace()

    for split in ("train", "test"):
        trainer._loaders[split] = Loader([{**batch, "index": torch.arange(2)}])
    kept = SimpleNamespace(of=lambda split, epoch: asked.append(split) or torch.zeros(2, mh.EMBED))
    trainer.frozen_features = {"features": kept}
    given = {split: ["features" in b for b in trainer.batches(split)] for split in ("train", "test")}
    assert asked == ahead and given == {split: [split in ahead] for split in ("train", "test")}


def test_a_given_model_computes_in_what_is_asked_for() -> None:
    with pytest.raises(
        InputError, match=r"^TRAINER.COOP.PREC bf16: expected a CLIP with weights in torch.bfloat16, got torch.flo"
    ):
        build("CoOp", PREC="bf16")
    with pytest.raises(InputError, match=r"unknown TRAINER.COOP.PREC 'fp64': did you mean 'fp16'\?"):
        build("CoOp", PREC="fp64")
    assert build("CoOp", PREC="bf16", clip_model=mh.clip_of("bf16")).method.clip.text.dtype == torch.bfloat16
