"""The runs of the study: many seeds of one setting and case at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from plpp_reg.clip.load import load_clip
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.experiments.parallel_seeds import HALVES, Images, ParallelSeeds, read_images

from study.rows import Rows
from study.settings import RECIPE, SCHEDULES, Case, Setting

AT_ONCE = 20  # seeds


class Bench:
    """Runs what is not in the rows yet.

    ``clip_model``: another text tower beside the embedded model's image tower. ``scale``: how many times as long its vectors
    are where it is the same function; starting vectors are made that much longer, and SGD's rate and decay such that CoOp goes
    the same way.
    """

    def __init__(self, rows: Rows, clip_model: nn.Module | None = None, scale: float = 1.0) -> None:
        self.rows, self.clip_model, self.scale = rows, clip_model or load_clip(), scale
        self._images: dict[str, Images] = {}
        self.contexts: list[Tensor] = []  # (G, M, D) of the last run, after each quarter

    def images(self, split: str) -> Images:
        if split not in self._images:
            cfg, _ = resolve(RunArguments(trainer="CoOp", opts=("DATASET.NUM_SHOTS", "-1")))  # every training image
            self._images[split] = read_images(cfg, self.clip_model, [cfg.SEED], split)
        return self._images[split]

    def measure(self, settings: Iterable[Setting], cases: Sequence[Case], split: str, seeds: Sequence[int]) -> None:
        for setting in settings:
            for case in cases:
                done = self.rows.seeds(setting.name, case, split)
                missing = [seed for seed in seeds if seed not in done]
                for first in range(0, len(missing), AT_ONCE):
                    self.rows.add(self.run(setting, case, split, missing[first : first + AT_ONCE]))

    def started(self, setting: Setting, case: Case, images: Images, seeds: Sequence[int]) -> ParallelSeeds:
        """The seeds before their first step."""
        opts = {"TRAINER.COOP.N_CTX": case.n_ctx, "DATASET.NUM_SHOTS": case.shots, **setting.opts}
        words = tuple(str(word) for pair in opts.items() for word in pair)
        cfg, method = resolve(RunArguments(trainer=setting.trainer, config_file=RECIPE, opts=words))
        optim, square = cfg.OPTIM, self.scale**2
        optim.LR, optim.WARMUP_CONS_LR = optim.LR * square, optim.WARMUP_CONS_LR * square
        optim.WEIGHT_DECAY /= square
        factor, epochs = SCHEDULES[setting.schedule], optim.MAX_EPOCH
        runs = ParallelSeeds(method, cfg, self.clip_model, images, seeds, lambda epoch: factor((epoch + 0.5) / epochs))
        runs.context.data.mul_(self.scale)
        return runs

    def run(self, setting: Setting, case: Case, split: str, seeds: Sequence[int]) -> dict[str, Any]:
        start, wall, images = time.process_time(), time.perf_counter(), self.images(split)
        runs = self.started(setting, case, images, seeds)
        epochs = runs.cfg.OPTIM.MAX_EPOCH
        quarters, ends = [], [round(epochs * share / 4) for share in (1, 2, 3, 4)]
        self.contexts = []

        def measure(epoch: int) -> None:
            if epoch in ends:
                self.contexts.append(runs.context.detach().clone())
                found = runs.measure()
                quarters.append({"base": found.base, "new": found.new, "perplexity": [round(p, 1) for p in found.perplexity]})

        runs.train(measure)
        print(
            f"{split}, {case}, {setting.name}, {len(seeds)} seeds: {time.process_time() - start:.1f} CPU s, "
            f"{time.perf_counter() - wall:.0f} s",
            flush=True,
        )
        return {
            "name": setting.name,
            "family": setting.family,
            "strength": setting.strength,
            "trainer": setting.trainer.rpartition(":")[2],
            "opts": setting.opts,
            "schedule": setting.schedule,
            **case._asdict(),
            "split": split,
            "seeds": list(seeds),
            "images": {half: len(runs.measured_on(half)[0]) for half in HALVES},
            "quarters": quarters,
        }
