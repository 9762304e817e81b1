"""What runs learned whose record does not say so (those of version 0.1): figures of each epoch, context vectors as words.

They are read out of checkpoints. What a run's folder says is neither run nor does it fetch anything: a report is of folders
that may be anybody's.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from plpp_reg.clip import load
from plpp_reg.clip.reading import Vocabulary
from plpp_reg.engine import checkpoint, config
from plpp_reg.errors import InputError
from plpp_reg.io.folders import openai_clip_folder
from plpp_reg.io.safe_reading import is_torchscript
from plpp_reg.prompts import contexts
from plpp_reg.results.learned import NEAREST, Prompts


def without_download(backbone: str) -> str:
    """What to hand to :func:`plpp_reg.clip.load.load_clip`, so that nothing is fetched, and no code of a file's is run.

    Raises:
        InputError: the weights are not on this machine, or are a TorchScript archive, whose code a report has no need of.
    """
    if backbone == load.EMBEDDED:
        return backbone
    if url := load.openai_clip().clip._MODELS.get(backbone):  # OpenAI's own archives, where openai-clip keeps them
        if (kept := openai_clip_folder() / url.rsplit("/", 1)[1]).is_file():
            return str(kept)
    else:
        file = Path(backbone.partition("/")[2] if backbone.startswith(load.OPEN_CLIP) else backbone)
        if file.is_file() and is_torchscript(file):
            raise InputError(f"backbone {backbone!r}: expected weights alone, got a TorchScript archive: a report runs no code")
        if file.is_file():
            return backbone
    raise InputError(f"backbone {backbone!r}: its weights are not on this machine, and a report downloads nothing")


class PromptReader:
    """Reads the prompts of many runs; the backbone is loaded once, and once are its words looked at."""

    def __init__(self, k: int = NEAREST) -> None:
        self.k = k
        self._name = ""
        self._model: nn.Module | None = None
        self._vocabulary: Vocabulary | None = None

    def _clip(self, backbone: str) -> nn.Module:
        if backbone != self._name:
            self._model = load.load_clip(without_download(backbone))
            self._vocabulary = Vocabulary(self._model, self.k)
            self._name = backbone
        return self._model

    def read(self, place: str | Path) -> Prompts:
        """The prompts of the run in a folder: those of its configuration and seed before training, those it tests after.

        Raises:
            InputError: nothing to read: no text context, a trainer or weights that are not here, a broken checkpoint.
        """
        place = Path(place)
        name = str(config.from_yaml(place / "config.yaml").get("TRAINER.NAME"))
        if ":" in name:  # importing what a folder names would run it
            raise InputError(f"{name} is a trainer of one's own, which a report does not import")
        cfg, cls = contexts.of_run(place)
        clip_model = self._clip(cfg.MODEL.BACKBONE.NAME)
        path = checkpoint.find(place, cls.model_name, None)
        content = checkpoint.load(path)
        run = contexts.OurRun(cfg, cls, content, path, clip_model)
        before, after = run.before(), run.at(content, path)
        words = [self._vocabulary.nearest(states.context[0]) for states in (before, after)]
        figures = self._vocabulary.perplexity(before), self._vocabulary.perplexity(after)
        return Prompts(words[0], words[1], figures, run.first_class)

    def history(self, place: str | Path) -> list[dict[str, float]]:
        """The means of each epoch, by name, that a run's newest checkpoint holds; empty where there is no checkpoint of ours.

        Raises:
            InputError: the checkpoint is cut short or something else.
        """
        for folder in sorted(path for path in Path(place).iterdir() if path.is_dir()):
            path = checkpoint.newest(folder)
            if path is not None:
                return contexts.history_of(checkpoint.load(path), path)
        return []
