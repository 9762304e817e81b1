"""PerplexityRegularizer: PLPP's settings, the frozen vocabulary, the checks of its input, one call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.errors import InputError
from plpp_reg.loss import functional as PF
from plpp_reg.loss.nearest import NearestWords


class Components(NamedTuple):
    """What one call measured. ``total`` is weighted; the two losses are not. All are scalars."""

    total: Tensor
    perplexity_loss: Tensor
    inverse_loss: Tensor
    perplexity: Tensor


class _Words(NamedTuple):
    """The vocabulary on one device, and which embedding it was taken from."""

    vocabulary: Tensor  # (V, D)
    inverse_norm: Tensor  # (V,)
    source: Tensor
    fingerprint: tuple[object, ...]


class PerplexityRegularizer(nn.Module):
    """``weight * L_ppl + inverse_weight * L_inv`` over learned context vectors (PLPP, arXiv 2412.15277).

    With the letters of :mod:`plpp_reg.loss.functional`, the mean being over P and M, in nats::

        L_ppl = mean -sum_I q log p        (q, the soft label, is detached)
        L_inv = mean -sum_I p log q        (p, the LM head's words, is detached)

    Args:
        embedding: the text tower's frozen ``token_embedding``, or its weight (V, D). Its storage is shared, never copied, where
            it is float32 already and on the context's device; the regularizer follows it when it moves or is reloaded in place
            (``load_state_dict``). A tensor that is put in the weight's place (``assign=True``) is seen where the module was
            given (another module in its place is not); new numbers written through ``.data`` leave no trace: call
            :meth:`refresh` after that.
        weight: factor of the perplexity loss, >= 0.
        inverse_weight: factor of the inverted perplexity loss, >= 0.
        top_k: number K of nearest words that make the label, 1 <= K <= V.
        temperature: of the label's softmax over cosines, > 0.
        label: "soft" (K words) or "hard" (the nearest word alone; then L_inv is 0).
        normalize_over: p is a distribution over the whole "vocabulary" or over the label's "topk" words.
        detach_label: no gradient through the label's side of either loss.
        memory_mib: bound on each matrix of a number for each context vector and word, in MiB, > 0; changes nothing else.
        candidates: ids of the rows of ``embedding`` that count as words, for label and prediction alike; None: all.

    ``embedding`` of an openai-clip model, say: ``PerplexityRegularizer(clip_model.token_embedding.weight)``. The module has no
    parameters and no buffers: it saves nothing, ``DistributedDataParallel`` broadcasts nothing of it, a copy or pickle holds
    the embedding alone. ``torch.compile(fullgraph=True)`` takes it as one graph, which reads the embedding as it is at each
    call, and ``torch.func.grad`` differentiates it as autograd does.

    >>> regularizer = PerplexityRegularizer(torch.eye(1000, 64), inverse_weight=0.5)
    >>> context = torch.nn.Parameter(torch.randn(4, 64) * 0.02)  # v, (M, D)
    >>> hidden = torch.zeros(4, 64)  # h, (M, D): these states predict every word alike
    >>> parts = regularizer.components(context, hidden)
    >>> parts.perplexity.round()
    tensor(1000.)
    >>> torch.equal(parts.total, 0.1 * parts.perplexity_loss + 0.5 * parts.inverse_loss)
    True
    """

    def __init__(
        self,
        embedding: Tensor | nn.Embedding,
        weight: float = 0.1,
        inverse_weight: float = 0.1,
        top_k: int = 10,
        temperature: float = 0.1,
        label: str = "soft",
        normalize_over: str = "topk",
        detach_label: bool = True,
        memory_mib: float = 64.0,
        candidates: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        source = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
        if not isinstance(source, Tensor) or source.dim() != 2 or not source.is_floating_point():
            raise InputError(
                f"embedding: expected an nn.Embedding or a floating-point tensor (V, D), got {_describe(embedding)}"
            )
        ids = _check_candidates(candidates, len(source))
        vocabulary_size = len(source) if ids is None else len(ids)
        self.weight = _check_number("weight", weight, 0.0)
        self.inverse_weight = _check_number("inverse_weight", inverse_weight, 0.0)
        self.temperature = _check_number("temperature", temperature, 0.0, open_below=True)
        self.label = _check_choice("label", label, PF.LABELS)
        self.normalize_over = _check_choice("normalize_over", normalize_over, PF.NORMALIZE_OVER)
        self.top_k = _check_integer("top_k", top_k, 1, vocabulary_size, "the vocabulary's size")
        self.memory_mib = _check_number("memory_mib", memory_mib, 0.0, open_below=True)
        if not isinstance(detach_label, bool):
            raise InputError(f"detach_label: expected True or False, got {detach_label!r}")
        self.detach_label = detach_label
        if normalize_over == "topk" and (label == "hard" or top_k == 1):
            raise InputError(
                "normalize_over: expected 'vocabulary' with one label word (hard, or top_k 1), got 'topk': p is 1 there"
            )
        self.nearest = NearestWords()
        # tuples, so that nn.Module registers nothing: no parameter or buffer of the host's becomes ours, nothing is broadcast
        self._source = (embedding,)
        self._candidates = (ids,)
        self._words: _Words | None = None

    def forward(self, context: Tensor, hidden: Tensor) -> Tensor:
        """The weighted scalar to add to a task loss; arguments as in :meth:`components`."""
        if not self.active:
            self._checked(context, hidden)  # bad input is bad input at any weight
            return context.new_zeros((), dtype=PF.compute_dtype(context))
        return _sum(self.weighted(context, hidden, with_perplexity=False)[0])

    @property
    def active(self) -> bool:
        """Whether a weight is above 0; if none is, nothing of the host's computation changes by a bit."""
        return self.weight > 0 or self.inverse_weight > 0

    def terms(self, parts: Components) -> dict[str, Tensor]:
        """The weighted losses by their names in a log, ``ppl`` and ``inverse_ppl``; one of weight 0 is not there at all."""
        return self._weigh(parts.perplexity_loss, parts.inverse_loss)

    def _weigh(self, direct: Tensor, inverse: Tensor) -> dict[str, Tensor]:
        weighted = {"ppl": (self.weight, direct), "inverse_ppl": (self.inverse_weight, inverse)}
        return {name: weight * loss for name, (weight, loss) in weighted.items() if weight > 0}

    def weighted(
        self, context: Tensor, hidden: Tensor, with_perplexity: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The summands of a training step, as :meth:`terms` names them, and the perplexity where it was asked for or at hand.

        Arguments and errors as in :meth:`components`.
        """
        direct, inverse, perplexity = self._measure(context, hidden, with_perplexity)
        return self._weigh(direct, inverse), perplexity

    def components(self, context: Tensor, hidden: Tensor, with_perplexity: bool = True) -> Components:
        """Total, both losses (unweighted) and the perplexity, as scalars.

        Args:
            context: the learnable vectors v, (M, D) or (P, M, D), any floating dtype.
            hidden: the state h that precedes each of them, or its own, (M, D) or (P, M, D), any floating dtype. Where P is 1 in
                one of the two, it is shared: one context read in P different places.
            with_perplexity: False spares the prediction over the whole vocabulary where the losses need the top-k alone.

        Returns:
            :class:`Components`. ``perplexity = exp(mean -log p(nearest word))`` over the vocabulary, dimensionless, detached;
            nan where it was neither asked for nor at hand.

        Raises:
            InputError: shapes, width or dtype do not fit the vocabulary. It is a ValueError.
        """
        direct, inverse, perplexity = self._measure(context, hidden, with_perplexity)
        total = _sum(self._weigh(direct, inverse)) if self.active else direct.new_zeros(())
        return Components(total, direct, inverse, direct.new_full((), torch.nan) if perplexity is None else perplexity)

    def _measure(self, context: Tensor, hidden: Tensor, with_nll: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both losses, unweighted, and the perplexity; None where it was neither asked for nor at hand."""
        v, h = self._checked(context, hidden)
        words = self._words_on(v.device)
        rows = PF.plpp(
            v,
            h,
            words.vocabulary,
            top_k=self.top_k if self.label == "soft" else 1,
            max_bytes=self.max_bytes,
            E_inverse_norm=words.inverse_norm,
            search=self.nearest,
            temperature=self.temperature,
            normalize_over=self.normalize_over,
            detach_label=self.detach_label,
            with_nll=with_nll,
        )
        perplexity = None if rows.hard_nll is None else PF.perplexity(rows.hard_nll)
        return rows.perplexity_loss.mean(), rows.inverse_loss.mean(), perplexity

    def _checked(self, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (1 or P, M, D)."""
        width = self.width
        for name, tensor in (("context", context), ("hidden", hidden)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() not in (2, 3):
                raise InputError(f"{name}: expected a floating-point tensor (M, D) or (P, M, D), got {_describe(tensor)}")
            if tensor.shape[-1] != width:
                raise InputError(f"{name}: expected width D = {width} of the vocabulary, got {_describe(tensor)}")
            if tensor.numel() == 0:
                raise InputError(f"{name}: expected at least one context vector, got {_describe(tensor)}")
        v = context if context.dim() == 3 else context.unsqueeze(0)
        h = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
        if v.shape[1] != h.shape[1] or (v.shape[0] != h.shape[0] and 1 not in (v.shape[0], h.shape[0])):
            raise InputError(
                f"hidden: expected one state a context vector, context {_describe(context)}, got {_describe(hidden)}"
            )
        return v, h

    @property
    def source(self) -> Tensor:
        """The embedding's weight as it is now, (V, D)."""
        embedding = self._source[0]
        return embedding.weight if isinstance(embedding, nn.Embedding) else embedding

    @property
    def width(self) -> int:
        """D."""
        return self.source.shape[1]

    @property
    def max_bytes(self) -> int:
        """``memory_mib`` in bytes."""
        return int(self.memory_mib * 2**20)

    @property
    def rows_at_once(self) -> int:
        """How many context vectors meet the whole vocabulary at a time, within ``memory_mib``."""
        words = self.source if self.candidates is None else self.candidates
        return max(1, self.max_bytes // (4 * len(words)))

    @property
    def candidates(self) -> Tensor | None:
        """Ids of the rows that count as words, sorted; None: all."""
        return self._candidates[0]

    @property
    def vocabulary(self) -> Tensor:
        """E, float32 at least: the candidates' rows of the embedding, (V, D), on its device."""
        return self._words_on(self.source.device).vocabulary

    @property
    def inverse_norm(self) -> Tensor:
        """``1 / |E_i|``, (V,), on the embedding's device."""
        return self._words_on(self.source.device).inverse_norm

    def refresh(self) -> None:
        """Read the embedding again, after its numbers were written to through ``.data``."""
        self._words = None
        self.nearest.forget()

    def _words_on(self, device: torch.device) -> _Words:
        """The vocabulary, taken from the embedding anew where that has changed: shared where dtype, device and rows allow."""
        source, words = self.source, self._words
        if torch.compiler.is_compiling():  # in the graph, from the embedding as it is at each call
            return self._taken(source, device, ())
        if words is not None and words.vocabulary.device == device and words.fingerprint == _fingerprint(source):
            return words
        self.refresh()
        with torch.inference_mode(False):  # what is kept serves training too
            words = self._taken(source, device, _fingerprint(source))
        self._words = None if source.is_inference() else words  # an inference tensor does not tell that it has changed
        return words

    def _taken(self, source: Tensor, device: torch.device, fingerprint: tuple[object, ...]) -> _Words:
        rows = source.detach()
        if self.candidates is not None:
            rows = rows[self.candidates.to(rows.device)]
        vocabulary = rows.to(device=device, dtype=PF.compute_dtype(source))
        # the tensor too: while its storage is alive, no other weights can come to stand at its address
        return _Words(vocabulary, PF.inverse_norm(vocabulary), source.detach(), fingerprint)

    def __getstate__(self) -> dict[str, Any]:
        """What can be made again is not copied."""
        return {**self.__dict__, "_words": None, "nearest": NearestWords(self.nearest.remembers)}

    def extra_repr(self) -> str:
        names = [n for n in settings_defaults() if n != "memory_mib"]
        return ", ".join(
            [
                f"V={len(self.source) if self.candidates is None else len(self.candidates)}",
                *(f"{n}={getattr(self, n)!r}" for n in names),
            ]
        )


def settings_defaults() -> dict[str, float | int | str | bool]:
    """The regularizer's settings and their defaults, read from its signature."""
    parameters = inspect.signature(PerplexityRegularizer.__init__).parameters
    return {n: p.default for n, p in parameters.items() if n not in ("self", "embedding", "candidates")}


def _sum(terms: dict[str, Tensor]) -> Tensor:
    first, *others = terms.values()
    return sum(others, first)


def _fingerprint(tensor: Tensor) -> tuple[object, ...]:
    version = 0 if tensor.is_inference() else tensor._version  # an in-place load_state_dict raises it
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), version


def _describe(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(type(value).__name__)


def _check_number(name: str, value: float, low: float, open_below: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or (open_below and value == low):
        raise InputError(f"{name}: expected a finite number {'>' if open_below else '>='} {low:g}, got {value!r}")
    return float(value)


def _check_integer(name: str, value: int, low: int, high: int | None = None, what: str = "") -> int:
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        upper = f" and <= {high} ({what})" if high is not None else ""
        raise InputError(f"{name}: expected an integer >= {low}{upper}, got {value!r}")
    return value


def _check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _check_candidates(candidates: Sequence[int] | Tensor | None, size: int) -> Tensor | None:
    if candidates is None:
        return None
    try:
        ids = torch.as_tensor(candidates)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"candidates: expected a non-empty list of token ids, got {candidates!r:.60}") from e
    if ids.dim() != 1 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"candidates: expected a non-empty list of token ids, got {_describe(ids)}")
    ids = torch.tensor(sorted(set(ids.tolist())))
    if ids[0] < 0 or ids[-1] >= size:
        raise InputError(f"candidates: expected ids from 0 to {size - 1}, got {int(ids[0])} to {int(ids[-1])}")
    return ids
