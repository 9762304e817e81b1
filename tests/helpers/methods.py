"""What the tests of the methods share: a tiny CLIP with more layers than prompts, each method's settings and reference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import PRECISIONS, set_precision
from plpp_reg.clip.vocabulary import whole_word_ids
from plpp_reg.data import DatasetEntry, DataSplit, Datum
from plpp_reg.data.templates import SIXTY
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Method
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers.cocoop import CoCoOp
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.ivlp import IVLP
from plpp_reg.trainers.kgcoop import KgCoOp
from plpp_reg.trainers.maple import MaPLe
from plpp_reg.trainers.prograd import ProGrad
from plpp_reg.trainers.promptsrc import PromptSRC
from plpp_reg.trainers.vpt import VPT

from helpers import engine as helpers
from helpers import literal
from helpers import literal_methods as lm
from helpers.clips import make_clip

NAMES = helpers.CLASSNAMES
TEMPLATE = "a drawing of the {}, a toy."  # nobody's default: a method that takes another template differs
ENTRY = DatasetEntry("helpers.engine:read_tiny", TEMPLATE)
WORDS = "a photo of a"
TEXT_WIDTH, VISION_WIDTH, EMBED = 64, 128, 96  # no two alike: an exchange does not fit
TEXT_LAYERS, VISION_LAYERS = 4, 5


@functools.cache
def clip_of(precision: str = "fp32", resnet: bool = False) -> nn.Module:
    """As load_clip gives it. Its vocabulary is two dozen words, so that the reference's loops over words end."""
    model = make_clip(
        width=TEXT_WIDTH,
        layers=TEXT_LAYERS,
        embed_dim=EMBED,
        vision_layers=VISION_LAYERS,
        vision_width=VISION_WIDTH,
        resnet=resnet,
    )
    words = whole_word_ids()
    model.trained_token_ids = words[:: len(words) // 24]
    return set_precision(model, PRECISIONS[precision])


@functools.cache
def exact_clip(resnet: bool = False) -> nn.Module:
    """The same in float64, for the references."""
    return literal.double(copy.deepcopy(clip_of(resnet=resnet)))


@functools.cache
def sixty_templates() -> Tensor:
    return lm.mean_over_templates(exact_clip(), NAMES, SIXTY)


def promptsrc(model: nn.Module, names: list[str], p: lm.Parameters, batch: lm.Batch, **settings: Any) -> lm.Pass:
    mean = sixty_templates() if names is NAMES else lm.mean_over_templates(model, names, SIXTY)
    return lm.promptsrc(model, names, p, batch, mean_template_features=mean, **settings)


class Case(NamedTuple):
    """A method with settings of which no two are equal, and its reference."""

    cls: type[Method]
    options: dict[str, object]  # below TRAINER.<the method's node>, or whole keys
    reference: Callable[..., lm.Pass]
    losses: tuple[str, ...] = ("ce",)

    def node(self, key: str) -> str:
        return key if "." in key else f"TRAINER.{self.cls.Config.node}.{key}"


def deep(text: int, vision: int, depth_text: int, depth_vision: int) -> dict[str, object]:
    return {
        "N_CTX_TEXT": text,
        "N_CTX_VISION": vision,
        "PROMPT_DEPTH_TEXT": depth_text,
        "PROMPT_DEPTH_VISION": depth_vision,
        "CTX_INIT": WORDS,
    }


SRC = ("ce", "scl_text", "scl_image", "scl_logits")
CASES = {
    "CoOp": Case(CoOp, {"N_CTX": 3}, lm.coop),
    "CoOp words": Case(CoOp, {"CTX_INIT": "a close-up_of the"}, partial(lm.coop, words="a close-up of the")),
    "CoOp middle": Case(CoOp, {"N_CTX": 3, "CLASS_TOKEN_POSITION": "middle"}, partial(lm.coop, position="middle")),
    "CoOp front": Case(CoOp, {"N_CTX": 2, "CLASS_TOKEN_POSITION": "front"}, partial(lm.coop, position="front")),
    "CoOp class-specific": Case(CoOp, {"N_CTX": 3, "CSC": True}, lm.coop),
    "KgCoOp": Case(
        KgCoOp, {"CTX_INIT": WORDS, "W": 3.0}, partial(lm.kgcoop, words=WORDS, template=TEMPLATE, W=3.0), ("ce", "kg")
    ),
    "ProGrad": Case(
        ProGrad,
        {"N_CTX": 3, "LOSS.T": 2.0, "LOSS.LAMBDA": 0.7},
        partial(lm.prograd, template=TEMPLATE, T=2.0),
        ("ce", "kl"),
    ),
    "CoCoOp": Case(CoCoOp, {"CTX_INIT": WORDS}, partial(lm.cocoop, words=WORDS)),
    "CoCoOp random": Case(CoCoOp, {"N_CTX": 2}, partial(lm.cocoop, words="")),
    "MaPLe": Case(MaPLe, {"N_CTX": 2, "CTX_INIT": WORDS, "PROMPT_DEPTH": 3}, partial(lm.maple, words=WORDS, depth=3)),
    "MaPLe shallow": Case(MaPLe, {"N_CTX": 5, "CTX_INIT": WORDS, "PROMPT_DEPTH": 1}, partial(lm.maple, words="", depth=1)),
    "IVLP": Case(IVLP, deep(3, 4, 3, 2), partial(lm.ivlp, words=WORDS, depth_text=3, depth_vision=2)),
    "IVLP random": Case(IVLP, deep(5, 2, 1, 3), partial(lm.ivlp, words="", depth_text=1, depth_vision=3)),
    "IVLP every layer": Case(
        IVLP,
        deep(4, 2, TEXT_LAYERS, VISION_LAYERS),
        partial(lm.ivlp, words=WORDS, depth_text=TEXT_LAYERS, depth_vision=VISION_LAYERS),
    ),
    "IVLP language only": Case(IVLP, deep(4, 0, 3, 0), partial(lm.ivlp, words=WORDS, depth_text=3, depth_vision=0)),
    "VPT": Case(
        VPT,
        {"N_CTX_VISION": 4, "PROMPT_DEPTH_VISION": 3, "CTX_INIT": "one_nice picture of"},
        partial(lm.vpt, words="one nice picture of", depth=3),
    ),
    "PromptSRC": Case(
        PromptSRC,
        {**deep(4, 3, 3, 2), "TEXT_LOSS_WEIGHT": 7.0, "IMAGE_LOSS_WEIGHT": 3.0, "GPA_MEAN": 2.0, "GPA_STD": 0.8},
        partial(promptsrc, words=WORDS, depth_text=3, depth_vision=2, text_weight=7.0, image_weight=3.0),
        SRC,
    ),
}
METHODS = [name for name in CASES if " " not in name]  # each once
WITH_TEXT = [name for name in CASES if CASES[name].cls.learns_text_context]
PLPP = {
    "TRAINER.PLPP.ENABLED": True,
    "TRAINER.PLPP.WEIGHT": 0.3,  # unequal: a mix-up of the two shows
    "TRAINER.PLPP.INVERSE_WEIGHT": 0.7,
    "TRAINER.PLPP.TOP_K": 6,
    "TRAINER.PLPP.TEMPERATURE": 0.2,
}


def no_images(names: list[str]) -> DataSplit:
    """Classes alone, for steps on batches of the test's own; a loader can be built, not read."""
    items = [Datum(f"nowhere/{label}.png", label, name, f"{label}.png") for label, name in enumerate(names)]
    return DataSplit(items, items, items, list(names))


def build(
    name: str,
    *opts: object,
    plpp: bool = False,
    clip_model: nn.Module | None = None,
    data: DataSplit | None = None,
    log: RunLog | None = None,
    as_started: bool = False,
    **case_options: object,
) -> Trainer:
    """A quiet trainer of a case, on the CPU, from seed 1; its parameters shaken unless they are wanted ``as_started``.

    ``case_options`` override the case's, as its keys are named.
    """
    case = CASES[name]
    options: dict[str, object] = {"USE_CUDA": False, case.node("PREC"): "fp32"}
    options |= {case.node(key): value for key, value in {**case.options, **case_options}.items()}
    options |= PLPP if plpp else {}
    options |= dict(zip(opts[::2], opts[1::2], strict=True))
    cfg = helpers.make_cfg(*(x for item in options.items() for x in item))
    cfg.TRAINER.NAME = case.cls.__name__ + ("_PLPP" if cfg.TRAINER.PLPP.ENABLED else "")
    trainer = Trainer(
        case.cls, cfg, data=data or no_images(NAMES), clip_model=clip_model or clip_of(), log=log or RunLog(quiet=True)
    )
    if not as_started:
        shake(trainer)
    return trainer


def shake(trainer: Trainer) -> None:
    """Away from the start, where some of MaPLe's layers are copies of each other and PromptSRC's losses nearly 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)


def leaves(trainer: Trainer) -> lm.Parameters:
    """The trained parameters by their names in the checkpoint."""
    return dict(trainer.method.saved.named_parameters())


def exact(parameters: lm.Parameters) -> lm.Parameters:
    return {name: value.detach().double().requires_grad_() for name, value in parameters.items()}


def exact_batch(batch: lm.Batch) -> lm.Batch:
    return {"img": batch["img"].double(), "label": batch["label"]}


def plpp_terms(passed: lm.Pass) -> dict[str, Tensor]:
    """PLPP's weighted terms with PLPP's settings above, from the reference's own states."""
    model = exact_clip()
    shared = len(passed.context) == 1 and bool((passed.hidden == passed.hidden[:1]).all())
    loss = literal.plpp(
        passed.context,
        passed.hidden[:1] if shared else passed.hidden,
        model.token_embedding.weight[model.trained_token_ids],
        weight=0.3,
        inverse_weight=0.7,
        top_k=6,
        temperature=0.2,
        label="soft",
        normalize_over="topk",
        detach_label=True,
    )
    return {"ppl": 0.3 * loss.perplexity_loss, "inverse_ppl": 0.7 * loss.inverse_loss, "perplexity": loss.perplexity}


class Batches(list):
    """Batches of noise in the place of a trainer's loader, the same ones in each epoch."""

    def __init__(self, trainer: Trainer, batches: list[lm.Batch]) -> None:
        super().__init__(batches)
        trainer._loaders["train"] = self
        trainer.batches = lambda split: iter(self)


def with_gradients(
    trainer: Trainer, batch: lm.Batch, with_perplexity: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a step logs, and the gradients that it gave the optimizer; the parameters stay where they are."""
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    values = trainer.step(batch, with_perplexity=with_perplexity)
    return values, {name: p.grad.clone() for name, p in leaves(trainer).items()}


def difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, as a part of the largest absolute value."""
    assert got.shape == want.shape and got.isfinite().all()
    largest = want.abs().max()
    assert largest > 0
    return ((got.double() - want.double()).abs().max() / largest).item()


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(loss: Tensor, of: lm.Parameters) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(of.values()), retain_graph=True, allow_unused=True, materialize_grads=True))
