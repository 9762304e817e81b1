"""Train, evaluate and export the embedded backbone: a tiny CLIP in OpenAI's architecture.

    python tools/train_embedded.py                      # fetch, rasterise, train, evaluate, export
    python tools/train_embedded.py --evaluate-openmoji  # once, on the exported file

Two CPU threads, no GPU. Every random draw of a step comes from (seed, step) alone, so there is no generator's
state to keep: a run that is killed goes on from its last checkpoint exactly as it would have gone on. Where
others use the same cores, set OMP_WAIT_POLICY=passive: threads that wait for each other in a busy loop are
several times slower there.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from clip.model import CLIP
from embedded_data import (
    HELD_OUT,
    PACKAGES,
    RESOLUTION,
    SIDE,
    VENDORS,
    augment,
    load_emoji,
    load_pictures,
    on_white,
    plain_code,
)
from embedded_text import REGROUP, Text, spelling_neighbours, word_statistics
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
PATCH, CONTEXT = 8, 77
VISION_WIDTH, VISION_LAYERS, TEXT_WIDTH, TEXT_LAYERS, EMBED = 192, 6, 128, 4, 128
BATCH, SHORT = 256, 14  # captions longer than SHORT tokens come in one batch of eight: they pad all others
# Warm-up, constant, then a cosine down: until the decay begins, a run may get fewer steps (see `resume`).
RATE, MATRIX_RATE, DECAY, WARMUP, DECAY_FROM = 1e-3, 1.5e-3, 0.1, 300, 0.6
DROPPED = 0.5  # share of image patches left out of a step, until the last part of training
WHOLE_FROM = 0.92
LOSSES = {"contrast": 1.0, "partition": 1.0, "proxy": 0.5, "words": 0.3}
PROMPT = "a photo of a {}."


# ---------------------------------------------------------------- towers, with clip.model's weights


def attend(block: nn.Module, x: Tensor, causal: bool, first_only: bool = False) -> Tensor:
    """One residual block. `first_only` computes the first position alone: all that is read of the last."""
    n, length, width = x.shape
    heads = block.attn.num_heads
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    q, k, v = qkv.view(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    if first_only:
        q, x = q[:, :, :1], x[:, :1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + block.attn.out_proj(y.transpose(1, 2).reshape(n, -1, width))
    return x + block.mlp(block.ln_2(x))


def image_features(model: CLIP, x: Tensor, g: torch.Generator | None = None, dropped: float = 0.0) -> Tensor:
    """Unit image features; with `dropped`, from a random part of each image's patches."""
    v = model.visual
    x = v.conv1(x).flatten(2).transpose(1, 2) + v.positional_embedding[1:]
    n, patches, width = x.shape
    if dropped:
        kept = torch.rand(n, patches, generator=g).argsort(1)[:, : round(patches * (1 - dropped))]
        x = x.gather(1, kept[..., None].expand(-1, -1, width))
    first = (v.class_embedding + v.positional_embedding[0]).expand(n, 1, width)
    x = v.ln_pre(torch.cat([first, x], 1))
    blocks = list(v.transformer.resblocks)
    for block in blocks:
        x = attend(block, x, causal=False, first_only=block is blocks[-1])
    return F.normalize(v.ln_post(x[:, 0]) @ v.proj, dim=-1)


