r"""Every equation of PLPP, as pure functions of tensors.

Letters (used in every docstring of the package)::

    B images   C classes   P prompts   M context vectors   T tokens
    D text width   V vocabulary   K top-k   R = P * M rows

    E   (V, D)     the frozen token embedding; also the weight of the training-free LM head
    v   (R, D)     learnable context vectors, in token-embedding space
    h   (R, D)     the text tower's ln_final output at the position before each of them ("preceding"), or at its "own"
    I   (R, K)     ids of the K words nearest to each v by cosine
    q   (R, K)     the label, softmax(cos(E_I, v) / temperature)
    p   (R, K)     the LM head's probability of those words, softmax(E h) over V or over I

The equations follow "Prompt Learning with PerPlexity" (arXiv 2412.15277); what its public text leaves open is listed as
OUR CHOICE in docs/method.md. All logarithms are natural (units: nats). In :func:`plpp`, whatever comes in, the arithmetic is
float32 at least (float64 stays float64), also under autocast; the other functions take tensors of one type, outside autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LABELS = ("soft", "hard")
STATES = ("preceding", "own")  # which state of the text tower h is
NORMALIZE_EPS = 1e-12  # as in F.normalize: a shorter vector counts as one of this length
NORMALIZE_OVER = ("vocabulary", "topk")
MANY = 24  # of a row's K words: where K * MANY >= V, all V are multiplied with in less time than K are looked up


class PLPPRows(NamedTuple):
    """One value a context vector, shape ``(R,)`` each, in nats; ``hard_nll`` is None where it was not asked for."""

    perplexity_loss: Tensor
    inverse_loss: Tensor
    hard_nll: Tensor | None


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any argument is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Arithmetic in the tensors' own types, whatever stands around it; "meta", where nothing is computed, has no autocast."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def inverse_norm(E: Tensor) -> Tensor:
    """``1 / |E_i|`` for each row, (V, D) -> (V,). A zero row gets a large finite number, hence cosine 0 with everything."""
    length: Tensor = E.norm(dim=-1)
    return length.clamp_min(torch.finfo(E.dtype).eps).reciprocal()


def nearest_words(v: Tensor, E: Tensor, k: int, E_inverse_norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k words nearest by cosine, no gradient: v (R, D), E (V, D) -> cosines (R, k) descending and ids I (R, k).

    The normalised copy of E is never made: ``cos(E_i, v) = (E_i . v) / |E_i| / |v|``.

    >>> cosines, ids = nearest_words(torch.tensor([[0.0, 4.0, 3.0]]), torch.eye(3), k=2)
    >>> ids, cosines
    (tensor([[1, 2]]), tensor([[0.8000, 0.6000]]))
    """
    if E_inverse_norm is None:
        E_inverse_norm = inverse_norm(E)
    with torch.no_grad():
        # (V, R), the many rows first: on a CPU such a thin product is shared among threads by its first factor's rows
        similarity = (E @ F.normalize(v, dim=-1).T).mul_(E_inverse_norm.unsqueeze(1))
        cosines, ids = similarity.topk(k, dim=0)
        return cosines.T, ids.T


def search_all(v: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int, max_bytes: int) -> tuple[Tensor, Tensor]:
    """:func:`nearest_words`, so many rows at a time that their (rows, V) cosines fit ``max_bytes``."""
    found = [nearest_words(v[part], E, k, E_inverse_norm) for part in parts(len(v), len(E) * E.element_size(), max_bytes)]
    cosines, ids = zip(*found, strict=True)
    return (cosines[0], ids[0]) if len(found) == 1 else (torch.cat(cosines), torch.cat(ids))


