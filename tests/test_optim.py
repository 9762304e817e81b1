"""Learning-rate series against Dassl's own recursion over torch's schedulers, and figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR

from plpp_reg.engine.optim import build_lr_schedule, build_optimizer, learning_rate_factor
from plpp_reg.errors import InputError

from helpers import engine as helpers

LR = 0.002


def node(**changes):
    """OPTIM as CoOp's recipes have it, with changes."""
    cfg = helpers.make_cfg().OPTIM
    cfg.LR = LR
    for key, value in changes.items():
        assert key in cfg
        cfg[key] = value
    return cfg


def our_series(cfg, epochs: int) -> list[float]:
    optimizer = build_optimizer([nn.Parameter(torch.zeros(2))], cfg)
    return series_of(optimizer, build_lr_schedule(optimizer, cfg), epochs)


def series_of(optimizer, schedule, epochs: int) -> list[float]:
    series = []
    for _ in range(epochs):
        series.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return series


class DasslWarmup:
    """Dassl's ``_BaseWarmupScheduler`` with its Constant and Linear subclasses: same states, same order of calls.

    Written out instead of subclassing torch's base class, whose ``verbose`` argument it needs is gone.
    """

    def __init__(self, optimizer, successor, warmup_epoch: int, kind: str, value: float) -> None:
        self.optimizer, self.successor, self.warmup_epoch, self.kind, self.value = (
            optimizer,
            successor,
            warmup_epoch,
            kind,
            value,
        )
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch = -1
        self._step_self()

    def _get_lr(self) -> list[float]:
        if self.last_epoch >= self.warmup_epoch:
            return self.successor.get_last_lr()
        if self.kind == "constant" or self.last_epoch == 0:
            return [self.value for _ in self.base_lrs]
        return [lr * self.last_epoch / self.warmup_epoch for lr in self.base_lrs]

    def _step_self(self) -> None:
        self.last_epoch += 1
        for group, lr in zip(self.optimizer.param_groups, self._get_lr(), strict=True):
            group["lr"] = lr

    def step(self) -> None:
        if self.last_epoch >= self.warmup_epoch:
            self.successor.step()
        else:
            self._step_self()


def dassl_series(cfg, epochs: int) -> list[float]:
    """``build_lr_scheduler`` of Dassl over torch's own schedulers."""
    optimizer = optim.SGD([nn.Parameter(torch.zeros(2))], lr=cfg.LR)
    if cfg.LR_SCHEDULER == "single_step":
        stepsize = cfg.STEPSIZE[-1]
        if stepsize <= 0:
            stepsize = cfg.MAX_EPOCH
        schedule = StepLR(optimizer, step_size=stepsize, gamma=cfg.GAMMA)
    elif cfg.LR_SCHEDULER == "multi_step":
        schedule = MultiStepLR(optimizer, milestones=list(cfg.STEPSIZE), gamma=cfg.GAMMA)
    else:
        schedule = CosineAnnealingLR(optimizer, float(cfg.MAX_EPOCH))
    if cfg.WARMUP_EPOCH > 0:
        if not cfg.WARMUP_RECOUNT:
            schedule.last_epoch = cfg.WARMUP_EPOCH
        value = cfg.WARMUP_CONS_LR if cfg.WARMUP_TYPE == "constant" else cfg.WARMUP_MIN_LR
        schedule = DasslWarmup(optimizer, schedule, cfg.WARMUP_EPOCH, cfg.WARMUP_TYPE, value)
    return series_of(optimizer, schedule, epochs)


SCHEDULES = [
    {"LR_SCHEDULER": "cosine"},
    {"LR_SCHEDULER": "single_step", "STEPSIZE": (-1,)},
    {"LR_SCHEDULER": "single_step", "STEPSIZE": (3,), "GAMMA": 0.5},
    {"LR_SCHEDULER": "single_step", "STEPSIZE": (9, 4), "GAMMA": 0.3},  # Dassl takes the last
    {"LR_SCHEDULER": "multi_step", "STEPSIZE": (2, 5, 5, 9), "GAMMA": 0.5},
    {"LR_SCHEDULER": "multi_step", "STEPSIZE": (0, 4), "GAMMA": 0.5},
]


