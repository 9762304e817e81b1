"""Train, evaluate and export the embedded backbone: a tiny CLIP in OpenAI's architecture.

    python tools/train_embedded.py                      # fetch, rasterise, train both stages, evaluate, export
    python tools/train_embedded.py --evaluate-openmoji  # once, on the exported file
    python tools/train_embedded.py --keep-image-tower  # the second stage alone, against the exported file's

Two CPU threads, no GPU. The first stage trains both towers together; the second keeps the image tower and trains
the text tower anew against it. A run that is killed goes on from its last checkpoint exactly as it would have
gone on. Where others use the same cores, set OMP_WAIT_POLICY=passive: threads that wait for each other in a busy
loop are several times slower there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from embedded_data import Corpus
from embedded_export import evaluate_openmoji, export, exported_image_tower
from embedded_joint import Joint
from embedded_locked import Locked
from embedded_model import TEXT_WIDTH
from embedded_stage import ROOT
from embedded_text import REGROUP
from torch import nn


def first_stage(args: argparse.Namespace, corpus: Corpus) -> nn.Module:
    """The image tower of the first stage, which is trained as far as it is not yet."""
    joint = Joint(args, corpus)
    joint.resume() if args.export_only else joint.run()
    return joint.model.visual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="checkpoints, log, pictures, features")
    parser.add_argument("--cache", type=Path, default=Path("build/npm"), help="folder of the npm archives")
    parser.add_argument("--out", type=Path, default=ROOT / "plpp_reg/clip/embedded.safetensors")
    parser.add_argument("--steps", type=int, default=3200, help="of the first stage")
    parser.add_argument("--text-steps", type=int, default=1500, help="of the second")
    parser.add_argument("--text-width", type=int, default=TEXT_WIDTH, help="of the second stage's tower: a multiple of 64")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-image-tower", action="store_true", help="the embedded file's stands for the first stage's")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint, finished or not")
    parser.add_argument("--evaluate-openmoji", action="store_true", help="evaluate the exported file and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate_openmoji:
        return evaluate_openmoji()
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(args.cache, REGROUP, args.work / "pictures.npz")
    text = Locked(args, corpus, exported_image_tower() if args.keep_image_tower else first_stage(args, corpus))
    text.resume() if args.export_only else text.run()
    export(text, args.out)


if __name__ == "__main__":
    main()
