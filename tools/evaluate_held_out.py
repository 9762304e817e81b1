"""What the embedded backbone's recipe was chosen by: the exported file on the held-out vendor. OpenMoji chooses nothing.

    python tools/evaluate_held_out.py --out held-out.jsonl      # after tools/train_embedded.py, with its folders
    python tools/evaluate_held_out.py --out test.jsonl --openmoji --first-seed 101 --seeds 20    # once, at the end

Zero-shot accuracy over all classes and on both halves, CoOp as the study runs it (tools/study_plpp.py), and a linear probe
on CoOp's pictures: what the image features alone can give. The vendor has few pictures of some classes: a class gives 8
pictures to testing, up to 24 to draw the shots from, the rest to testing; variants of one emoji stay together.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from embedded_data import HELD_OUT, SIDE, Corpus, plain_code
from embedded_text import REGROUP
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import encode_texts
from plpp_reg.clip.text import TextTower
from plpp_reg.data import DataSplit, Datum, sample_few_shot, subsample_classes, template
from plpp_reg.data.emoji import read_emoji, table
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.experiments.parallel_seeds import HALVES, Images, ParallelSeeds, read_images
from plpp_reg.results.record import summary
from plpp_reg.trainers.coop import CoOp

TEST, TRAIN = 8, 24  # images a class


def read_held_out(args: argparse.Namespace) -> DataSplit:
    """The held-out vendor's pictures of the class table's emoji, on white, as files below ``args.work``."""
    corpus = Corpus(args.cache, REGROUP, args.work / "pictures.npz")
    pictures = {corpus.emoji[owner].code: picture for picture, owner in zip(*corpus.held, strict=True)}
    folder = args.work / HELD_OUT
    folder.mkdir(exist_ok=True)
    by_class: dict[str, dict[str, list[Datum]]] = {}
    classnames = sorted({classname for _, classname, _ in table()})
    for code, classname, group in table():
        if plain_code(code) in pictures:
            path = folder / f"{code}.png"
            picture = Image.fromarray(pictures[plain_code(code)].permute(1, 2, 0).numpy(), "RGBA")
            Image.alpha_composite(Image.new("RGBA", (SIDE, SIDE), "white"), picture).convert("RGB").save(path)
            datum = Datum(str(path), classnames.index(classname), classname, path.name)
            by_class.setdefault(classname, {}).setdefault(group, []).append(datum)
    rng, train, test = random.Random(1), [], []
    for classname in classnames:
        mine: dict[str, list[Datum]] = {"train": [], "test": []}
        for group in rng.sample(sorted(by_class[classname]), len(by_class[classname])):
            part = "train" if len(mine["test"]) >= TEST and len(mine["train"]) < TRAIN else "test"
            mine[part] += by_class[classname][group]
        train, test = train + mine["train"], test + mine["test"]
    return DataSplit(train, [], test, classnames)


def probe(features: Images, data: DataSplit) -> float:
    """Accuracy of a linear classifier of the training pictures' views, in percent."""
    rows = torch.tensor([features.rows[d.name] for d in data.train])
    images = features.views[:, rows].flatten(0, 1)
    labels = torch.tensor([d.label for d in data.train]).repeat(len(features.views))
    weight = torch.zeros(images.shape[1], len(data.classnames), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(20 * images @ weight, labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy(features, data, weight.detach().T)


def accuracy(features: Images, data: DataSplit, texts: Tensor) -> float:
    """Percent of the test pictures whose nearest class text is their own."""
    place = {d.name: i for i, d in enumerate(features.part)}
    images = features.measured[torch.tensor([place[d.name] for d in data.test])]
    guess = (images @ texts.T).argmax(1)
    return 100 * (guess == torch.tensor([d.label for d in data.test])).double().mean().item()


@torch.no_grad()
def zero_shot(clip_model: nn.Module, features: Images, data: DataSplit) -> float:
    """Percent right with the hand-written prompt."""
    texts = [template("emoji").format(name) for name in data.classnames]
    return accuracy(features, data, F.normalize(encode_texts(TextTower(clip_model), texts), dim=-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a CoOp run")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="train_embedded.py's, with its pictures")
    parser.add_argument("--cache", type=Path, default=Path("build/npm"), help="folder of the npm archives")
    parser.add_argument("--openmoji", action="store_true", help="OpenMoji, which the model is for: its test split")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40, help="the embedded recipe's, or CoOp's own 200")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4, 16])
    args = parser.parse_args()
    clip_model, data = load_clip(), read_emoji() if args.openmoji else read_held_out(args)
    cfg, _ = resolve(RunArguments(trainer="CoOp", opts=("DATASET.NUM_SHOTS", "-1")))  # every training picture
    features = read_images(cfg, clip_model, [cfg.SEED], "test", data)
    halves = {half: subsample_classes(data, half) for half in ("all", "base", "new")}
    print("zero-shot:", {half: round(zero_shot(clip_model, features, part), 1) for half, part in halves.items()}, flush=True)
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    samples = [subsample_classes(sample_few_shot(data, 16, seed), "base") for seed in seeds]
    print("linear probe, base:", summary([probe(features, sample) for sample in samples]), flush=True)
    for n_ctx in args.contexts:
        opts = ("OPTIM.MAX_EPOCH", str(args.epochs), "TRAINER.COOP.N_CTX", str(n_ctx))
        runs = ParallelSeeds(CoOp, resolve(RunArguments(trainer="CoOp", opts=opts))[0], clip_model, features, seeds)
        runs.train()
        found, images = runs.measure(), {half: len(runs.measured_on(half)[0]) for half in HALVES}
        shares = {half: [100 * hits / images[half] for hits in getattr(found, half)] for half in HALVES}
        with args.out.open("a", encoding="utf-8") as file:
            for seed, base, new in zip(seeds, *shares.values(), strict=True):
                file.write(json.dumps({"seed": seed, "n_ctx": n_ctx, "base": base, "new": new}) + "\n")
        print(
            f"CoOp, {n_ctx} vectors, {args.epochs} epochs:",
            {half: f"{summary(values)}" for half, values in shares.items()},
            flush=True,
        )


if __name__ == "__main__":
    main()
