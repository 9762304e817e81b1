r"""Every equation of PLPP, as pure functions of tensors.

Letters (used in every docstring of the package)::

    B images   C classes   P prompts   M context vectors   T tokens
    D text width   V vocabulary   K top-k   R = P * M rows

    E   (V, D)     the frozen token embedding; also the weight of the training-free LM head
    v   (R, D)     learnable context vectors, in token-embedding space
    h   (R, D)     the text tower's ln_final output at the position before each of them
    I   (R, K)     ids of the K words nearest to each v by cosine
    q   (R, K)     the label, softmax(cos(E_I, v) / temperature)
    p   (R, K)     the LM head's probability of those words, softmax(E h) over V or over I

The equations follow "Prompt Learning with PerPlexity" (arXiv 2412.15277); what its public text leaves open is listed as
OUR CHOICE in docs/method.md. All logarithms are natural (units: nats). Whatever comes in, the arithmetic is float32 at least
(float64 stays float64), also under autocast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LABELS = ("soft", "hard")
NORMALIZE_OVER = ("vocabulary", "topk")


class PLPPRows(NamedTuple):
    """One value a context vector, shape ``(R,)`` each, in nats."""

    perplexity_loss: Tensor
    inverse_loss: Tensor
    hard_nll: Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any argument is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Arithmetic in the tensors' own types, whatever stands around it; "meta", where nothing is computed, has no autocast."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def inverse_norm(E: Tensor) -> Tensor:
    """``1 / |E_i|`` for each row, (V, D) -> (V,). A zero row gets a large finite number, hence cosine 0 with everything."""
    return E.norm(dim=-1).clamp_min(torch.finfo(E.dtype).eps).reciprocal()


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


def search_all(v: Tensor, E: Tensor, E_inverse_norm: Tensor | None, k: int, chunk_size: int) -> Tensor:
    """Ids I (R, k) of :func:`nearest_words`, ``chunk_size`` rows at a time."""
    return torch.cat([nearest_words(part, E, k, E_inverse_norm)[1] for part in v.split(chunk_size)])


def word_products(x: Tensor, E: Tensor, ids: Tensor) -> Tensor:
    """``E_I x``, each row with its own words: x (R, D), E (V, D), ids (R, K) -> (R, K). Differentiable in x.

    >>> word_products(torch.tensor([[0.0, 4.0, 3.0]]), torch.eye(3), torch.tensor([[2, 1]]))
    tensor([[3., 4.]])
    """
    return _WordProducts.apply(x, E, ids)


class _WordProducts(torch.autograd.Function):
    """On a CPU neither direction makes the words' vectors (R, K, D), which would take four times as long and be kept.

    A product's bits do not depend on the word's place in ``ids``: it is a sum of its own, on any device.
    """

    @staticmethod
    def forward(ctx, x: Tensor, E: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(E, ids)
        if not x.is_cpu:
            return F.embedding(ids, E).mul_(x.unsqueeze(1)).sum(-1)
        rows, k = ids.shape
        columns, order = ids.sort(dim=1)
        starts = torch.arange(0, rows * k + 1, k, dtype=ids.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            places = torch.sparse_csr_tensor(
                starts, columns.flatten(), x.new_zeros(rows * k), (rows, len(E)), check_invariants=False
            )
        products = torch.sparse.sampled_addmm(places, x, E.T, beta=0.0).values().view(rows, k)
        return torch.empty_like(products).scatter_(1, order, products)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        E, ids = ctx.saved_tensors
        return F.embedding_bag(ids, E, per_sample_weights=gradient.contiguous(), mode="sum"), None, None


def label_log_probabilities(
    v: Tensor, E: Tensor, ids: Tensor, temperature: float, E_inverse_norm: Tensor | None = None
) -> Tensor:
    """``log q = log_softmax(cos(E_I, v) / temperature)``: v (R, D), E (V, D), ids (R, K) -> (R, K). Differentiable in v.

    >>> v, ids = torch.tensor([[0.0, 4.0, 3.0]]), torch.tensor([[1, 2]])
    >>> label_log_probabilities(v, torch.eye(3), ids, temperature=0.1).exp()
    tensor([[0.8808, 0.1192]])
    """
    norms = inverse_norm(F.embedding(ids, E)) if E_inverse_norm is None else E_inverse_norm[ids]
    return (word_products(F.normalize(v, dim=-1), E, ids) * norms / temperature).log_softmax(-1)


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


class _VocabularyLogNormalizer(torch.autograd.Function):
    """``log sum_V exp(E h)``: h (R, D), E (V, D) -> (R,), with E constant.

    Autograd's own graph of it walks the (R, V) matrix five times and keeps it twice; this keeps p and multiplies once.
    """

    @staticmethod
    def forward(ctx, h: Tensor, E: Tensor) -> Tensor:
        logits = h @ E.T
        log_normalizer = logits.logsumexp(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits.sub_(log_normalizer.unsqueeze(1)).exp_(), E)
        return log_normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        p, E = ctx.saved_tensors
        with _without_autocast(p):  # some call backward inside it
            return (p @ E).mul_(gradient.unsqueeze(1)), None


def plpp_rows(
    v: Tensor,
    h: Tensor,
    E: Tensor,
    ids: Tensor,
    *,
    temperature: float,
    normalize_over: str = "vocabulary",
    detach_label: bool = True,
    with_nll: bool = True,
    E_inverse_norm: Tensor | None = None,
) -> PLPPRows:
    """Both losses and the hard-label negative log-likelihood of each row: v, h (R, D), E (V, D), ids (R, K) -> 3 x (R,).

    ``ids`` are the label's words, nearest first (:func:`nearest_words`); K = 1 is the hard label, with which q is 1 and the
    inverted loss exactly 0. ``detach_label``: no gradient through the label's side of either loss: q in the perplexity
    loss, p in the inverted one. ``with_nll=False`` gives nan where the likelihood over V would cost extra.
    """
    logits_I = word_products(h, E, ids)
    if normalize_over == "vocabulary":
        log_p = logits_I - _VocabularyLogNormalizer.apply(h, E).unsqueeze(1)
        hard_nll = -log_p[:, 0].detach()
    else:
        log_p = logits_I.log_softmax(-1)
        hard_nll = v.new_full((len(v),), torch.nan)
        if with_nll:  # reported over V whatever the loss is normalised over
            with torch.no_grad():
                hard_nll = _VocabularyLogNormalizer.apply(h, E) - logits_I[:, 0]
    log_q = label_log_probabilities(v, E, ids, temperature, E_inverse_norm)
    direct = perplexity_loss(log_q.detach() if detach_label else log_q, log_p)
    inverse = inverted_perplexity_loss(log_q, log_p.detach() if detach_label else log_p)
    return PLPPRows(direct, inverse, hard_nll)


def plpp(
    context: Tensor,
    hidden: Tensor,
    E: Tensor,
    *,
    top_k: int,
    chunk_size: int,
    E_inverse_norm: Tensor | None = None,
    search: Callable[..., Tensor] = search_all,
    normalize_over: str = "vocabulary",
    **settings,
) -> PLPPRows:
    """:func:`plpp_rows` of every context vector: context (1 or P, M, D), hidden (1 or P, M, D) -> 3 x (P * M,).

    At most ``chunk_size`` rows meet E at a time, so no (rows, V) matrix is larger than that. Where the loss needs such
    matrices, what a chunk made is dropped after its forward pass and computed again in backward. A context that is shared by P
    prompts is looked up once, by ``search`` (same arguments and answer as :func:`search_all`).
    """
    dtype = compute_dtype(context, hidden, E)
    with _without_autocast(context):
        v, h, E = context.to(dtype), hidden.to(dtype), E.to(dtype)
        ids = search(v.detach().flatten(0, 1), E, E_inverse_norm, top_k, chunk_size).view(*v.shape[:2], top_k)
        prompts = max(len(v), len(h))
        v, h, ids = (t.expand(prompts, -1, -1).flatten(0, 1) for t in (v, h, ids))
        of_rows = partial(plpp_rows, normalize_over=normalize_over, E_inverse_norm=E_inverse_norm, **settings)
        if len(v) <= chunk_size:
            return of_rows(v, h, E, ids)
        if normalize_over == "vocabulary":
            of_rows = partial(checkpoint, of_rows, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(v.split(chunk_size), h.split(chunk_size), ids.split(chunk_size), strict=True)
        parts = [of_rows(vi, hi, E, i) for vi, hi, i in chunks]
        return PLPPRows(*(torch.cat(column) for column in zip(*parts, strict=True)))
