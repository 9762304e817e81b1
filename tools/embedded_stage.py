"""What both stages of training the embedded backbone share: steps, learning rates, log, checkpoint, evaluation."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from clip.model import CLIP
from embedded_data import Corpus, on_white, plain_code
from embedded_model import image_features, next_word_loss, text_features
from embedded_text import Text
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
BATCH, SHORT = 256, 14  # captions longer than SHORT tokens come in one batch of eight: they pad all others
LOG_EVERY, SAVE_EVERY = 100, 300
PROMPT = "a photo of a {}."


def matrices_and_others(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The transformer blocks' matrices that are trained, and all else that is."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    inner = [n for n, p in named.items() if "resblocks" in n and p.ndim == 2]
    return [named[n] for n in inner], [p for n, p in named.items() if n not in inner]


class Stage:
    """Steps of weighted, named losses. A subclass sets the class attributes and says what a step's losses are.

    Every random draw of a step comes from (seed, step) alone, so there is no generator's state to keep: a stage
    that was killed goes on from its last checkpoint exactly as it would have gone on. Before the decay, a step
    does not depend on the number of steps either.
    """

    name: str  # of the checkpoint
    weights: dict[str, float]  # of the losses
    matrix_rate: float  # of the transformer blocks' matrices
    warmup: int  # steps to the full rates; then constant, then a cosine down to 1%
    decay_from: float  # share of the steps

    def __init__(self, args: argparse.Namespace, steps: int, corpus: Corpus, text: Text, model: CLIP) -> None:
        self.args, self.steps, self.corpus, self.text, self.model = args, steps, corpus, text, model
        self.kept: dict[str, Tensor] = {}  # what a checkpoint holds beside model and optimizers
        self.step = 0
        self.spent = 0.0  # seconds of training, over all resumptions
        self.sums = {loss: 0.0 for loss in self.weights}

    def optimize(self, matrices: list[nn.Parameter], groups: list[tuple[list[nn.Parameter], float]]) -> None:
        """Make the optimizers: Muon for the blocks' matrices, AdamW for groups of all else, each with its rate.

        In a paired trial Muon needed about half of AdamW's steps.
        """
        muon = {"lr": self.matrix_rate, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        adam = [{"params": parameters, "lr": rate, "full": rate} for parameters, rate in groups]
        self.optimizers = [
            torch.optim.Muon([{"params": matrices, "full": self.matrix_rate}], **muon),
            torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def losses(self) -> dict[str, Tensor]:
        """The named losses of this step, unweighted."""
        raise NotImplementedError

    def captions(self, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A caption of each chosen emoji: (n, length) tokens, and (n pictures, n captions) which is true of which."""
        text = self.text
        draws = rng.integers(text.tokens.shape[1], size=(len(chosen), 8))
        lengths = text.lengths[chosen[:, None], draws]
        fits = (lengths <= SHORT).argmax(1) if rng.random() < 7 / 8 else np.zeros(len(chosen), dtype=np.int64)
        which = draws[np.arange(len(chosen)), fits]
        tokens = torch.from_numpy(text.tokens[chosen, which]).long()
        tokens = tokens[:, : int(text.lengths[chosen, which].max())]
        return tokens, torch.from_numpy(text.truth[text.keys[chosen, which]][:, chosen].T.copy()).float()

    def train_step(self) -> None:
        late = max(0.0, self.step / self.steps - self.decay_from) / (1 - self.decay_from)
        factor = min(1.0, (self.step + 1) / self.warmup) * (0.505 + 0.495 * math.cos(math.pi * late))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * factor
            optimizer.zero_grad(set_to_none=True)
        losses = self.losses()
        sum(self.weights[name] * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        for name, loss in losses.items():
            self.sums[name] += loss.item()
        self.step += 1

    def run(self) -> None:
        """All steps that are left."""
        self.resume()
        tick = time.monotonic()
        while self.step < self.steps:
            self.train_step()
            end = self.step == self.steps
            if self.step % LOG_EVERY == 0 or end:
                now = time.monotonic()
                self.spent, took, tick = self.spent + now - tick, now - tick, now
                row = {"stage": self.name, "step": self.step, "seconds": round(self.spent, 1)}
                row |= {name: round(total / LOG_EVERY, 4) for name, total in self.sums.items()}
                row |= {"scale": round(self.model.logit_scale.exp().item(), 2)}
                row |= {"images_per_second": round(BATCH * LOG_EVERY / took, 1)}
                if self.step % (LOG_EVERY * 10) == 0 or end:
                    row |= self.evaluate()
                    tick = time.monotonic()
                with (self.args.work / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
                self.sums = {name: 0.0 for name in self.weights}
            if self.step % SAVE_EVERY == 0 or end:
                self.save()

    def save(self) -> None:
        partial = self.args.work / f"{self.name}.part"
        state = {"model": self.model.state_dict(), "sums": self.sums, **self.kept}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        state |= {"step": self.step, "spent": self.spent, "seed": self.args.seed, "steps": self.steps}
        torch.save(state, partial)
        os.replace(partial, self.args.work / f"{self.name}.pt")

    def resume(self) -> None:
        path = self.args.work / f"{self.name}.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        fewest = min(state["steps"], self.steps)
        same = state["steps"] == self.steps or state["step"] <= self.decay_from * fewest
        if state["seed"] != self.args.seed or not same:
            raise SystemExit(f"{path} is of seed {state['seed']} and {state['steps']} steps: pass these or remove it")
        self.model.load_state_dict(state["model"])
        for name, tensor in self.kept.items():
            tensor.copy_(state[name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.spent, self.sums = state["step"], state["spent"], state["sums"]
        print(f"{self.name}: resumed at step {self.step}", flush=True)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Zero-shot accuracy on the held-out vendor, over the table's classes, and caption perplexity."""
        with (ROOT / "plpp_reg/data/emoji.csv").open(encoding="utf-8") as file:
            class_of = {plain_code(row["code"]): row["class"] for row in csv.DictReader(file)}
        names = sorted(set(class_of.values()))
        emoji, (pictures, owners) = self.corpus.emoji, self.corpus.held
        wanted = [i for i, owner in enumerate(owners) if emoji[owner].code in class_of]
        label = torch.tensor([names.index(class_of[emoji[owners[i]].code]) for i in wanted])
        images = torch.cat([image_features(self.model, on_white(part)) for part in pictures[wanted].split(256)])
        classes, _ = text_features(self.model, self.text.encode([PROMPT.format(name) for name in names]))
        right = ((images @ classes.T).argmax(1) == label).float()
        balanced = torch.stack([right[label == k].mean() for k in range(len(names))])
        fresh = Text(emoji, self.args.seed + 1, self.text.caption, captions=1)
        rows = [[fresh.ids[t] for t in row] for row in fresh.tokens[:, 0]]
        ids = [[self.text.compact[t] for t in row] for row in rows if set(row) <= set(self.text.ids)]
        nats = []
        for tokens in torch.tensor(ids).split(256):
            nats.append(next_word_loss(self.model, tokens, text_features(self.model, tokens)[1]) * len(tokens))
        return {
            "held_out_top1": round(100 * right.mean().item(), 2),
            "held_out_balanced": round(100 * balanced.mean().item(), 2),
            "perplexity": round(math.exp(sum(nats).item() / len(ids)), 2),
        }
