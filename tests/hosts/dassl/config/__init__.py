from .defaults import _C


def get_cfg_default():
    return _C.clone()


def clean_cfg(cfg, trainer):
    """Keeps NAME and the trainer's own node."""
    for key in list(cfg.TRAINER):
        if key not in ("NAME", trainer.upper()):
            del cfg.TRAINER[key]