def text_features(model: CLIP, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit text features and all last states. The end token has the largest id, here as in OpenAI's."""
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    for block in model.transformer.resblocks:
        x = attend(block, x, causal=True)
    states = model.ln_final(x)
    ends = states[torch.arange(len(tokens)), tokens.argmax(-1)]
    return F.normalize(ends @ model.text_projection, dim=-1), states


def next_word_loss(model: CLIP, tokens: Tensor, states: Tensor) -> Tensor:
    """Mean nats of each next token, by the tied head that PLPP reads: ln_final(x) @ token_embedding.T."""
    target = tokens[:, 1:]
    there = torch.arange(target.shape[1]) < tokens.argmax(-1, keepdim=True)
    return F.cross_entropy(states[:, :-1][there] @ model.token_embedding.weight.T, target[there])


# ---------------------------------------------------------------- training


class Trainer:
    """Everything a step needs: data, model, proxies, optimizer."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.emoji = load_emoji(args.cache, REGROUP)
        pictures, owners, vendors = load_pictures(args.cache, self.emoji, args.work / "pictures.npz")
        held = vendors == VENDORS.index(HELD_OUT)
        self.pictures, self.held = (
            torch.from_numpy(pictures),
            (torch.from_numpy(pictures[held]), owners[held]),
        )
        self.of_emoji = [np.flatnonzero((owners == i) & ~held) for i in range(len(self.emoji))]
        self.text = Text(self.emoji, args.seed)
        self.model = CLIP(
            EMBED, RESOLUTION, VISION_LAYERS, VISION_WIDTH, PATCH, CONTEXT, len(self.text.ids), TEXT_WIDTH,
            TEXT_WIDTH // 64, TEXT_LAYERS,
        )  # fmt: skip
        self.proxies = nn.Parameter(torch.randn(len(self.emoji), EMBED))
        # The same person as man, woman and person is drawn less often each; so are the many flags.
        variants = {}
        for e in self.emoji:
            stem = e.names[0].replace("woman", "person").replace("man", "person")
            variants.setdefault((e.subgroup, stem), []).append(e.code)
        share = {code: len(codes) ** -0.5 for codes in variants.values() for code in codes}
        weight = [share[e.code] * (0.2 if e.subgroup == "country-flag" else 1) for e in self.emoji]
        weight = np.array(weight) * np.array([len(found) > 0 for found in self.of_emoji])
        self.weight = weight / weight.sum()
        # Muon for the blocks' matrices: in a paired trial it needed about half of AdamW's steps.
        inner = {n: p for n, p in self.model.named_parameters() if "resblocks" in n and p.ndim == 2}
        outer = [p for n, p in self.model.named_parameters() if n not in inner]
        self.optimizers = [
            torch.optim.Muon(inner.values(), lr=MATRIX_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([*outer, self.proxies], lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step = 0
        self.spent = 0.0  # seconds of training, over all resumptions
        self.sums = {name: 0.0 for name in LOSSES}

    def losses(self) -> dict[str, Tensor]:
        """The named losses of this step, unweighted."""
        rng = np.random.default_rng([self.args.seed, 2, self.step])
        g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
        text, model = self.text, self.model
        chosen = rng.choice(len(self.emoji), BATCH, replace=False, p=self.weight)
        picture = np.array([self.of_emoji[i][rng.integers(len(self.of_emoji[i]))] for i in chosen])
        dropped = DROPPED if self.step < WHOLE_FROM * self.args.steps else 0.0
        images = image_features(model, augment(self.pictures[picture], g), g, dropped)

        draws = rng.integers(text.tokens.shape[1], size=(BATCH, 8))
        lengths = text.lengths[chosen[:, None], draws]
        fits = (lengths <= SHORT).argmax(1) if rng.random() < 7 / 8 else np.zeros(BATCH, dtype=np.int64)
        which = draws[np.arange(BATCH), fits]
        tokens = torch.from_numpy(text.tokens[chosen, which]).long()
        tokens = tokens[:, : int(text.lengths[chosen, which].max())]
        texts, states = text_features(model, tokens)
        scale = model.logit_scale.exp()
        logits = scale * images @ texts.T
        # (image, caption): whether the caption is true of the image
        true = torch.from_numpy(text.truth[text.keys[chosen, which]][:, chosen].T.copy()).float()
        by_image, by_text = true / true.sum(1, keepdim=True), true / true.sum(0, keepdim=True)
        contrast = -(by_image * logits.log_softmax(1)).sum() - (by_text * logits.log_softmax(0)).sum()

        names, class_of = text.partition(rng)
        prompt = ["a photo of a {}.", "a {}.", "{}", "a picture of a {}.", "an emoji of a {}."][rng.integers(5)]
        if rng.random() < 0.4:
            prompt = PROMPT
        classes, _ = text_features(model, text.encode([prompt.format(name) for name in names]))
        target = torch.from_numpy(class_of[text.subgroup_of[chosen]])
        proxy = scale * images @ F.normalize(self.proxies, dim=-1).T
        return {
            "contrast": contrast / (2 * BATCH),
            "partition": F.cross_entropy(scale * images @ classes.T, target),
            "proxy": F.cross_entropy(proxy, torch.from_numpy(chosen)),
            "words": next_word_loss(model, tokens, states),
        }

    def train_step(self) -> None:
        late = max(0.0, self.step / self.args.steps - DECAY_FROM) / (1 - DECAY_FROM)
        factor = min(1.0, (self.step + 1) / WARMUP) * (0.505 + 0.495 * math.cos(math.pi * late))
        for optimizer, rate in zip(self.optimizers, (MATRIX_RATE, RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        losses = self.losses()
        sum(LOSSES[name] * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        for name, loss in losses.items():
            self.sums[name] += loss.item()
        self.step += 1

    def run(self) -> None:
        log_every, save_every = 100, 300
        tick = time.monotonic()
        while self.step < self.args.steps:
            self.train_step()
            end = self.step == self.args.steps
            if self.step % log_every == 0 or end:
                now = time.monotonic()
                self.spent, took, tick = self.spent + now - tick, now - tick, now
                row = {"step": self.step, "seconds": round(self.spent, 1)}
                row |= {name: round(total / log_every, 4) for name, total in self.sums.items()}
                row |= {"scale": round(self.model.logit_scale.exp().item(), 2)}
                row |= {"images_per_second": round(BATCH * log_every / took, 1)}
                if self.step % (log_every * 10) == 0 or end:
                    row |= self.evaluate()
                    tick = time.monotonic()
                with (self.args.work / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
                self.sums = {name: 0.0 for name in LOSSES}
            if self.step % save_every == 0 or end:
                self.save()

    def save(self) -> None:
        partial = self.args.work / "checkpoint.part"
        state = {"model": self.model.state_dict(), "proxies": self.proxies.data, "sums": self.sums}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        state |= {"step": self.step, "spent": self.spent}
        torch.save(state | {"seed": self.args.seed, "steps": self.args.steps}, partial)
        os.replace(partial, self.args.work / "checkpoint.pt")

    def resume(self) -> None:
        path = self.args.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        # Nothing of a step before the decay depends on how many there will be.
        fewest = min(state["steps"], self.args.steps)
        same = state["steps"] == self.args.steps or state["step"] <= DECAY_FROM * fewest
        if state["seed"] != self.args.seed or not same:
            run = f"--seed {state['seed']} --steps {state['steps']}"
            raise SystemExit(f"{path} is of {run}: pass these or remove it")
        self.model.load_state_dict(state["model"])
        self.proxies.data.copy_(state["proxies"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.spent, self.sums = state["step"], state["spent"], state["sums"]
        print(f"resumed at step {self.step}", flush=True)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Zero-shot accuracy on the held-out vendor, over the table's classes, and caption perplexity."""
        with (ROOT / "plpp_reg/datasets/emoji.csv").open(encoding="utf-8") as file:
            class_of = {plain_code(row["code"]): row["class"] for row in csv.DictReader(file)}
        names = sorted(set(class_of.values()))
        pictures, owners = self.held
        wanted = [i for i, owner in enumerate(owners) if self.emoji[owner].code in class_of]
        label = torch.tensor([names.index(class_of[self.emoji[owners[i]].code]) for i in wanted])
        parts = pictures[wanted].split(256)
        images = torch.cat([image_features(self.model, on_white(part)) for part in parts])
        classes, _ = text_features(self.model, self.text.encode([PROMPT.format(name) for name in names]))
        right = ((images @ classes.T).argmax(1) == label).float()
        balanced = torch.stack([right[label == k].mean() for k in range(len(names))])
        fresh = Text(self.emoji, self.args.seed + 1, captions=1)
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


# ---------------------------------------------------------------- export


def export(trainer: Trainer, path: Path) -> None:
    """Write the safetensors file: all weights in float16, untrained word vectors as three neighbours each."""
    from safetensors.torch import save_file

    sys.path.insert(0, str(ROOT))
    from plpp_reg.clip import embedded

    state = {name: tensor.half().contiguous() for name, tensor in trainer.model.state_dict().items()}
    rows, ids = state.pop("token_embedding.weight"), torch.tensor(trainer.text.ids)
    neighbours = spelling_neighbours(trainer.text.ids)
    other = torch.ones(len(rows) + len(neighbours), dtype=torch.bool)
    other[ids] = False
    tokens = other.nonzero()[:, 0]
    table = torch.empty(len(other), rows.shape[1], dtype=torch.float16)
    table[ids] = rows
    cosine = F.cosine_similarity(rows.float(), rows.float().mean(0, keepdim=True)).mean().item()
    sample = tokens[:: len(tokens) // 2000]
    low, high = 0.0, 4.0
    for _ in range(8):  # the spread at which filled rows have as near a nearest neighbour as trained ones
        spread = round((low + high) / 2, 3)
        lean = round(cosine / (1 - cosine**2) ** 0.5 * (1 + spread**2) ** 0.5, 3)
        filled = embedded.fill_untrained(rows.numpy(), tokens.numpy(), neighbours.numpy(), spread, lean)
        table[tokens] = torch.from_numpy(filled)
        if word_statistics(table, sample)["nearest"][1] > word_statistics(table, ids)["nearest"][1]:
            low = spread
        else:
            high = spread
    state["token_embedding.trained"] = rows.contiguous()
    state["token_embedding.trained_ids"] = ids.to(torch.int32)
    state["token_embedding.neighbours"] = neighbours
    metadata = {
        "format": embedded.FORMAT, "seed": trainer.args.seed, "steps": trainer.args.steps, "batch": BATCH,
        "steps_done": trainer.step, "held_out": HELD_OUT, "resolution": RESOLUTION,
        "trained_tokens": len(ids),
        "sources": " ".join(f"{name}@{version}" for name, version in PACKAGES.items()),
        "fill_spread": spread, "fill_lean": lean,
    }  # fmt: skip
    partial = path.with_suffix(".part")
    save_file(state, partial, {name: str(value) for name, value in metadata.items()})
    partial.chmod(0o644)
    os.replace(partial, path)
    report = {
        "bytes": path.stat().st_size,
        "trained": word_statistics(table, ids),
        "filled": word_statistics(table, sample),
    }
    print(json.dumps(metadata | report), flush=True)


def evaluate_openmoji() -> None:
    """Zero-shot accuracy of the exported file on OpenMoji: run once, after every choice has been made."""
    sys.path.insert(0, str(ROOT))
    import clip
    import resvg_py
    from build_emoji_table import openmoji_folder
    from PIL import Image

    from plpp_reg.clip.embedded import embedded_state_dict

    model = clip.model.build_model(embedded_state_dict()).float()
    with (ROOT / "plpp_reg/datasets/emoji.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    names = sorted({row["class"] for row in table})
    pictures = []
    for row in table:
        svg = str(openmoji_folder() / f"{row['code']}.svg")
        data = bytes(resvg_py.svg_to_bytes(svg_path=svg, width=SIDE, height=SIDE))
        pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).transpose(2, 0, 1))
    label = torch.tensor([names.index(row["class"]) for row in table])
    with torch.no_grad():
        parts = torch.from_numpy(np.stack(pictures)).split(256)
        images = torch.cat([model.encode_image(on_white(part)) for part in parts])
        texts = model.encode_text(clip.tokenize([PROMPT.format(name) for name in names]))
    guess = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1)
    right = (guess == label).float()
    by_class = {name: round(100 * right[label == k].mean().item(), 1) for k, name in enumerate(names)}
    result = {
        "openmoji_top1": round(100 * right.mean().item(), 2),
        "images": len(table),
        "classes": len(names),
    }
    result["openmoji_balanced"] = round(sum(by_class.values()) / len(by_class), 2)
    print(json.dumps(result | {"by_class": by_class}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="checkpoint, log and pictures")
    parser.add_argument("--cache", type=Path, default=Path("build/npm"), help="folder of the npm archives")
    parser.add_argument("--out", type=Path, default=ROOT / "plpp_reg/clip/embedded.safetensors")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint, finished or not")
    parser.add_argument("--evaluate-openmoji", action="store_true", help="evaluate the exported file and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate_openmoji:
        return evaluate_openmoji()
    args.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    trainer.resume()
    if not args.export_only:
        trainer.run()
    export(trainer, args.out)


if __name__ == "__main__":
    main()
