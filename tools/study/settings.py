"""What is compared: cases, PLPP's settings, controls, seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.nn import functional as F

from plpp_reg.engine.arguments import shipped_config
from plpp_reg.engine.method import setting as method_setting
from plpp_reg.trainers.coop import CoOp

COARSE, FINE, FRESH = range(1, 7), range(1, 21), range(201, 241)
RECIPE = str(shipped_config("trainers", "CoOp", "embedded.yaml"))
SCHEDULES: dict[str, Callable[[float], float]] = {  # the factor of PLPP's weights after a share of the training; its mean is 1
    "constant": lambda share: 1.0,
    "rising": lambda share: 2 * share,
    "falling": lambda share: 2 * (1 - share),
}


class SmoothedCoOp(CoOp):
    """CoOp with label smoothing, a control."""

    @dataclass(frozen=True)
    class Config(CoOp.Config):
        smoothing: float = method_setting(0.0, least=0, most=1, key="TRAINER.COOP.LABEL_SMOOTHING")

    def losses(self, batch, classes):
        logits = self.logits(batch, classes).float()
        return {"ce": F.cross_entropy(logits, batch["label"], label_smoothing=self.config.smoothing)}


@dataclass(frozen=True)
class Setting:
    """One point: a family's knob at one strength."""

    family: str
    strength: float
    opts: dict[str, object] = field(default_factory=dict)
    trainer: str = "CoOp"
    schedule: str = "constant"

    @property
    def name(self) -> str:
        return f"{self.family} {self.strength:g}"


class Case(NamedTuple):
    n_ctx: int
    shots: int

    def __str__(self) -> str:
        return f"{self.n_ctx} vectors, {self.shots} shot{'s' * (self.shots > 1)}"


A, B, C = Case(16, 16), Case(16, 4), Case(4, 16)
OTHERS = (Case(16, 1), Case(16, 2), Case(16, 8))


def plpp(family: str, inverse: float, k: int, direct: float = 0.0, schedule: str = "constant", **more: object) -> Setting:
    values = {"weight": direct, "inverse_weight": inverse, "top_k": k, **more}
    opts = {"TRAINER.PLPP.ENABLED": True, **{f"TRAINER.PLPP.{name.upper()}": value for name, value in values.items()}}
    return Setting(family, inverse, opts, schedule=schedule)


PLAIN = Setting("epochs", 40)
EPOCHS = [Setting("epochs", e, {"OPTIM.MAX_EPOCH": e}) for e in (5, 10, 20, 30)] + [PLAIN]
PLPP = [
    *(plpp(f"inverse, k {k}:", w, k) for k, w in ((50, 0.3), (50, 0.5), (50, 1), (200, 0.5), (200, 1), (1000, 0.3))),
    plpp("direct 0.1, inverse, k 10:", 0.1, 10, direct=0.1),
    plpp("direct 0.1, inverse, k 50:", 0.5, 50, direct=0.1),
    plpp("inverse, k 50, own states:", 0.5, 50, states="own"),
    plpp("inverse, k 200, own states:", 1, 200, states="own"),
    plpp("inverse, k 50, over the vocabulary:", 3, 50, normalize_over="vocabulary"),
    plpp("inverse, k 50, temperature 0.05:", 0.5, 50, temperature=0.05),
    plpp("inverse, k 50, temperature 0.2:", 0.5, 50, temperature=0.2),
    plpp("inverse, k 50, rising:", 0.5, 50, schedule="rising"),
    plpp("inverse, k 50, falling:", 0.5, 50, schedule="falling"),
]
CONTROLS = [
    *(Setting("learning rate", lr, {"OPTIM.LR": lr}) for lr in (0.0005, 0.001)),
    *(Setting("weight decay", wd, {"OPTIM.WEIGHT_DECAY": wd}) for wd in (0.1, 0.4)),
    *(Setting("label smoothing", s, {"TRAINER.COOP.LABEL_SMOOTHING": s}, f"{__name__}:SmoothedCoOp") for s in (0.2, 0.5)),
    *(Setting("KgCoOp", w, {"TRAINER.COOP.W": w}, "KgCoOp") for w in (1.0, 8.0)),
    Setting("ProGrad", 1, {"LOSS.LAMBDA": 1.0}, "ProGrad"),
]
# Each control's curve ends in plain CoOp, its knob turned off; ProGrad's is a point.
FAMILIES = {"learning rate": 0.002, "weight decay": 5e-4, "label smoothing": 0.0, "KgCoOp": 0.0, "ProGrad": 0.0}
