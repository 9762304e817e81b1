"""Optimizers and learning-rate schedules with Dassl's names; a schedule is a function of the epoch, so it resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR
from yacs.config import CfgNode

from plpp_reg.errors import InputError, unknown

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "single_step", "multi_step")
WARMUPS = ("constant", "linear")


def build_optimizer(parameters: Sequence[nn.Parameter], cfg: CfgNode) -> optim.Optimizer:
    """``cfg`` is the node OPTIM."""
    betas = (cfg.ADAM_BETA1, cfg.ADAM_BETA2)
    if cfg.NAME not in OPTIMIZERS:
        raise unknown("OPTIM.NAME", cfg.NAME, OPTIMIZERS)
    if not 0 < cfg.LR < math.inf:
        raise InputError(f"OPTIM.LR: expected a number > 0, got {cfg.LR}")
    for key in ("MOMENTUM", "WEIGHT_DECAY"):
        if not cfg[key] >= 0:
            raise InputError(f"OPTIM.{key}: expected a number >= 0, got {cfg[key]}")
    for key in ("ADAM_BETA1", "ADAM_BETA2"):
        if not 0 <= cfg[key] < 1:
            raise InputError(f"OPTIM.{key}: expected a number >= 0 and < 1, got {cfg[key]}")
    if cfg.SGD_NESTEROV and (cfg.MOMENTUM <= 0 or cfg.SGD_DAMPNING != 0):
        raise InputError("OPTIM.SGD_NESTEROV: expected MOMENTUM > 0 and SGD_DAMPNING 0 with it")
    if cfg.NAME == "adam":
        return optim.Adam(parameters, lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY, betas=betas)
    if cfg.NAME == "adamw":
        return optim.AdamW(parameters, lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY, betas=betas)
    return optim.SGD(
        parameters,
        lr=cfg.LR,
        momentum=cfg.MOMENTUM,
        weight_decay=cfg.WEIGHT_DECAY,
        dampening=cfg.SGD_DAMPNING,
        nesterov=cfg.SGD_NESTEROV,
    )


def build_lr_schedule(optimizer: optim.Optimizer, cfg: CfgNode) -> LambdaLR:
    """Step it once an epoch; the learning rate of epoch e is ``OPTIM.LR * factor(e)``."""
    return LambdaLR(optimizer, learning_rate_factor(cfg))


def learning_rate_factor(cfg: CfgNode) -> Callable[[int], float]:
    """The factor on OPTIM.LR in epoch 0, 1, 2, ...: Dassl's series.

    After W warm-up epochs Dassl starts the schedule at its beginning (WARMUP_RECOUNT) or, else, as though W of its epochs
    were over but from the full learning rate: cosine's recursion from there is the closed form divided by its value at W.
    """
    after = _schedule(cfg)
    warmup = max(0, cfg.WARMUP_EPOCH)
    if warmup and cfg.WARMUP_TYPE not in WARMUPS:
        raise unknown("OPTIM.WARMUP_TYPE", cfg.WARMUP_TYPE, WARMUPS)
    for key in ("WARMUP_CONS_LR", "WARMUP_MIN_LR", "GAMMA"):
        if not cfg[key] >= 0:
            raise InputError(f"OPTIM.{key}: expected a number >= 0, got {cfg[key]}")

    def factor(epoch: int) -> float:
        if epoch < warmup:
            if cfg.WARMUP_TYPE == "constant":
                return cfg.WARMUP_CONS_LR / cfg.LR
            return cfg.WARMUP_MIN_LR / cfg.LR if epoch == 0 else epoch / warmup
        if cfg.WARMUP_RECOUNT or not warmup:
            return after(epoch - warmup)
        return after(0) * after(epoch) / after(warmup) if after(warmup) else 0.0

    return factor


def _schedule(cfg: CfgNode) -> Callable[[int], float]:
    if cfg.MAX_EPOCH < 1:
        raise InputError(f"OPTIM.MAX_EPOCH: expected an integer >= 1, got {cfg.MAX_EPOCH}")
    if cfg.LR_SCHEDULER != "cosine" and not (cfg.STEPSIZE and all(isinstance(step, int) for step in cfg.STEPSIZE)):
        raise InputError(f"OPTIM.STEPSIZE: expected a list of integers, got {cfg.STEPSIZE!r}")
    if cfg.LR_SCHEDULER == "cosine":
        return lambda t: (1 + math.cos(math.pi * t / cfg.MAX_EPOCH)) / 2
    if cfg.LR_SCHEDULER == "single_step":
        size = cfg.STEPSIZE[-1] if cfg.STEPSIZE[-1] > 0 else cfg.MAX_EPOCH
        return lambda t: cfg.GAMMA ** (t // size)
    if cfg.LR_SCHEDULER == "multi_step":
        return lambda t: cfg.GAMMA ** sum(step <= t for step in cfg.STEPSIZE)
    raise unknown("OPTIM.LR_SCHEDULER", cfg.LR_SCHEDULER, SCHEDULES)
