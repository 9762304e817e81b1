"""``plpp tune``: PLPP's weight and k on one's own data and backbone, against stopping the training early.

Both give up base accuracy for accuracy on new classes, and stopping early costs less than nothing. So the control of every
setting is the same method without PLPP, trained for a part of its epochs: some seeds choose, others confirm, all paired.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn
from yacs.config import CfgNode

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.vocabulary import candidate_ids
from plpp_reg.data import short_name
from plpp_reg.engine import config
from plpp_reg.engine.method import Method
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import NonFiniteLoss
from plpp_reg.errors import InputError
from plpp_reg.experiments.parallel_seeds import HALVES, PRECISION, Images, ParallelSeeds, check_method, read_images
from plpp_reg.io.files import locked, write_text
from plpp_reg.loss import SUFFIX
from plpp_reg.results.frontier import Point, difference, gap_at_equal_base
from plpp_reg.results.numbers import duration
from plpp_reg.results.record import Paired, summary

WEIGHTS = (0.1, 0.3, 1.0)
TOP_K = (50, 1000)
STOPS = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the recipe's epochs
CHOOSING, CONFIRMING = 6, 12  # seeds
VIEWS = 12  # of an image, where the recipe wants a new one each epoch: their features are computed before the training
FEWEST_CLASSES = 4  # two in each half
# Of the data and of the machine, not of a recipe
NOT_OF_A_RECIPE = ("DATASET.", "SEED", "OUTPUT_DIR", "RESUME", "VERSION", "TRAINER.NAME", "USE_CUDA", "FEATURES.")
FILE, POINTS = "recipe.yaml", "tune.json"


class Setting(NamedTuple):
    """What is changed of the recipe."""

    name: str
    strength: float
    changed: tuple[tuple[str, Any], ...]  # keys and values


class Outcome(NamedTuple):
    """What was found, and the setting that the recipe has."""

    taken: Setting
    choice: Setting  # of PLPP's settings the best of those seeds that chose
    control: Setting  # the number of epochs that was best for them
    difference: Paired  # in H, choice - control, on the seeds that confirm
    gap: Paired | None  # in new accuracy at equal base accuracy, on the same

    @property
    def helps(self) -> bool:
        """Whether the choice's H is above the control's by more than half the 95% interval."""
        return self.difference.mean > self.difference.half_width


class Bench:
    """Trains settings over seeds, and keeps each point."""

    def __init__(self, cfg: CfgNode, method: type[Method], clip_model: nn.Module, images: Images, say: Any) -> None:
        self.cfg, self.method, self.clip_model, self.images, self.say = cfg, method, clip_model, images, say
        self.points: list[dict[str, Any]] = []

    def measure(self, setting: Setting, seeds: Sequence[int]) -> Point | None:
        """Accuracies by seed; None where the training did not stay finite."""
        cfg = self.cfg.clone()
        for key, value in setting.changed:
            config.set_value(cfg, key, value)
        runs = ParallelSeeds(self.method, cfg, self.clip_model, self.images, seeds)
        try:
            runs.train()
        except NonFiniteLoss as e:
            self.say(f"{setting.name}: left out, {e}")
            return None
        found = runs.measure()
        shares = {half: [100 * hits / len(runs.measured_on(half)[0]) for hits in getattr(found, half)] for half in HALVES}
        point = Point(setting.strength, shares["base"], shares["new"])
        self.points.append({"setting": setting.name, "changed": dict(setting.changed), "seeds": list(seeds), **shares})
        base, new, h = (summary(v).mean for v in (point.base, point.new, point.h))
        perplexity = summary(found.perplexity).mean
        self.say(f"{setting.name:34s} base {base:5.1f}   new {new:5.1f}   H {h:5.1f}   perplexity {perplexity:9,.0f}")
        return point


def tune(
    args: RunArguments,
    weights: Sequence[float] = WEIGHTS,
    top_k: Sequence[int] | None = None,
    seeds: tuple[int, int] = (CHOOSING, CONFIRMING),
    clip_model: nn.Module | None = None,
    say: Any = lambda line: print(line, flush=True),
) -> Outcome:
    """Choose, confirm, print, and write ``recipe.yaml`` and every point into the output folder.

    Args:
        args: the method, its recipe, the data and the backbone, as :func:`plpp_reg.engine.run.run` takes them.
        weights: of the inverted perplexity loss; the perplexity loss is off.
        top_k: numbers of words; None: those of :data:`TOP_K` that the vocabulary has.
        seeds: how many choose, and how many others confirm; the first is ``args.seed``.
        clip_model: a CLIP that is loaded already; it must be the one that ``args`` name.
        say: where lines go.

    Raises:
        InputError: a method that is not taken, too few classes, no images to choose on, or a setting out of its range.
    """
    start = time.perf_counter(), time.process_time()
    cfg, method = resolve(args)
    check_method(method)
    for flag, values in (("--weights", weights), ("--top-k", TOP_K if top_k is None else top_k)):
        if not values or len(set(values)) != len(values):
            raise InputError(f"{flag}: expected different values, got {' '.join(map(str, values)) or 'none'}")
    if min(seeds) < 2:
        raise InputError(f"--seeds: expected two numbers >= 2, of seeds that choose and of others, got {seeds[0]} {seeds[1]}")
    if cfg.DATASET.SUBSAMPLE_CLASSES != "all":
        raise InputError("DATASET.SUBSAMPLE_CLASSES: expected all, of which tune makes base and new itself")
    name = cfg.TRAINER.NAME.removesuffix(SUFFIX)
    folder = Path(cfg.OUTPUT_DIR or Path("output", short_name(cfg.DATASET.NAME), "tune", name.replace(":", ".")))
    with locked(folder):
        recipe, cfg = cfg, _trained(cfg, method)
        device = torch.device("cuda" if cfg.USE_CUDA and torch.cuda.is_available() else "cpu")
        clip_model = clip_model or load_clip(cfg.MODEL.BACKBONE.NAME, PRECISION, device)
        words = candidate_ids(clip_model)
        most = len(clip_model.token_embedding.weight) if words is None else len(words)
        top_k = [k for k in TOP_K if k <= most] if top_k is None else top_k
        if max(top_k) > most:
            raise InputError(f"--top-k: expected at most the vocabulary's {most} words, got {max(top_k)}")
        first = cfg.SEED
        choosing = range(first, first + seeds[0])
        confirming = range(first + seeds[0], first + sum(seeds))
        images = read_images(cfg, clip_model, [*choosing, *confirming], "val")
        if len(images.data.classnames) < FEWEST_CLASSES:
            raise InputError(
                f"data set {cfg.DATASET.NAME!r}: expected at least {FEWEST_CLASSES} classes, of which half are never trained, "
                f"got {len(images.data.classnames)}"
            )
        shots = "all images" if cfg.DATASET.NUM_SHOTS < 1 else f"{cfg.DATASET.NUM_SHOTS} shots"
        about = f"{name} on {cfg.DATASET.NAME}, {shots}, backbone {cfg.MODEL.BACKBONE.NAME}, {PRECISION} on {device}"
        say(f"{about}: trained on the base half of the classes, measured on the validation part of both")
        say(f"Features of the images: {duration(time.perf_counter() - start[0])}")
        bench = Bench(cfg, method, clip_model, images, say)
        outcome = _search(bench, weights, top_k, choosing, confirming)
        lines = _verdict(outcome, name, choosing, confirming)
        comment = [f"plpp tune: {about}", *lines]
        write_text(folder / FILE, "".join(f"# {line}\n" for line in comment) + _yaml(recipe, method, outcome.taken))
        write_text(folder / POINTS, json.dumps({"about": about, "verdict": lines, "points": bench.points}) + "\n")
    for line in ("", *lines):
        say(line)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    say(f"\nRecipe: {folder / FILE} (plpp train --trainer {name} --config-file {folder / FILE} …)")
    say(f"Elapsed: {duration(wall)} ({duration(cpu)} of CPU)")
    return outcome


def _trained(cfg: CfgNode, method: type[Method]) -> CfgNode:
    """The recipe as it is trained here: without PLPP, in one precision, with a bounded number of views."""
    cfg = cfg.clone()
    cfg.TRAINER.PLPP.ENABLED = False
    config.set_value(cfg, method.Config.key("prec"), PRECISION)
    if cfg.INPUT.VIEWS < 1:
        cfg.INPUT.VIEWS = min(VIEWS, cfg.OPTIM.MAX_EPOCH)
    return cfg


def _search(
    bench: Bench, weights: Sequence[float], top_k: Sequence[int], choosing: Sequence[int], confirming: Sequence[int]
) -> Outcome:
    """The best of each kind by the mean H of the seeds that choose; then both, and the whole control, on the others."""
    epochs = bench.cfg.OPTIM.MAX_EPOCH
    stops = sorted({max(1, round(share * epochs)) for share in STOPS})
    named = {e: f"stopped after {e} of {epochs} epochs" if e < epochs else f"all {epochs} epochs" for e in stops}
    controls = [Setting(name, e, (("OPTIM.MAX_EPOCH", e),)) for e, name in named.items()]
    treated = [_with_plpp(weight, k) for k in top_k for weight in weights]
    bench.say(f"\nSeeds {choosing[0]} to {choosing[-1]} choose:")
    found = {setting: point for setting in (*controls, *treated) if (point := bench.measure(setting, choosing)) is not None}
    control, choice = (_best(kind, found) for kind in (controls, treated))
    bench.say(f"\nSeeds {confirming[0]} to {confirming[-1]} confirm:")
    again = {setting: point for setting in (*controls, choice) if (point := bench.measure(setting, confirming)) is not None}
    for setting in (control, choice):
        if setting not in again:
            raise NonFiniteLoss(f"{setting.name}: finite on the seeds that chose, and not on those that confirm")
    gap = gap_at_equal_base(again[choice], [again[c] for c in controls if c in again])
    outcome = Outcome(control, choice, control, difference(again[choice], again[control]), gap)
    return outcome._replace(taken=choice) if outcome.helps else outcome


def _best(settings: Sequence[Setting], found: dict[Setting, Point]) -> Setting:
    kept = [setting for setting in settings if setting in found]
    if not kept:
        raise NonFiniteLoss(f"none of {', '.join(s.name for s in settings)} stayed finite: is the learning rate too high?")
    return max(kept, key=lambda setting: summary(found[setting].h).mean)


def _with_plpp(weight: float, k: int) -> Setting:
    node = {"ENABLED": True, "WEIGHT": 0.0, "INVERSE_WEIGHT": float(weight), "TOP_K": k}
    return Setting(f"PLPP, k {k}, inverse weight {weight:g}", weight, tuple((f"TRAINER.PLPP.{n}", v) for n, v in node.items()))


def _verdict(outcome: Outcome, name: str, choosing: Sequence[int], confirming: Sequence[int]) -> list[str]:
    control, choice = outcome.control, outcome.choice
    gap = "its base accuracy is not on the control's curve" if outcome.gap is None else f"{outcome.gap} points of new accuracy"
    found = [
        f"{choice.name}, against {control.name}, both chosen on seeds {choosing[0]} to {choosing[-1]}:",
        f"H {outcome.difference} on seeds {confirming[0]} to {confirming[-1]} (paired, ± half the 95% interval)",
        f"at equal base accuracy, against stopping at any epoch: {gap}",
    ]
    if outcome.helps:
        return [*found, f"PLPP helps here: the recipe has {name}{SUFFIX} with this setting"]
    return [*found, f"nothing beats stopping early here: the recipe has {name} without PLPP, {control.name}"]


def _yaml(recipe: CfgNode, method: type[Method], taken: Setting) -> str:
    """What a recipe says beyond the defaults, with the setting that is taken."""
    recipe = recipe.clone()
    recipe.TRAINER.PLPP.ENABLED = False
    for key, value in taken.changed:
        config.set_value(recipe, key, value)
    defaults, node = config.flat(config.get_cfg_default(method)), {}
    for key, value in config.flat(recipe).items():
        if key.startswith(NOT_OF_A_RECIPE) or (value == defaults.get(key) and key not in dict(taken.changed)):
            continue
        *parents, leaf = key.split(".")
        place = node
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return yaml.safe_dump(node, sort_keys=False)
