"""The script of a miniature checkout. It knows nothing of plpp_reg."""

import argparse

import torch

import mini_trainers
from dassl.config import clean_cfg, get_cfg_default
from dassl.engine import build_trainer

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainer", default="")
    parser.add_argument("--output-dir", default="")
    parser.add_argument("--resume", default="")
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    cfg = get_cfg_default()
    cfg.merge_from_list(args.opts)
    cfg.TRAINER.NAME, cfg.OUTPUT_DIR, cfg.RESUME = args.trainer, args.output_dir, args.resume
    if args.clean:
        clean_cfg(cfg, args.trainer)
    torch.manual_seed(0)
    print(f"trainers of {mini_trainers.__name__}; amp scaler {torch.cuda.amp.GradScaler(enabled=False).__class__.__name__}")
    build_trainer(cfg).train()
