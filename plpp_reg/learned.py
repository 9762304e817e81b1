"""What a recorded run learned, read from its checkpoints: figures of each epoch, and its context vectors as words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from plpp_reg.clip import load
from plpp_reg.datasets import DataSplit
from plpp_reg.engine import checkpoint, config
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.registry import find_trainer
from plpp_reg.errors import InputError
from plpp_reg.words import NearWord, candidate_ids, nearest_words


class Prompts(NamedTuple):
    """The words nearest to each context vector and the prompts' perplexity, before and after the training.

    ``of_class``: where every class has a context of its own, the class whose vectors these are.
    """

    before: list[list[NearWord]]
    after: list[list[NearWord]]
    perplexity: tuple[float, float]
    of_class: str = ""


def history(place: str | Path) -> list[dict[str, float]]:
    """The means of each epoch, by name, that a run's newest checkpoint holds; empty where there is no checkpoint of ours.

    Raises:
        InputError: the checkpoint is cut short or something else.
    """
    for folder in sorted(path for path in Path(place).iterdir() if path.is_dir()):
        path = checkpoint.newest(folder)
        if path is not None:
            extra = checkpoint.load(path).get("plpp_reg")
            found = extra.get("history") if isinstance(extra, dict) else []
            if not isinstance(found, list) or not all(isinstance(epoch, dict) for epoch in found):
                raise InputError(f"checkpoint {str(path)!r}: expected a list of each epoch's figures as its history")
            return [{str(k): float(v) for k, v in epoch.items() if _is_number(v)} for epoch in found]
    return []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def without_download(backbone: str) -> str:
    """What to hand to :func:`plpp_reg.clip.load.load_clip`, so that nothing is fetched.

    Raises:
        InputError: the weights are not on this machine.
    """
    if backbone == load.EMBEDDED or Path(backbone).is_file():
        return backbone
    if backbone.startswith(load.OPEN_CLIP) and Path(backbone.partition("/")[2]).is_file():
        return backbone
    url = load.openai_clip().clip._MODELS.get(backbone)
    if url and (kept := load.cache_folder() / url.rsplit("/", 1)[1]).is_file():
        return str(kept)
    raise InputError(f"backbone {backbone!r}: its weights are not on this machine, and a report downloads nothing")


class PromptReader:
    """Reads the prompts of many runs; the backbone is loaded once."""

    def __init__(self, k: int = 3) -> None:
        self.k = k
        self._name, self._model = "", None

    def _clip(self, backbone: str) -> nn.Module:
        if backbone != self._name:
            self._model = load.load_clip(without_download(backbone))
            self._name = backbone
        return self._model

    def read(self, place: str | Path) -> Prompts:
        """The prompts of the run in a folder: those of its configuration and seed before training, those it tests after.

        Raises:
            InputError: nothing to read: no text context, a trainer or weights that are not here, a broken checkpoint.
        """
        streams = checkpoint.random_streams()
        try:  # building a model draws at random, and the context is drawn as the run drew it: from its seed
            return self._read(Path(place))
        finally:
            checkpoint.restore_random_streams(streams)

    def _read(self, place: Path) -> Prompts:
        recorded = place / "config.yaml"
        name = str(config.from_yaml(recorded).get("TRAINER.NAME"))
        if ":" in name:  # importing what a folder names would run it
            raise InputError(f"{name} is a trainer of one's own, which a report does not import")
        cls, _, _ = find_trainer(name)
        if not cls.learns_text_context:
            raise InputError(f"{name} learns no text context")
        cfg = config.get_cfg_default(cls)
        config.merge_file(cfg, recorded)
        cfg.USE_CUDA = False
        clip_model = self._clip(cfg.MODEL.BACKBONE.NAME)
        path = checkpoint.find(place, cls.model_name, None)
        extra = checkpoint.load(path).get("plpp_reg")
        classnames = extra.get("classnames") if isinstance(extra, dict) else None
        if not isinstance(classnames, list) or not classnames or not all(isinstance(c, str) for c in classnames):
            raise InputError(f"checkpoint {str(path)!r}: expected the names of its classes in it")
        node = cfg.TRAINER[cls.config_node]
        if not node.get("CSC", False) and node.get("CLASS_TOKEN_POSITION", "end") == "end":
            classnames = classnames[:1]  # a shared context in front of the name is the same before every one
        trainer = cls(cfg, DataSplit([], [], [], classnames), clip_model, RunLog(quiet=True))
        before, at_first = self._words(trainer.context(), clip_model), trainer.measure_prompts().perplexity.item()
        trainer.saving.load_weights(path)
        after, at_last = self._words(trainer.context(), clip_model), trainer.measure_prompts().perplexity.item()
        return Prompts(before, after, (at_first, at_last), classnames[0] if trainer.context().dim() == 3 else "")

    def _words(self, context: Tensor, clip_model: nn.Module) -> list[list[NearWord]]:
        shown = context[0] if context.dim() == 3 else context
        return nearest_words(shown, clip_model.token_embedding.weight, self.k, candidate_ids(clip_model))
