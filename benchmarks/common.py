"""What the benchmarks share: random CLIPs of ViT-B/16's sizes, the literal text tower, and time."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plpp_reg.clip import architectures
from plpp_reg.clip.architectures import OPENAI, Architecture
from plpp_reg.clip.prompts import PromptLearner

CLOCK = time.perf_counter


VIT_B_16 = OPENAI["ViT-B/16"]
SMALL = VIT_B_16._replace(embed_dim=128, resolution=32, vision_layers=3, vision_width=64, patch=8, width=128, heads=2, layers=3)


def random_clip(sizes: Architecture) -> nn.Module:
    """A frozen float32 CLIP with random weights, always the same: what is computed does not depend on them."""
    torch.manual_seed(0)
    return architectures.random_clip(sizes)


class LiteralText:
    """All 77 positions of all classes through the stock transformer, as upstream computes it."""

    def __init__(self, clip_model: nn.Module, prompts: PromptLearner) -> None:
        self.clip_model, self.dtype = clip_model, clip_model.text_projection.dtype
        device = clip_model.text_projection.device
        tokens = torch.zeros(len(prompts.prompts), clip_model.positional_embedding.shape[0], dtype=torch.long)
        for c, symbols in enumerate(prompts.prompts):
            tokens[c, : len(symbols)] = torch.tensor([max(s, 0) for s in symbols])
        self.embedded = clip_model.token_embedding(tokens.to(device))
        self.rows = torch.arange(len(tokens), device=device).unsqueeze(1)
        self.at, self.eot = prompts.context_positions().to(device), prompts.eot_positions().to(device)

    def __call__(self, context: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """context (M, D) or (C, M, D), deep (M, D) a layer -> (C, embed_dim), not normalised."""
        model, n = self.clip_model, len(self.rows)
        context, *deep = (rows if rows.dim() == 3 else rows.expand(n, -1, -1) for rows in (context, *deep))
        x = self.embedded.index_put((self.rows, self.at), context) + model.positional_embedding
        x = x.to(self.dtype).permute(1, 0, 2)
        for layer, block in enumerate(model.transformer.resblocks):
            if 0 < layer <= len(deep):
                x = x.permute(1, 0, 2).index_put((self.rows, self.at), deep[layer - 1].to(x.dtype)).permute(1, 0, 2)
            x = block(x)
        x = model.ln_final(x.permute(1, 0, 2)).to(self.dtype)
        return x[self.rows[:, 0], self.eot] @ model.text_projection


def seconds(function: Callable[[], object]) -> float:
    start = CLOCK()
    function()
    return CLOCK() - start


def count_cpu_time() -> None:
    """From here on seconds are this process's CPU seconds: what a ratio can be told by where others use the machine too."""
    global CLOCK
    CLOCK = time.process_time


def arguments(doc: str, cases: Iterable[str], **flags: str) -> argparse.Namespace:
    """The command line that the benchmarks share, and a benchmark's own flags with their help; threads and clock are set."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, few repeats")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the rows go")
    parser.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for a machine that others use too")
    parser.add_argument("--repeats", type=int, default=0, help="how often each step is timed")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        count_cpu_time()
    return args


def machine() -> dict[str, object]:
    clock = "CPU time" if CLOCK is time.process_time else "wall time"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "seconds": clock,
    }


def write_rows(path: str | Path, rows: list[dict[str, Any]], **more: object) -> None:
    """JSON: the machine (and ``more`` of it), and what was measured."""
    Path(path).write_text(json.dumps({"machine": {**machine(), **more}, "rows": rows}, indent=2) + "\n")