@pytest.mark.parametrize("recount", [True, False])
@pytest.mark.parametrize("warmup", [-1, 0, 1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["constant", "linear"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
def test_series_is_dassls(schedule: dict, kind: str, warmup: int, recount: bool) -> None:
    cfg = node(MAX_EPOCH=12, WARMUP_TYPE=kind, WARMUP_EPOCH=warmup, WARMUP_RECOUNT=recount, **schedule)
    assert our_series(cfg, 12) == pytest.approx(dassl_series(cfg, 12), rel=1e-9, abs=1e-15)


def test_coops_series_by_hand() -> None:
    # One constant epoch at 1e-5, then the cosine from its beginning: the last of 5 epochs is cosine's third step, not its end.
    cosine = [LR * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(4)]
    assert our_series(node(MAX_EPOCH=5, WARMUP_EPOCH=1), 5) == pytest.approx([1e-5, *cosine])
    assert cosine[0] == LR


def test_linear_warmup_by_hand() -> None:
    cfg = node(MAX_EPOCH=8, WARMUP_EPOCH=4, WARMUP_TYPE="linear", WARMUP_MIN_LR=3e-6, LR_SCHEDULER="single_step")
    assert our_series(cfg, 6) == pytest.approx([3e-6, LR / 4, LR / 2, 3 * LR / 4, LR, LR])


def test_steps_by_hand() -> None:
    single = node(MAX_EPOCH=7, WARMUP_EPOCH=-1, LR_SCHEDULER="single_step", STEPSIZE=(3,), GAMMA=0.1)
    assert our_series(single, 7) == pytest.approx([LR] * 3 + [LR / 10] * 3 + [LR / 100])
    multi = node(MAX_EPOCH=7, WARMUP_EPOCH=1, LR_SCHEDULER="multi_step", STEPSIZE=(1, 4), GAMMA=0.5)
    assert our_series(multi, 7) == pytest.approx([1e-5, LR] + [LR / 2] * 3 + [LR / 4] * 2)


def test_without_recount_cosine_starts_late_but_from_the_full_rate() -> None:
    cfg = node(MAX_EPOCH=10, WARMUP_EPOCH=3, WARMUP_RECOUNT=False)
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    torchs = CosineAnnealingLR(optimizer, 10.0)
    torchs.last_epoch = 3
    expected = [1e-5] * 3 + [LR]
    for _ in range(6):
        optimizer.step()
        torchs.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert our_series(cfg, 10) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("stop", [1, 4, 11])
def test_state_resumes_exactly(schedule: dict, stop: int) -> None:
    cfg = node(MAX_EPOCH=12, WARMUP_EPOCH=2, **schedule)

    def make():
        parameter = nn.Parameter(torch.ones(3))
        optimizer = build_optimizer([parameter], cfg)
        return parameter, optimizer, build_lr_schedule(optimizer, cfg)

    def advance(parameter, optimizer, schedule, epochs: range) -> list[float]:
        rates = []
        for epoch in epochs:
            optimizer.zero_grad()
            (parameter.pow(2).sum() * (epoch + 1)).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates

    whole = make()
    rates = advance(*whole, range(12))
    first = make()
    before = advance(*first, range(stop))
    second = make()
    second[0].data.copy_(first[0].data)
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    assert before + advance(*second, range(stop, 12)) == rates
    assert torch.equal(second[0], whole[0])


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("sgd", optim.SGD, {"momentum": 0.7, "dampening": 0.0, "nesterov": True, "weight_decay": 0.03}),
        ("adam", optim.Adam, {"betas": (0.8, 0.95), "weight_decay": 0.03}),
        ("adamw", optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.03}),
    ],
)
def test_every_optimizer_key_arrives(name: str, kind: type, expected: dict) -> None:
    cfg = node(NAME=name, MOMENTUM=0.7, SGD_NESTEROV=True, ADAM_BETA1=0.8, ADAM_BETA2=0.95, WEIGHT_DECAY=0.03)
    optimizer = build_optimizer([nn.Parameter(torch.zeros(2))], cfg)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in expected} == expected and group["lr"] == LR
    damped = build_optimizer([nn.Parameter(torch.zeros(2))], node(SGD_DAMPNING=0.2))
    assert damped.param_groups[0]["dampening"] == 0.2


# Everything torch itself refuses has to come out as an InputError that names the key, not as torch's ValueError.
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"NAME": "sdg"}, "'sgd'"),
        ({"LR": 0.0}, "LR"),
        ({"LR": -1.0}, "LR"),
        ({"LR": math.nan}, "LR"),
        ({"LR": math.inf}, "LR"),
        ({"MOMENTUM": -1.0}, "MOMENTUM|momentum"),
        ({"WEIGHT_DECAY": -1.0}, "WEIGHT_DECAY|weight_decay"),
        ({"SGD_NESTEROV": True, "MOMENTUM": 0.0}, "NESTEROV|[Nn]esterov"),
        ({"NAME": "adam", "ADAM_BETA1": 2.0}, "BETA|beta"),
        ({"MAX_EPOCH": 0}, "MAX_EPOCH"),
        ({"LR_SCHEDULER": "cosin"}, "'cosine'"),
        ({"WARMUP_EPOCH": 1, "WARMUP_TYPE": "lineer"}, "'linear'"),
        ({"LR_SCHEDULER": "single_step", "STEPSIZE": ()}, "STEPSIZE"),
        ({"LR_SCHEDULER": "single_step", "STEPSIZE": ("a",)}, "STEPSIZE"),
        ({"LR_SCHEDULER": "multi_step", "STEPSIZE": ("a",), "WARMUP_EPOCH": 1}, "STEPSIZE"),
        ({"WARMUP_EPOCH": 1, "WARMUP_CONS_LR": -1.0}, "WARMUP_CONS_LR"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(changes: dict, word: str) -> None:
    cfg = node(**changes)
    with pytest.raises(InputError, match=word):
        build_lr_schedule(build_optimizer([nn.Parameter(torch.zeros(2))], cfg), cfg)


def test_a_constant_warmup_of_zero_stands_still() -> None:
    assert learning_rate_factor(node(WARMUP_EPOCH=1, WARMUP_CONS_LR=0.0))(0) == 0
