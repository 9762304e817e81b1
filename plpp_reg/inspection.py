"""``plpp inspect``: what the context vectors of a run or a checkpoint, ours or upstream's, say in words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg import functional as PF
from plpp_reg.clip.load import EMBEDDED, load_clip
from plpp_reg.clip.prompts import POSITIONS, PromptLearner, encode, eot_token, tokenizer
from plpp_reg.clip.text import TextTower
from plpp_reg.engine import checkpoint, config, registry
from plpp_reg.engine.files import write_atomically
from plpp_reg.engine.log import RunLog
from plpp_reg.errors import InputError, unknown
from plpp_reg.words import NearWord, candidate_ids, nearest_words

SAMPLE = 512  # words whose nearest other word tells how far words lie from each other
ROWS = 128  # rows that meet the vocabulary at once
DEEP = (r"(?:prompt_learner\.)?compound_prompts_text\.(\d+)", r"text_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow")


class Prompts(NamedTuple):
    """Context vectors as they stand somewhere: v (1 or P, M, D) and the states before them, h (1 or P, M, D)."""

    context: Tensor
    hidden: Tensor


class Vector(NamedTuple):
    """One context vector."""

    prompt: int
    position: int
    nearest: list[NearWord]
    nearer_than: float  # share of words that lie less near to their nearest other word than this vector to its own
    norm: float
    perplexity: float  # of its nearest word, over the vocabulary
    expected: list[tuple[str, float]]  # the LM head's own words there, and their probabilities


class Reading(NamedTuple):
    """All vectors at one time, and their perplexity together."""

    perplexity: float
    vectors: list[Vector]


class Typical(NamedTuple):
    """Of the vocabulary's words: 5%, 50% and 95% points of the cosine to the nearest other word, and the median norm."""

    cosines: tuple[float, float, float]
    norm: float


class Inspection(NamedTuple):
    """What :func:`inspect_prompts` found. ``epochs`` has the perplexity of each checkpoint that is there, 0: before training;
    ``logged`` the training's own mean of each epoch."""

    source: str
    trainer: str
    backbone: str
    epoch: int
    typical: Typical
    before: Reading | None
    after: Reading
    epochs: dict[int, float]
    logged: dict[int, float]


def inspect_prompts(
    source: str | Path, backbone: str = "", epoch: int | None = None, position: str = "end", init: str = "", k: int = 5
) -> Inspection:
    """Read a run's folder or a checkpoint file. Nothing in it is run: ``weights_only``.

    Args:
        source: a run's folder, the model folder in it, or a ``model.pth.tar-<n>``.
        backbone: the CLIP that the prompts were trained on; a run of ours knows it.
        epoch: of several checkpoints; None: the newest.
        position: where the class name stands, for a checkpoint of upstream's, which does not say.
        init: the words that the context began with, for the same reason; empty: unknown.
        k: how many words.

    Raises:
        InputError: no such file, no context in it, a backbone that does not fit.
    """
    if k < 1:
        raise InputError(f"--words: expected an integer >= 1, got {k}")
    path = find_checkpoint(Path(source), epoch)
    content = checkpoint.load(path)
    run = path.parent.parent
    ours = isinstance(content.get("plpp_reg"), dict) and (run / "config.yaml").is_file()
    reader = _OurRun(run, content, backbone) if ours else _Foreign(content, path, backbone, position, init)
    rows = _Vocabulary(reader.clip_model, k)
    before = reader.before()
    first = None if before is None else rows.read(before)
    after = rows.read(reader.at(content, path))
    epochs = {} if first is None else {0: first.perplexity}
    for other in _siblings(path):
        number = int(other.name.rsplit("-", 1)[1])
        epochs[number] = after.perplexity if other == path else rows.perplexity(reader.at(checkpoint.load(other), other))
    epochs.setdefault(content["epoch"], after.perplexity)
    return Inspection(
        str(source),
        reader.trainer,
        reader.backbone,
        content["epoch"],
        rows.typical,
        first,
        after,
        epochs,
        reader.logged(content),
    )


