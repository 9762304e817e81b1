"""Learned context vectors, and the states that PLPP reads for them, out of a run of ours or a checkpoint of upstream's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from plpp_reg.clip.load import EMBEDDED, load_clip
from plpp_reg.clip.prompts import POSITIONS, PromptLearner, encode, eot_token, tokenizer
from plpp_reg.clip.reading import States
from plpp_reg.clip.text import TextTower
from plpp_reg.data import DataSplit
from plpp_reg.engine import checkpoint, config
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Method
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError, unknown
from plpp_reg.loss import functional as PF

DEEP = (r"(?:prompt_learner\.)?compound_prompts_text\.(\d+)", r"text_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow")


def of_run(folder: Path, trainer: str = "") -> tuple[CfgNode, type[Method]]:
    """The configuration of a run's folder and its trainer's class, if that is one that learns context vectors.

    ``trainer``: as in :func:`plpp_reg.engine.config.of_run`.

    Raises:
        InputError: it is not, or there is no configuration that can be read.
    """
    cfg, cls = config.of_run(folder, trainer)
    if not cls.learns_text_context:
        raise InputError(f"run {str(folder)!r}: {cfg.TRAINER.NAME} learns no text context")
    return cfg, cls


class OurRun:
    """A run of ours: its trainer is built again, without its data, so its context starts as it did.

    Args:
        cfg, cls: of :func:`of_run`.
        content, path: one of its checkpoints, as :func:`plpp_reg.engine.checkpoint.load` gives it, and where that is.
        clip_model: the CLIP that it was trained on; None: the one that ``cfg`` names, in the run's precision.

    Raises:
        InputError: a checkpoint without its class names.
    """

    def __init__(
        self,
        cfg: CfgNode,
        cls: type[Method],
        content: dict[str, Any],
        path: Path,
        clip_model: nn.Module | None = None,
    ) -> None:
        cfg.USE_CUDA = False
        self.trainer, self.backbone, self.states = cfg.TRAINER.NAME, cfg.MODEL.BACKBONE.NAME, cfg.TRAINER.PLPP.STATES
        extra = content.get("plpp_reg")
        names = extra.get("classnames") if isinstance(extra, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"checkpoint {str(path)!r}: expected the names of its classes in it")
        streams = checkpoint.random_streams()
        try:  # the trainer seeds the random streams, to draw its context as the run drew it
            self._trainer = Trainer(cls, cfg, DataSplit([], [], [], names), clip_model, RunLog(quiet=True))
        finally:
            checkpoint.restore_random_streams(streams)
        self.clip_model = self._trainer.clip_model
        own = self._trainer.method.contexts()[0].context.dim() == 3
        self.first_class = names[0] if own else ""  # where each class has vectors of its own

    def before(self) -> States:
        """As it was before training."""
        return self._states()

    def at(self, content: dict[str, Any], path: Path) -> States:
        """As it is in one of the run's checkpoints."""
        self._trainer.saving.load_weights(path)
        return self._states()

    def _states(self) -> States:
        context, hidden, *_ = self._trainer.method.contexts()[0]
        return States.of(context, hidden)

    def logged(self, content: dict[str, Any], path: Path) -> dict[int, float]:
        """The perplexity that the training logged, its mean over each epoch."""
        history = history_of(content, path)
        return {epoch: figures["perplexity"] for epoch, figures in enumerate(history, 1) if "perplexity" in figures}