def parts(rows: int, bytes_a_row: int, max_bytes: int) -> Iterator[slice]:
    """Slices of ``rows``, as few as keep what is made for the rows of one within ``max_bytes``; at least a row each."""
    at_once = max(1, max_bytes // bytes_a_row)
    return (slice(first, first + at_once) for first in range(0, rows, at_once))


def word_products(x: Tensor, E: Tensor, ids: Tensor, max_bytes: int) -> Tensor:
    """``E_I x``, each row with its own words: x (R, N, D), E (V, D), ids (R, K) -> (R, N, K). Differentiable in x, twice.

    The words' vectors (R, K, D) are looked up, at most ``max_bytes`` of them at a time, in both directions, and never kept.
    Where K is a good part of V (``MANY``) and N is 1, products with all words, of which K are taken, cost less.

    >>> word_products(torch.tensor([[[0.0, 4.0, 3.0]]]), torch.eye(3), torch.tensor([[2, 1]]), max_bytes=2**20)
    tensor([[[3., 4.]]])
    """
    products: Tensor = _WordProducts.apply(x, E, ids, max_bytes)
    return products


class _WordProducts(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, E: Tensor, ids: Tensor, max_bytes: int) -> Tensor:
        if x.shape[1] == 1 and _many(ids, E):
            rows = parts(len(ids), len(E) * E.element_size(), max_bytes)
            return torch.cat([(x[part, 0] @ E.T).gather(1, ids[part]) for part in rows]).unsqueeze(1)
        a_row = ids.shape[1] * E.shape[1] * E.element_size()
        products = [torch.bmm(x[part], F.embedding(ids[part], E).transpose(1, 2)) for part in parts(len(ids), a_row, max_bytes)]
        return products[0] if len(products) == 1 else torch.cat(products)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, E, ids, ctx.max_bytes = inputs
        ctx.save_for_backward(E, ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        E, ids = ctx.saved_tensors
        with _without_autocast(E):  # some call backward inside it
            if gradient.shape[1] == 1:
                return weighted_words(gradient[:, 0], E, ids, ctx.max_bytes).unsqueeze(1), None, None, None
            a_row = ids.shape[1] * E.shape[1] * E.element_size()
            sums = [torch.bmm(gradient[part], F.embedding(ids[part], E)) for part in parts(len(ids), a_row, ctx.max_bytes)]
            return torch.cat(sums), None, None, None


def _many(ids: Tensor, E: Tensor) -> bool:
    """Whether all V words are multiplied with in less time than K of them are looked up for each row."""
    return ids.shape[1] * MANY >= len(E)


def weighted_words(weights: Tensor, E: Tensor, ids: Tensor, max_bytes: int) -> Tensor:
    """``sum_k weights_k E_{I_k}`` for each row: weights (R, K), E (V, D), ids (R, K), of different words -> (R, D)."""
    if _many(ids, E):
        rows = parts(len(ids), len(E) * E.element_size(), max_bytes)
        nothing = weights.new_zeros(1, len(E))
        return torch.cat([nothing.expand(len(ids[r]), -1).scatter(1, ids[r], weights[r]) @ E for r in rows])
    return F.embedding_bag(ids, E, per_sample_weights=weights.contiguous(), mode="sum")


def with_gradient(cosines: Tensor, v: Tensor, E: Tensor, E_inverse_norm: Tensor, ids: Tensor, max_bytes: int) -> Tensor:
    """Known cosines of v (R, D) to its words ids (R, K) as a function of v: (R, K) -> (R, K).

    ``d cos_k / d v = (E_k / |E_k| - cos_k u) / |v|`` with ``u = v / |v|``.
    """
    same: Tensor = _Cosines.apply(v, cosines, E, E_inverse_norm, ids, max_bytes)
    return same


class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(v: Tensor, cosines: Tensor, E: Tensor, E_inverse_norm: Tensor, ids: Tensor, max_bytes: int) -> Tensor:
        return cosines.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, _, E, E_inverse_norm, ids, ctx.max_bytes = inputs
        ctx.save_for_backward(v, output, E, E_inverse_norm, ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        v, cosines, E, E_inverse_norm, ids = ctx.saved_tensors
        with _without_autocast(E):  # some call backward inside it
            length = v.norm(dim=-1, keepdim=True).clamp_min(NORMALIZE_EPS)
            toward = weighted_words(gradient * E_inverse_norm[ids], E, ids, ctx.max_bytes)
            along = (gradient * cosines).sum(-1, keepdim=True) / length
            return (toward - along * v) / length, None, None, None, None, None


def perplexity_loss(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``-sum_I q log p``: cross-entropy of the prediction under the label, (R, K) -> (R,), nats.

    >>> q, p = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.25]])
    >>> perplexity_loss(q.log(), p.log())
    tensor([0.8370])
    """
    return -(log_q.exp() * log_p).sum(-1)


def inverted_perplexity_loss(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``-sum_I p log q``: the same with the roles exchanged, (R, K) -> (R,), nats.

    >>> q, p = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.25]])
    >>> inverted_perplexity_loss(q.log(), p.log())  # log 2, whatever p is: q is uniform
    tensor([0.6931])
    """
    return -(log_p.exp() * log_q).sum(-1)


def perplexity(hard_nll: Tensor) -> Tensor:
    """``exp(mean negative log-likelihood)`` over all rows, dimensionless; a uniform prediction over V words gives V.

    >>> perplexity(torch.tensor([1000.0, 1000.0]).log()).round()
    tensor(1000.)
    """
    return hard_nll.mean().exp()


def vocabulary_log_normalizer(h: Tensor, E: Tensor, max_bytes: int) -> Tensor:
    """``log sum_V exp(E h)``: h (R, D), E (V, D) -> (R,). Differentiable in h, twice.

    At most ``max_bytes`` of the (R, V) logits live at a time; where that is not all of them, backward computes them again.
    """
    if torch.is_grad_enabled() and h.requires_grad:
        log_normalizer: Tensor = _VocabularyLogNormalizer.apply(h, E, max_bytes)[0]
        return log_normalizer
    rows = parts(len(h), len(E) * E.element_size(), max_bytes)
    return torch.cat([(h[part] @ E.T).logsumexp(-1) for part in rows])


class _VocabularyLogNormalizer(torch.autograd.Function):
    """Autograd's own graph walks the (R, V) matrix five times and keeps it twice; this keeps p, and multiplies once."""

    @staticmethod
    def forward(h: Tensor, E: Tensor, max_bytes: int) -> tuple[Tensor, Tensor]:
        rows = list(parts(len(h), len(E) * E.element_size(), max_bytes))
        logits = h[rows[0]] @ E.T
        log_normalizer = logits.logsumexp(-1)
        if len(rows) == 1:
            return log_normalizer, logits.sub_(log_normalizer.unsqueeze(1)).exp_()
        others = [(h[part] @ E.T).logsumexp(-1) for part in rows[1:]]
        return torch.cat([log_normalizer, *others]), logits.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        h, E, ctx.max_bytes = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, E, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        h, E, p = ctx.saved_tensors
        if gradient is None:
            return None, None, None
        with _without_autocast(h):  # some call backward inside it
            if len(p) and not torch.is_grad_enabled():
                return (p @ E).mul_(gradient.unsqueeze(1)), None, None
            rows = parts(len(h), len(E) * E.element_size(), ctx.max_bytes)
            return torch.cat([(h[r] @ E.T).softmax(-1) @ E * gradient[r].unsqueeze(1) for r in rows]), None, None


def plpp(
    context: Tensor,
    hidden: Tensor,
    E: Tensor,
    *,
    top_k: int,
    temperature: float,
    max_bytes: int,
    E_inverse_norm: Tensor | None = None,
    search: Callable[..., tuple[Tensor, Tensor]] = search_all,
    normalize_over: str = "vocabulary",
    detach_label: bool = True,
    with_nll: bool = True,
) -> PLPPRows:
    """Both losses and the hard-label negative log-likelihood of every context vector.

    Args:
        context: v, (1 or P, M, D). One that P prompts share is looked up once.
        hidden: h, (1 or P, M, D).
        E: the vocabulary (V, D).
        top_k: K. K = 1 is the hard label, with which q is 1 and the inverted loss exactly 0.
        temperature: of the label's softmax.
        max_bytes: bound on each matrix that has a row for each vector and a column for each word.
        E_inverse_norm: (V,), where it is known.
        search: finds cosines and ids; same arguments and answer as :func:`search_all`.
        normalize_over: one of :data:`NORMALIZE_OVER`.
        detach_label: no gradient through the label's side of either loss: q in the perplexity loss, p in the inverted one.
        with_nll: False gives None where the likelihood over V would cost extra.

    Returns:
        :class:`PLPPRows` of (P * M,), by prompt, then position. Differentiable twice.
    """
    dtype = compute_dtype(context, hidden, E)
    with _without_autocast(context):
        v, h, E = context.to(dtype), hidden.to(dtype), E.to(dtype)
        if E_inverse_norm is None or E_inverse_norm.dtype != dtype:
            E_inverse_norm = inverse_norm(E)
        contexts, m = v.shape[:2]
        rows = v.flatten(0, 1)
        cosines, ids = search(rows.detach(), E, E_inverse_norm, top_k, max_bytes)
        cosines = with_gradient(cosines, rows, E, E_inverse_norm, ids, max_bytes).view(contexts, m, -1)
        log_q = (cosines / temperature).log_softmax(-1)  # (1 or P, M, K)

        h = h.expand(max(contexts, len(h)), -1, -1)
        if contexts == len(h):
            logits = word_products(h.flatten(0, 1).unsqueeze(1), E, ids, max_bytes).view(contexts, m, -1)
        else:
            logits = word_products(h.transpose(0, 1), E, ids, max_bytes).transpose(0, 1)  # (P, M, K)
        if normalize_over == "vocabulary":
            log_p = logits - vocabulary_log_normalizer(h.flatten(0, 1), E, max_bytes).view(*h.shape[:2], 1)
            hard_nll = -log_p[..., 0].detach()
        else:
            log_p = logits.log_softmax(-1)
            hard_nll = None
            if with_nll:  # reported over V whatever the loss is normalised over
                with torch.no_grad():
                    over_all = vocabulary_log_normalizer(h.detach().flatten(0, 1), E, max_bytes)
                    hard_nll = over_all.view(h.shape[:2]) - logits[..., 0]
        direct = perplexity_loss(log_q.detach() if detach_label else log_q, log_p)
        inverse = inverted_perplexity_loss(log_q, log_p.detach() if detach_label else log_p)
        return PLPPRows(direct.flatten(), inverse.flatten(), None if hard_nll is None else hard_nll.flatten())