def find_checkpoint(source: Path, epoch: int | None = None) -> Path:
    """The file that is meant."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(f"{str(source)!r}: expected a run's folder or a checkpoint, there is nothing")
    folders = [source] if _numbered(source) else [f for f in sorted(source.iterdir()) if f.is_dir() and _numbered(f)]
    if len(folders) != 1:
        found = f"found {', '.join(f.name for f in folders)}: name one" if folders else "found none"
        raise InputError(f"{str(source)!r}: looked for model.pth.tar-<epoch> in it and in its folders, {found}")
    files = _numbered(folders[0])
    if epoch is None:
        return checkpoint.newest(folders[0]) or files[max(files)]
    if epoch not in files:
        raise unknown("epoch", str(epoch), map(str, files))
    return files[epoch]


def _numbered(folder: Path) -> dict[int, Path]:
    found = {p: checkpoint.NUMBERED.fullmatch(p.name) for p in folder.iterdir()}
    return dict(sorted((int(match.group(1)), p) for p, match in found.items() if match))


def _siblings(path: Path) -> Iterator[Path]:
    yield from _numbered(path.parent).values() if checkpoint.NUMBERED.fullmatch(path.name) else ()


# ---- where prompts come from -----------------------------------------------------------------------------------------


class _OurRun:
    """A run of ours: its trainer is built again, without its data, so it starts as it did."""

    def __init__(self, run: Path, content: dict[str, Any], backbone: str) -> None:
        from plpp_reg.datasets import DataSplit

        values = config.from_yaml(run / "config.yaml")
        cls, *_ = registry.find_trainer(str(values.get("TRAINER.NAME", "")))
        if not cls.learns_text_context:
            raise InputError(f"{str(run)!r}: expected a method that learns text context, got {values['TRAINER.NAME']}")
        cfg = config.get_cfg_default(cls)
        for key, value in values.items():
            config.set_value(cfg, key, value)
        cfg.USE_CUDA = False
        cfg.MODEL.BACKBONE.NAME = backbone or cfg.MODEL.BACKBONE.NAME
        data = DataSplit((), (), (), list(content["plpp_reg"]["classnames"]))
        self.model = cls(cfg, data=data, log=RunLog(quiet=True))
        self.trainer, self.backbone, self.clip_model = cfg.TRAINER.NAME, cfg.MODEL.BACKBONE.NAME, self.model.clip_model

    def before(self) -> Prompts:
        return self._prompts()

    def at(self, content: dict[str, Any], path: Path) -> Prompts:
        self.model.saving.load_weights(path)
        return self._prompts()

    def _prompts(self) -> Prompts:
        with torch.no_grad():
            learner = self.model.learner
            return _three_dimensions(learner.ctx, learner(self.model.tower, deep=self.model.deep_context()).hidden)

    def logged(self, content: dict[str, Any]) -> dict[int, float]:
        history = content["plpp_reg"].get("history") or []
        return {i: e["perplexity"] for i, e in enumerate(history, 1) if isinstance(e, dict) and "perplexity" in e}


class _Foreign:
    """A checkpoint of upstream's CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe, IVLP or PromptSRC: what its tensors say."""

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
        self.trainer, self.backbone = "upstream", backbone or EMBEDDED
        self.tower, self.position = TextTower(self.clip_model), position
        self.start = encode(init.replace("_", " ").strip())
        if self.start and len(self.start) < context.shape[-2]:
            raise InputError(f"--init: expected words of {context.shape[-2]} tokens or more, got {init!r}, {len(self.start)}")
        self.start = self.start[: context.shape[-2]]  # MaPLe learns the first words alone
        prompts = context.shape[0] if context.dim() == 3 else 1
        self.names = ["x"] * prompts
        if position != "end":  # the state before a vector has seen the name
            self.names = class_names(content, path, table)

    def before(self) -> Prompts | None:
        if not self.start:
            return None
        return self._prompts(self.clip_model.token_embedding.weight[self.start], [])

    def at(self, content: dict[str, Any], path: Path) -> Prompts:
        return self._prompts(*context_of(content, path))

    def _prompts(self, context: Tensor, deep: Sequence[Tensor]) -> Prompts:
        specific = context.dim() == 3
        learner = PromptLearner(self.clip_model, self.names, context.shape[-2], "", self.position, specific)
        with torch.no_grad():
            learner.ctx.copy_(context)
            rows = [d.float().expand(len(context), -1, -1) if specific else d.float() for d in deep]
            return _three_dimensions(learner.ctx, learner(self.tower, deep=rows).hidden)

    def logged(self, content: dict[str, Any]) -> dict[int, float]:
        return {}


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


def _three_dimensions(context: Tensor, hidden: Tensor) -> Prompts:
    """Copies: the next checkpoint is loaded into the same tensors."""
    context = context.detach().float().clone()
    return Prompts(context if context.dim() == 3 else context.unsqueeze(0), hidden.detach().float().clone())


# ---- reading them ----------------------------------------------------------------------------------------------------