class Upstream:
    """A checkpoint of upstream's CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe, IVLP or PromptSRC: what its tensors say.

    Args:
        content, path: as in :class:`OurRun`.
        backbone: the CLIP that it was trained on; empty: the embedded one.
        position: where the class name stands, which the file does not say.
        init: the words that the context began with; empty: unknown.

    Raises:
        InputError: no context in it, or one of another CLIP.
    """

    trainer = "upstream"
    states = PF.STATES[0]

    def __init__(self, content: dict[str, Any], path: Path, backbone: str, position: str, init: str) -> None:
        if position not in POSITIONS:
            raise unknown("--position", position, POSITIONS)
        context, _ = context_of(content, path)
        width = context.shape[-1]
        self.clip_model = load_clip(backbone or EMBEDDED)
        table = self.clip_model.token_embedding.weight
        if table.shape[1] != width:
            named = f"got {backbone}, of width {table.shape[1]}" if backbone else "give it"
            raise InputError(f"--backbone: expected the CLIP that these prompts, of width {width}, were trained on, {named}")
        self.backbone = backbone or EMBEDDED
        self._tower, self._position = TextTower(self.clip_model), position
        self._start = encode(init.replace("_", " ").strip())
        if self._start and len(self._start) < context.shape[-2]:
            raise InputError(f"--init: expected words of {context.shape[-2]} tokens or more, got {init!r}, {len(self._start)}")
        self._start = self._start[: context.shape[-2]]  # MaPLe learns the first words alone
        prompts = context.shape[0] if context.dim() == 3 else 1
        self._names = ["x"] * prompts
        if position != "end":  # the state before a vector has seen the name
            self._names = class_names(content, path, table)

    def before(self) -> States | None:
        """As it was before training, if the words are known that it began with."""
        if not self._start:
            return None
        return self._states(self.clip_model.token_embedding.weight[self._start], [])

    def at(self, content: dict[str, Any], path: Path) -> States:
        """As it is in a checkpoint."""
        return self._states(*context_of(content, path))

    def _states(self, context: Tensor, deep: Sequence[Tensor]) -> States:
        specific = context.dim() == 3
        learner = PromptLearner(self.clip_model, self._names, context.shape[-2], "", self._position, specific)
        with torch.no_grad():
            learner.ctx.copy_(context)
            rows = [d.float().expand(len(context), -1, -1) if specific else d.float() for d in deep]
            return States.of(learner.ctx, learner(self._tower, deep=rows).hidden)

    def logged(self, content: dict[str, Any], path: Path) -> dict[int, float]:
        """Upstream logs no perplexity."""
        return {}


def history_of(content: dict[str, Any], path: Path) -> list[dict[str, float]]:
    """The means of each epoch, by name, that a checkpoint of ours holds; what is no finite number is left out.

    Raises:
        InputError: something else stands there.
    """
    extra = content.get("plpp_reg")
    found = extra.get("history") if isinstance(extra, dict) else []
    if not isinstance(found, list) or not all(isinstance(epoch, dict) for epoch in found):
        raise InputError(f"checkpoint {str(path)!r}: expected a list of each epoch's figures as its history")
    return [{str(k): float(v) for k, v in epoch.items() if _is_number(v)} for epoch in found]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def context_of(content: dict[str, Any], path: Path) -> tuple[Tensor, list[Tensor]]:
    """The context (M, D) or (C, M, D), and the rows that replace it in layers 1, 2, ... of the text tower."""
    state = {name.removeprefix("module."): t for name, t in content["state_dict"].items()}
    found = [name for name in ("ctx", "prompt_learner.ctx") if isinstance(state.get(name), Tensor)]
    if not found or state[found[0]].dim() not in (2, 3):
        raise InputError(
            f"checkpoint {str(path)!r}: expected context vectors (ctx or prompt_learner.ctx), got {sorted(state)[:4]}"
        )
    context, deep = state[found[0]].float(), {}
    for name, tensor in state.items():
        for i, pattern in enumerate(DEEP):
            if match := re.fullmatch(pattern, name):
                deep[int(match.group(1)) + (1 - i)] = tensor  # MaPLe counts from the second layer, IVLP's blocks from the first
    if sorted(deep) != list(range(1, len(deep) + 1)):
        raise InputError(f"checkpoint {str(path)!r}: expected prompts for layers 1, 2, …, got them for {sorted(deep)}")
    if not all(t.shape[-1] == context.shape[-1] and t.isfinite().all() for t in (context, *deep.values())):
        raise InputError(f"checkpoint {str(path)!r}: expected finite prompts of width {context.shape[-1]}")
    return context, [deep[layer] for layer in sorted(deep)]


def class_names(content: dict[str, Any], path: Path, table: Tensor) -> list[str]:
    """The class names that a checkpoint of upstream's was trained on: it saves their tokens' vectors."""
    state = content["state_dict"]
    suffix = next((state[n] for n in ("token_suffix", "prompt_learner.token_suffix") if n in state), None)
    if suffix is None or suffix.shape[-1] != table.shape[1]:
        raise InputError(f"checkpoint {str(path)!r}: expected token_suffix in it, to know the names before the context")
    names = []
    for rows in suffix.float():
        cosines, ids = PF.nearest_words(rows, table.float(), 1)
        tokens = ids[:, 0].tolist()
        end = tokens.index(eot_token()) if eot_token() in tokens else 0
        if end < 2 or cosines[:end].min() < 0.99:
            raise InputError(f"--backbone: expected the CLIP whose word vectors are in {str(path)!r}, got another")
        names.append(tokenizer().decode(tokens[: end - 1]).strip())  # without the full stop
    return names
