"""How hard PLPP pulls beside the task, on the embedded model and on the same model with its vocabulary rescaled.

    python tools/plpp_share.py

Scale c times token and positional embeddings and every map that writes to the residual stream, and c^2 times every layer norm's
epsilon, and each norm gives what it gave before: the same function, with vectors c times as long. Each number is |gradient of a
PLPP loss at weight 1| / |gradient of the cross-entropy|, on the context, of two seeds together: at the start, and after ten
epochs of CoOp.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import load_clip
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.experiments.parallel_seeds import ParallelSeeds, read_images
from plpp_reg.trainers.coop import CoOp

SEEDS = (1, 2)


@torch.no_grad()
def rescaled(clip_model: nn.Module, scale: float) -> nn.Module:
    """The same text tower with a residual stream ``scale`` times as large."""
    model = copy.deepcopy(clip_model)
    writers = [layer for block in model.transformer.resblocks for layer in (block.attn.out_proj, block.mlp.c_proj)]
    for tensor in (model.token_embedding.weight, model.positional_embedding, *(p for w in writers for p in w.parameters())):
        tensor.mul_(scale)
    norms = [norm for block in model.transformer.resblocks for norm in (block.ln_1, block.ln_2)]
    for norm in (*norms, model.ln_final):
        norm.eps *= scale**2
    return model


def shares(runs: ParallelSeeds, context: Tensor) -> dict[str, float]:
    """Of the first batch, by the losses' names."""
    runs.context.data.copy_(context)
    losses = runs.losses(*next(runs.batches(0)))
    norms = {n: torch.autograd.grad(loss, runs.context, retain_graph=True)[0].norm() for n, loss in losses.items()}
    return {name: (norm / norms["ce"]).item() for name, norm in norms.items() if name != "ce"}


def main() -> None:
    def config(*opts: object):
        return resolve(RunArguments(trainer="CoOp", opts=("OPTIM.MAX_EPOCH", "10", *map(str, opts))))[0]

    clip_model = load_clip()
    images = read_images(config("DATASET.NUM_SHOTS", -1), clip_model, [1], "val")
    plain = ParallelSeeds(CoOp, config(), clip_model, images, SEEDS)
    contexts = {"start": plain.context.detach().clone()}
    plain.train()
    contexts["10 epochs"] = plain.context.detach().clone()
    print("| k | vectors | " + " | ".join(f"{loss}, {when}" for when in contexts for loss in ("L_ppl", "L_inv")) + " |")
    print("|---|---|---|---|---|---|")
    on = [
        word
        for key, value in (("ENABLED", True), ("WEIGHT", 1), ("INVERSE_WEIGHT", 1))
        for word in (f"TRAINER.PLPP.{key}", value)
    ]
    for k in (10, 50, 1000):
        for scale in (0.5, 1.0, 2.0):
            runs = ParallelSeeds(CoOp, config(*on, "TRAINER.PLPP.TOP_K", k), rescaled(clip_model, scale), images, SEEDS)
            cells = [f"{share:.2f}" for context in contexts.values() for share in shares(runs, scale * context).values()]
            print(f"| {k} | times {scale:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
