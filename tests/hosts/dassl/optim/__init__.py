import torch

from .lr_scheduler import ConstantWarmupScheduler


def build_optimizer(model, cfg):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=cfg.LR, momentum=0.9)


def build_lr_scheduler(optimizer, cfg):
    after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(cfg.MAX_EPOCH))
    return ConstantWarmupScheduler(optimizer, after, cfg.WARMUP_EPOCH, cfg.WARMUP_CONS_LR)
