"""PromptLearner: learnable context vectors among the tokens of class names, and where each of them sits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plpp_reg.attachment.layout import POSITIONS
from plpp_reg.clip.load import openai_clip
from plpp_reg.clip.text import TextOutput, TextTower
from plpp_reg.clip.tree import PromptTree, build_tree, context_symbol
from plpp_reg.errors import InputError
from plpp_reg.loss.functional import STATES

ALL = slice(0, None, 1)


@functools.cache
def tokenizer():
    """OpenAI's byte-pair tokenizer, from the openai-clip package."""
    return openai_clip().clip._tokenizer


def encode(text: str) -> list[int]:
    """Token ids of a text, without SOS and EOT."""
    return tokenizer().encode(text)


def sos_token() -> int:
    return tokenizer().encoder["<|startoftext|>"]


def eot_token() -> int:
    return tokenizer().encoder["<|endoftext|>"]


def encode_texts(tower: TextTower, texts: Sequence[str]) -> Tensor:
    """Features of plain texts, (C, embed_dim), not normalised: what ``encode_text(tokenize(texts))`` gives."""
    prompts = [[sos_token(), *encode(text), eot_token()] for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        _check_length(repr(text), len(prompt), len(tower.positional_embedding))
    device, width = tower.positional_embedding.device, tower.ln_final.weight.shape[0]
    tree = build_tree(prompts, 0, width, tower.max_rows(), device=device)
    nothing = torch.empty(1, 0, width, device=device)
    return tower(tree, nothing, need_hidden=False).features[0]


def first_words(n_ctx: int, ctx_init: str) -> dict[str, Any]:
    """PromptLearner's arguments where the first ``n_ctx`` tokens of the init words are learned, as in MaPLe; where there are
    not so many, the context starts at random."""
    if ctx_init and n_ctx <= len(encode(ctx_init.replace("_", " "))):
        return {"ctx_init": ctx_init, "n_learned": n_ctx}
    return {"n_ctx": n_ctx}


def _check_length(what: str, tokens: int, most: int, detail: str = "") -> None:
    if tokens > most:
        raise InputError(f"{what}: expected at most {most} tokens, got {tokens}{detail}: shorten it")


def check_states(name: str, states: str) -> str:
    """
    Raises:
        InputError: it is none of :data:`plpp_reg.loss.functional.STATES`.
    """
    if states not in STATES:
        raise InputError(f"{name}: expected one of {', '.join(map(repr, STATES))}, got {states!r}")
    return states


class PromptLearner(nn.Module):
    """Context vectors for C class names: ``[SOS] v_1 .. v_M name . [EOT]`` and its variants, as in CoOp (arXiv 2109.01134).

    Args:
        clip_model: its token embedding gives width, dtype and the init words' vectors.
        classnames: C names; underscores read as spaces, as upstream does.
        n_ctx: number M of context vectors, >= 1. Ignored where ``ctx_init`` is given: M is then its number of
            tokens, or ``n_learned``.
        ctx_init: words to start from ("a photo of a"); empty: random, standard deviation 0.02.
        position: where the name stands: "end" (after the context), "middle" (after its first half) or "front".
        class_specific: one context a class, (C, M, D), instead of one for all, (M, D).
        n_learned: of the init words' tokens, learn the first ``n_learned`` alone; the others stay words between the context
            and the name, as in MaPLe ("[v_1] [v_2] of a name."). None: all.
        states: which state ``hidden`` holds for each context vector: the "preceding" one, which has seen nothing of the vector
            and predicts it as a language model does, or its "own", the text tower's deep reading of the very vector.

    ``ctx`` is a float32 leaf whatever the model's precision: an fp16 leaf of size 0.02 ignores small updates.

    >>> from plpp_reg.clip.load import load_clip
    >>> prompts = PromptLearner(load_clip(), ["cat", "hot air balloon"], ctx_init="a photo of a")
    >>> prompts.n_ctx, prompts.context_positions()[0].tolist()  # SOS stands at 0
    (4, [1, 2, 3, 4])
    >>> prompts.name_positions()  # the full stop among them
    [[5, 6], [5, 6, 7, 8]]

    Raises:
        InputError: a prompt does not fit the model's context length; the message names it.
    """

    def __init__(
        self,
        clip_model: nn.Module,
        classnames: Sequence[str],
        n_ctx: int = 16,
        ctx_init: str = "",
        position: str = "end",
        class_specific: bool = False,
        n_learned: int | None = None,
        states: str = "preceding",
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise InputError(f"position: expected one of {', '.join(map(repr, POSITIONS))}, got {position!r}")
        check_states("states", states)
        if not classnames:
            raise InputError("classnames: expected at least one class name, got none")
        embedding = clip_model.token_embedding.weight
        init_words = ctx_init.replace("_", " ").strip()
        self.from_words = bool(init_words)
        self._fixed: list[int] = []  # init words that stay words
        if init_words:
            tokens = encode(init_words)
            if n_learned is not None:
                if position != "end" or not 1 <= n_learned <= len(tokens):
                    raise InputError(
                        f"n_learned: expected position 'end' and 1 to {len(tokens)} of the tokens of {init_words!r}, "
                        f"got position {position!r} and {n_learned}"
                    )
                tokens, self._fixed = tokens[:n_learned], tokens[n_learned:]
            start = embedding.detach()[tokens].float()
        else:
            if not isinstance(n_ctx, int) or n_ctx < 1:
                raise InputError(f"n_ctx: expected an integer >= 1, got {n_ctx!r}")
            _check_length("n_ctx", n_ctx + 2, len(clip_model.positional_embedding), " (with SOS and EOT)")
            shape = (len(classnames), n_ctx) if class_specific else (n_ctx,)
            start = torch.empty(*shape, embedding.shape[1]).normal_(std=0.02)
        if class_specific and start.dim() == 2:
            start = start.expand(len(classnames), -1, -1)
        self.ctx = nn.Parameter(start.to(embedding.device).clone())
        self.classnames = [name.replace("_", " ") for name in classnames]
        self.class_specific = class_specific
        self.position = position
        self.states = states
        self.prompts = self._layout(clip_model.positional_embedding.shape[0])
        self._trees: dict[tuple, PromptTree] = {}

    @property
    def n_ctx(self) -> int:
        return self.ctx.shape[-2]

    @property
    def sees_names(self) -> bool:
        """Whether the states beside the context differ from class to class."""
        return self.class_specific or self.position != "end"

    def _layout(self, context_length: int) -> list[list[int]]:
        """The symbols of each prompt, SOS to EOT."""
        prompts = []
        for c, name in enumerate(self.classnames):
            first = c * self.n_ctx if self.class_specific else 0
            context = [context_symbol(first + m) for m in range(self.n_ctx)]
            words = encode(name + ".")  # as upstream: a name that ends in punctuation may merge with the full stop
            cut = len(encode(name))
            half = {"end": self.n_ctx, "middle": self.n_ctx // 2, "front": 0}[self.position]
            if self.position == "end":
                body = context + self._fixed + words
            else:
                body = context[:half] + words[:cut] + context[half:] + words[cut:]
            parts = f" ({self.n_ctx} context vectors, {len(words)} of the name, SOS and EOT)"
            _check_length(f"class name {name!r}", len(body) + 2, context_length, parts)
            prompts.append([sos_token(), *body, eot_token()])
        return prompts

    def context_positions(self) -> Tensor:
        """(C, M): where each context vector stands."""
        return torch.tensor([[t for t, s in enumerate(p) if s < 0] for p in self.prompts])

    def name_positions(self) -> list[list[int]]:
        """For each class: where the tokens of its name, and the full stop, stand."""
        first = 1 + len(self._fixed)
        return [[t for t, s in enumerate(p) if s >= 0][first:-1] for p in self.prompts]

    def eot_positions(self) -> Tensor:
        """(C,): where the token stands whose state is the class feature."""
        return torch.tensor([len(p) - 1 for p in self.prompts])

    def tree(self, max_rows: int | None = None, classes: slice = ALL) -> PromptTree:
        """The prompts of some classes as a tree on the context's device, made once a bound."""
        device, width = self.ctx.device, self.ctx.shape[-1]
        key = (max_rows, classes.start, classes.stop, classes.step, self.states, device)
        if key not in self._trees:
            with torch.inference_mode(False):  # what is kept serves training too
                self._trees[key] = build_tree(self.prompts[classes], self.n_ctx, width, max_rows, self.states, device)
        return self._trees[key]

    def forward(
        self, tower: TextTower, need_hidden: bool = True, deep: Sequence[Tensor] = (), classes: slice = ALL
    ) -> TextOutput:
        """Class features and context states of these prompts.

        Args:
            tower: the text tower.
            need_hidden: whether ``hidden`` is wanted.
            deep: for layers 1, 2, ...: rows like ``ctx`` that replace the context's at the layer's entry.
            classes: which of the classes, C of them.

        Returns:
            ``features`` (C, embed_dim), not normalised; ``hidden`` (P, M, D), the ``states``, fit for the regularizer beside
            ``context``: P is 1 where the context is shared and nothing class-specific precedes it, else C. ``context``, the
            vectors that these classes' prompts hold, is (M, D), or (C, M, D) where each has its own; through it a gradient is
            added to the text tower's own without a copy.
        """
        rows, *deep = (r.flatten(0, -2).unsqueeze(0) for r in (self.ctx, *deep))
        out = tower(self.tree(tower.max_rows(), classes), rows, deep, need_hidden)
        context = rows.view_as(self.ctx)
        return TextOutput(out.features[0], out.hidden, context[classes] if self.class_specific else context)


def encode_together(
    learners: Sequence[PromptLearner], tower: TextTower, need_hidden: bool = True, classes: slice = ALL
) -> list[TextOutput]:
    """Several learners' prompts in one text pass, each as its own :meth:`PromptLearner.forward` gives it.

    Raises:
        InputError: their prompts differ in more than the vectors of their contexts.
    """
    first = learners[0]
    for other in learners[1:]:
        if other.prompts != first.prompts or other.states != first.states:
            raise InputError(
                f"contexts in one text pass: expected the same class names, and {first.n_ctx} vectors in the same places, "
                f"got {other.n_ctx} or other names or places"
            )
    rows = torch.stack([learner.ctx.flatten(0, -2) for learner in learners])  # (G, S, D)
    out = tower(first.tree(tower.max_rows(len(learners)), classes), rows, need_hidden=need_hidden)
    hidden = [None] * len(learners) if out.hidden is None else out.hidden.chunk(len(learners))
    contexts = [row.view_as(first.ctx) for row in rows]
    if first.class_specific:
        contexts = [context[classes] for context in contexts]
    return [TextOutput(*each) for each in zip(out.features, hidden, contexts, strict=True)]
