"""What PLPP costs a foreign host: one training step of a CoOp-like model, plain and with the term attached, in one run.

    python benchmarks/attach.py --json attach.json            # ViT-B/16's sizes, 100 classes, 16 context vectors, fp32
    python benchmarks/attach.py --quick --json attach.json    # a small model: shows that it runs, not what it costs

The host runs all 77 positions of every class through the stock modules, as checkouts do, and its image tower; weights are
random. A step is forward, backward and the optimizer's update. Plain and attached steps take turns on the same towers, so both
see the same machine; the cost is the median of the paired ratios. "logged" reads the figures for a log at each step as well,
which works out the perplexity over the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.clip.architectures import Architecture
from plpp_reg.clip.load import openai_clip

from common import SMALL, VIT_B_16, random_clip
from names import short_names


class Size(NamedTuple):
    model: Architecture
    classes: int
    context: int
    images: int
    repeats: int


FULL = Size(VIT_B_16, classes=100, context=16, images=4, repeats=7)
QUICK = Size(SMALL, classes=20, context=16, images=2, repeats=2)


class TextEncoder(nn.Module):
    """All positions, the stock transformer."""

    def __init__(self, clip_model: nn.Module) -> None:
        super().__init__()
        self.transformer, self.ln_final = clip_model.transformer, clip_model.ln_final
        self.positional_embedding, self.text_projection = clip_model.positional_embedding, clip_model.text_projection

    def forward(self, prompts: Tensor, tokenized: Tensor) -> Tensor:
        x = self.transformer((prompts + self.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_final(x)[torch.arange(len(x)), tokenized.argmax(-1)] @ self.text_projection


class Host(nn.Module):
    """CoOp: context in front of the names, logits from cosines."""

    def __init__(self, clip_model: nn.Module, names: list[str], context: int, position: str) -> None:
        super().__init__()
        clip = openai_clip().clip
        self.ctx = nn.Parameter(torch.randn(context, clip_model.token_embedding.weight.shape[1]) * 0.02)
        self.tokenized = clip.tokenize([" ".join(["X"] * context) + f" {name}." for name in names])
        self.lengths = [len(clip._tokenizer.encode(name)) for name in names]
        self.register_buffer("words", clip_model.token_embedding(self.tokenized).detach())
        self.visual, self.text_encoder, self.scale = clip_model.visual, TextEncoder(clip_model), clip_model.logit_scale
        self.position = position

    def prompts(self) -> Tensor:
        m = len(self.ctx)
        if self.position == "end":
            return torch.cat([self.words[:, :1], self.ctx.expand(len(self.words), -1, -1), self.words[:, 1 + m :]], 1)
        return torch.stack(
            [
                torch.cat([w[:1], w[1 + m : 1 + m + n], self.ctx, w[1 + m + n :]])
                for w, n in zip(self.words, self.lengths, strict=True)
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        texts = F.normalize(self.text_encoder(self.prompts(), self.tokenized), dim=-1)
        return self.scale.exp() * F.normalize(self.visual(images), dim=-1) @ texts.t()


def measure(position: str, size: Size) -> dict[str, Any]:
    """Seconds of a plain step, and the paired ratios of the others to it."""
    clip_model = random_clip(size.model)
    plain, attached = (Host(clip_model, short_names(size.classes), size.context, position).train() for _ in range(2))
    handle = attach(attached, PerplexityRegularizer(clip_model.token_embedding.weight))
    optimizers = {host: torch.optim.SGD([host.ctx], lr=0.002) for host in (plain, attached)}
    images, labels = torch.randn(size.images, 3, size.model.resolution, size.model.resolution), torch.arange(size.images)

    def step(host: Host, logged: bool = False) -> float:
        start = time.perf_counter()
        optimizers[host].zero_grad()
        F.cross_entropy(host(images), labels).backward()
        optimizers[host].step()
        if logged:
            handle.last.perplexity.item()
        return time.perf_counter() - start

    step(plain), step(attached, logged=True)  # where the vectors stand is found once a training, not once a step
    rounds = [(step(plain), step(attached), step(attached, logged=True)) for _ in range(size.repeats)]
    return {
        "position": position,
        "plain_seconds": statistics.median(base for base, *_ in rounds),
        "attached": statistics.median(cost / base for base, cost, _ in rounds),
        "attached_and_logged": statistics.median(cost / base for base, _, cost in rounds),
        "every_round": [round(cost / base, 4) for base, cost, _ in rounds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", default="", help="write the rows there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for position in ("end", "front"):
        row = measure(position, QUICK if args.quick else FULL)
        rows.append(row)
        print(
            f"{position:6} plain {row['plain_seconds']:.3f} s, attached {100 * row['attached'] - 100:+.1f}%, "
            f"and logged {100 * row['attached_and_logged'] - 100:+.1f}%",
            flush=True,
        )
    if args.json:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
        size = (QUICK if args.quick else FULL)._asdict()
        size["model"] = size["model"]._asdict()
        Path(args.json).write_text(json.dumps({"machine": machine, "size": size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