class _Vocabulary:
    """The words of one CLIP."""

    def __init__(self, clip_model: nn.Module, k: int) -> None:
        self.table, self.k = clip_model.token_embedding.weight.detach().float(), k
        self.ids = candidate_ids(clip_model)
        if self.ids is None:
            self.ids = torch.arange(len(self.table))
        self.rows = self.table[self.ids]
        at = torch.linspace(0, len(self.rows) - 1, min(SAMPLE, len(self.rows))).long()
        cosines = PF.nearest_words(self.rows[at], self.rows, 2)[0][:, 1]  # the first is the word itself
        self.nearest_other = cosines.sort().values
        points = [float(self.nearest_other.quantile(q)) for q in (0.05, 0.5, 0.95)]
        self.typical = Typical((points[0], points[1], points[2]), float(self.rows.norm(dim=-1).median()))

    def perplexity(self, prompts: Prompts) -> float:
        return math.exp(self._rows(prompts)[1].mean())

    def _rows(self, prompts: Prompts) -> tuple[Tensor, Tensor, list[list[tuple[str, float]]]]:
        """By row: the vector (R, D), its nearest word's negative log-likelihood (R,), the head's words."""
        number = max(len(prompts.context), len(prompts.hidden))
        v, h = (t.expand(number, -1, -1).flatten(0, 1) for t in prompts)
        nll, expected = [], []
        for part_v, part_h in zip(v.split(ROWS), h.split(ROWS), strict=True):
            log_p = (part_h @ self.rows.T).log_softmax(-1)
            nearest = PF.nearest_words(part_v, self.rows, 1)[1]
            nll.append(-log_p.gather(1, nearest)[:, 0])
            top = log_p.topk(self.k)
            for ids, values in zip(self.ids[top.indices].tolist(), top.values.exp().tolist(), strict=True):
                expected.append([(tokenizer().decode([i]).strip(), p) for i, p in zip(ids, values, strict=True)])
        return v, torch.cat(nll), expected

    def read(self, prompts: Prompts) -> Reading:
        v, nll, expected = self._rows(prompts)
        nearest = nearest_words(v, self.table, self.k, self.ids)
        m = prompts.context.shape[1]
        vectors = []
        for i, words in enumerate(nearest):
            nearer = float((self.nearest_other < words[0].cosine).float().mean())
            vectors.append(
                Vector(i // m, i % m, words, nearer, float(v[i].norm()), math.exp(nll[i]), expected[i])
            )  # fmt: skip
        return Reading(math.exp(nll.mean()), vectors)


# ---- telling it ------------------------------------------------------------------------------------------------------


def as_json(found: Inspection) -> str:
    """Everything, every prompt; NaN and infinity never occur."""

    def reading(r: Reading | None) -> dict[str, Any] | None:
        if r is None:
            return None
        vectors = [
            {
                **v._asdict(),
                "nearest": [w._asdict() for w in v.nearest],
                "expected": [{"word": word, "probability": p} for word, p in v.expected],
            }
            for v in r.vectors
        ]
        return {"perplexity": r.perplexity, "vectors": vectors}

    low, median, high = found.typical.cosines
    typical = {"cosine_to_nearest_other_word": {"5%": low, "50%": median, "95%": high}, "norm": found.typical.norm}
    plain = {**found._asdict(), "typical": typical, "before": reading(found.before), "after": reading(found.after)}
    return json.dumps(plain, indent=2, ensure_ascii=False)


def as_text(found: Inspection) -> str:
    """A table a time; of several prompts the first."""
    low, median, high = found.typical.cosines
    lines = [
        f"{found.source}: {found.trainer} on {found.backbone}, epoch {found.epoch}",
        f"Words lie {median:.2f} (cosine; 5% to 95%: {low:.2f} to {high:.2f}) from their nearest other word; their norm is "
        f"{found.typical.norm:.2f}.",
    ]
    for title, reading in (("Before training", found.before), ("After training", found.after)):
        if reading is None:
            lines.append(f"\n{title}: not in the file; name the words that it began with (--init).")
            continue
        lines.append(f"\n{title}: perplexity {reading.perplexity:,.1f}")
        rows = [["", "nearest words (cosine)", "nearer than", "norm", "perplexity", "the LM head expects (probability)"]]
        shown = [v for v in reading.vectors if v.prompt == 0]
        for v in shown:
            near = ", ".join(f"{w.word} {w.cosine:.2f}" for w in v.nearest)
            words = ", ".join(f"{word} {p:.2f}" for word, p in v.expected)
            rows.append([f"v_{v.position + 1}", near, f"{v.nearer_than:.0%}", f"{v.norm:.2f}", f"{v.perplexity:,.0f}", words])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [c.rjust(w) if i in (2, 3, 4) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        if more := reading.vectors[-1].prompt:
            lines.append(f"(the first prompt; {more} more in --json)")
    lines.append('\n"nearer than": the share of words that lie less near to their nearest other word.')
    if len(found.epochs) > 1:
        lines.append("Perplexity by epoch: " + ", ".join(f"{e}: {p:,.1f}" for e, p in sorted(found.epochs.items())))
    return "\n".join(lines)


def draw(found: Inspection, path: Path) -> None:
    """The perplexity over the epochs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    if found.logged:
        axes.plot(
            list(found.logged), list(found.logged.values()), color="#d1495b", linewidth=1.2, label="in training, epoch mean"
        )
    measured = sorted(found.epochs.items())
    axes.plot(*zip(*measured, strict=True), "o", color="#777777", label="of the checkpoints (0: before)")
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity of the context vectors")
    axes.set_title(f"{found.trainer} on {found.backbone}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda p: figure.savefig(p, dpi=120, format="png"))
    plt.close(figure)
