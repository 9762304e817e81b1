"""How PLPP's defaults were chosen: every setting over the same seeds, paired with weight 0, on the validation split.

    python tools/study_plpp.py --out study.jsonl --seeds 10                      # the validation split decides
    python tools/study_plpp.py --out confirm.jsonl --seeds 10 --first-seed 101 --split test --settings none "inverse 1"
    python tools/study_plpp.py --out study.jsonl --table                          # the table of docs/method.md

CoOp on the base half of the embedded default, 16 shots, evaluated on both halves. Image features are computed once: each
training image as CoOp's augmentation shows it in VIEWS epochs (the engine's own draws), of which each epoch takes one. Results
are appended setting by setting, so that a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vocabulary import candidate_ids
from plpp_reg.data import DataSplit, Datum, sample_few_shot, subsample_classes
from plpp_reg.data.augmentation import build_transform
from plpp_reg.data.emoji import read_emoji
from plpp_reg.data.loaders import ImageDataset
from plpp_reg.engine.optim import build_lr_schedule, build_optimizer
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.results.record import harmonic_mean, paired, summary

VIEWS = 12
BASE = {"top_k": 10, "temperature": 0.1, "label": "soft", "normalize_over": "vocabulary", "detach_label": True}


def setting(weight: float, inverse_weight: float, **changed) -> dict[str, object]:
    return {**BASE, "weight": weight, "inverse_weight": inverse_weight, **changed}


SETTINGS: dict[str, dict[str, object]] = {
    "none": setting(0, 0),
    "inverse 0.1": setting(0, 0.1),
    "inverse 0.3": setting(0, 0.3),
    "inverse 1": setting(0, 1),
    "inverse 3": setting(0, 3),
    "direct 0.1": setting(0.1, 0),
    "direct 1": setting(1, 0),
    "both 0.01": setting(0.01, 0.01),
    "both 0.1": setting(0.1, 0.1),
    "both 1": setting(1, 1),
    "direct 0.1, inverse 1": setting(0.1, 1),
    "topk: both 0.1": setting(0.1, 0.1, normalize_over="topk"),
    "topk: both 0.3": setting(0.3, 0.3, normalize_over="topk"),
    "topk: both 1": setting(1, 1, normalize_over="topk"),
    "topk: direct 0.1, inverse 1": setting(0.1, 1, normalize_over="topk"),
    "topk: direct 1": setting(1, 0, normalize_over="topk"),
    "topk: inverse 1": setting(0, 1, normalize_over="topk"),
    "topk: inverse 3": setting(0, 3, normalize_over="topk"),
    "topk: inverse 10": setting(0, 10, normalize_over="topk"),
    "topk: direct 0.1, inverse 3": setting(0.1, 3, normalize_over="topk"),
    "topk: both 3": setting(3, 3, normalize_over="topk"),
    "topk: inverse 3, k 50": setting(0, 3, normalize_over="topk", top_k=50),
    "topk: inverse 3, temperature 0.3": setting(0, 3, normalize_over="topk", temperature=0.3),
    "inverse 1, k 3": setting(0, 1, top_k=3),
    "inverse 1, k 50": setting(0, 1, top_k=50),
    "inverse 1, temperature 0.02": setting(0, 1, temperature=0.02),
    "inverse 1, temperature 0.5": setting(0, 1, temperature=0.5),
    "direct 0.1, hard label": setting(0.1, 0, label="hard"),
    "both 0.1, label not detached": setting(0.1, 0.1, detach_label=False),
}


class Features:
    """Image features of the whole data set, by file name: augmented views of training images, plain ones of the others."""

    def __init__(self, clip_model, data: DataSplit, cache: Path) -> None:
        if cache.is_file():
            saved = torch.load(cache, weights_only=True)
        else:
            saved = self._compute(clip_model, data)
            torch.save(saved, cache)
        self.train, self.plain = saved["train"], saved["plain"]
        self.row = {d.name: i for part in (data.train, data.val + data.test) for i, d in enumerate(part)}

    @staticmethod
    @torch.no_grad()
    def _compute(clip_model, data: DataSplit) -> dict[str, Tensor]:
        cfg, _ = resolve(RunArguments(trainer="CoOp"))

        def encode(items: list[Datum], train: bool, epoch: int) -> Tensor:
            pictures = ImageDataset(items, build_transform(cfg, train), cfg.SEED)
            batches = torch.arange(len(items)).split(128)
            out = [clip_model.encode_image(torch.stack([pictures[epoch, int(i)]["img"] for i in b])) for b in batches]
            return F.normalize(torch.cat(out), dim=-1)

        views = torch.stack([encode(data.train, True, view) for view in range(VIEWS)])  # (views, n, embed_dim)
        return {"train": views, "plain": encode(data.val + data.test, False, 0)}


def run(
    clip_model,
    data: DataSplit,
    features: Features,
    seeds: list[int],
    n_ctx: int,
    name: str,
    split: str,
    opts: tuple[str, ...] = (),
) -> list[dict]:
    """One training a seed: accuracies on both halves of ``split`` in percent, and the prompts' perplexity.

    ``opts`` are KEY VALUE pairs over CoOp's embedded recipe.

    All seeds go through the tower at once, as contexts of their own (G of them): losses are summed over seeds and SGD works
    element by element, so that each is trained as if it were alone.
    """
    cfg, _ = resolve(RunArguments(trainer="CoOp", opts=opts))
    picked = [subsample_classes(sample_few_shot(data, cfg.DATASET.NUM_SHOTS, seed), "base") for seed in seeds]
    rows = torch.tensor([[features.row[d.name] for d in p.train] for p in picked])  # (G, n)
    labels = torch.tensor([[d.label for d in p.train] for p in picked])
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    width = clip_model.token_embedding.weight.shape[1]
    context = torch.stack([torch.empty(n_ctx, width).normal_(std=0.02, generator=g) for g in streams]).requires_grad_()

    tower, classes = TextTower(clip_model), picked[0].classnames
    tree = PromptLearner(clip_model, classes, n_ctx=n_ctx).tree()
    settings = SETTINGS[name]
    regularizer = PerplexityRegularizer(clip_model.token_embedding.weight, candidates=candidate_ids(clip_model), **settings)
    optimizer = build_optimizer([context], cfg.OPTIM)
    schedule = build_lr_schedule(optimizer, cfg.OPTIM)
    scale, size = clip_model.logit_scale.exp(), cfg.DATALOADER.TRAIN_X.BATCH_SIZE
    for _ in range(cfg.OPTIM.MAX_EPOCH):
        order = torch.stack([torch.randperm(rows.shape[1], generator=g) for g in streams])
        views = torch.stack([torch.randint(VIEWS, (rows.shape[1],), generator=g) for g in streams])
        for b in order.split(size, 1)[: rows.shape[1] // size]:  # (G, batch)
            out = tower(tree, context, need_hidden=regularizer.active)
            text = F.normalize(out.features, dim=-1)
            image = features.train[views.gather(1, b), rows.gather(1, b)]
            logits = scale * image @ text.transpose(1, 2)
            loss = len(seeds) * F.cross_entropy(logits.flatten(0, 1), labels.gather(1, b).flatten())
            if regularizer.active:
                loss = loss + len(seeds) * regularizer(context, out.hidden)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    records = [{"seed": seed, "n_ctx": n_ctx, "setting": name, "split": split} for seed in seeds]
    with torch.no_grad():
        hidden = tower(tree, context).hidden
        for g, record in enumerate(records):
            record["perplexity"] = regularizer.components(context[g], hidden[g]).perplexity.item()
        for half in ("base", "new"):
            part = subsample_classes(data, half)
            tree = PromptLearner(clip_model, part.classnames, n_ctx=n_ctx).tree()
            text = F.normalize(tower(tree, context, need_hidden=False).features, dim=-1)
            items = getattr(part, split)
            image = features.plain[torch.tensor([features.row[d.name] for d in items])]
            hits = (image @ text.transpose(1, 2)).argmax(2) == torch.tensor([d.label for d in items])
            for record, share in zip(records, hits.double().mean(1).tolist(), strict=True):
                record[half] = 100 * share
    for record in records:
        record["H"] = harmonic_mean(record["base"], record["new"])
    return records


def table(records: list[dict[str, object]]) -> str:
    """Markdown: weight 0 as it is, every other setting as paired differences with 95% intervals."""
    lines = []
    for n_ctx in sorted({r["n_ctx"] for r in records}):
        mine = {s: {r["seed"]: r for r in records if r["n_ctx"] == n_ctx and r["setting"] == s} for s in SETTINGS}
        control = mine["none"]
        seeds = sorted(control)
        values = {m: summary([control[s][m] for s in seeds]) for m in ("base", "new", "H", "perplexity")}
        lines += [
            f"\n{n_ctx} context vectors, {len(seeds)} seeds; weight 0: base {values['base']}, new {values['new']}, "
            f"H {values['H']}, perplexity {values['perplexity'].mean:,.0f}\n",
            "| setting | base | new | H | perplexity |",
            "|---|---|---|---|---|",
        ]
        for name, runs in mine.items():
            if name == "none" or not runs:
                continue
            both = sorted(runs.keys() & control.keys())
            cells = [str(paired([runs[s][m] for s in both], [control[s][m] for s in both])) for m in ("base", "new", "H")]
            perplexity = summary([runs[s]["perplexity"] for s in both]).mean
            few = "" if len(both) == len(seeds) else f" ({len(both)} seeds)"
            lines.append(f"| {name}{few} | {' | '.join(cells)} | {perplexity:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run; runs that are there are not repeated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--features", type=Path, default=Path("features.pt"), help="cache of image features")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    args = parser.parse_args()
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(records))
        return
    clip_model, data = load_clip(), read_emoji()
    features = Features(clip_model, data, args.features)
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    done = {(r["seed"], r["n_ctx"], r["setting"]) for r in records}
    for n_ctx in args.contexts:
        for name in args.settings:
            missing = [seed for seed in seeds if (seed, n_ctx, name) not in done]
            if not missing:
                continue
            start = time.perf_counter()
            new = run(clip_model, data, features, missing, n_ctx, name, args.split)
            with args.out.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in new)
            means = {m: f"{summary([r[m] for r in new])}" for m in ("base", "new", "H")}
            print(f"{n_ctx} vectors, {name}: {means} {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
