r"""The losses of distillation without labels, as pure functions of logits: PromptKD's, KDPL's, FDBPL's.

Letters as in :mod:`plpp_reg.loss.functional`; ``z`` (B, C) are logits, scaled cosines of B images with C classes, and ``p =
softmax(z)``; superscript t is the teacher's, s the student's. All logarithms are natural (units: nats). Every function computes
in float32 at least (float64 stays float64), also under autocast. No gradient is stopped here: a teacher's logits have none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plpp_reg.errors import InputError
from plpp_reg.loss.functional import compute_dtype

CONFIDENCE_EPS = 1e-6  # within the logarithm, as FDBPL's code has it
MARGIN = 0.2  # of a difference of cosines


def _log_p(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits)).log_softmax(-1)


def kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """PromptKD's loss (arXiv 2403.02781), before its weight: z^s, z^t (B, C) -> a scalar, nats.

    ``T^2 / (B C) * sum_b sum_c p^t (log p^t - log p^s)`` with ``p = softmax(z / T)``. It is divided by B *times C*, as the
    published code divides it: a data set of more classes needs a larger weight.

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> kd(z, torch.tensor([[100.0, 0.0]]))  # log 2 of one image, over 2 classes
    tensor(0.3466)
    """
    log_s, log_t = _log_p(student / temperature), _log_p(teacher / temperature)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).mean()


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KDPL's loss of each image (arXiv 2407.03056): z^s, z^t (B, C) -> (B,), nats. KDPL's is its mean.

    ``1/2 KL(p^t || p^s) + 1/2 KL(p^s || p^t) = 1/2 sum_c (p^t - p^s)(log p^t - log p^s)``.

    >>> symmetric_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log())
    tensor([0.1373])
    """
    log_s, log_t = _log_p(student), _log_p(teacher)
    return 0.5 * ((log_t.exp() - log_s.exp()) * (log_t - log_s)).sum(-1)


def kept_classes(teacher: Tensor, k: int) -> Tensor:
    """KDPL's class-agnostic selection: the ids (k,), ascending, of the classes whose teacher probability, averaged over the
    batch, is largest: z^t (B, C) -> (k,). Student and teacher are then compared over these logits alone.

    >>> kept_classes(torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]]), 2)
    tensor([1, 2])

    Raises:
        InputError: there are not so many classes, or fewer than two are kept.
    """
    if not 2 <= k <= teacher.shape[-1]:
        raise InputError(f"k: expected 2 to {teacher.shape[-1]} of the classes, got {k}")
    return _log_p(teacher).exp().mean(0).topk(k).indices.sort().values


def confidence(teacher: Tensor) -> Tensor:
    """How sure a teacher is of each image (FDBPL, arXiv 2505.18053): z^t (B, C) -> u (B,), 1 for one class, 0 for a flat p.

    ``u = 1 + sum_c p^t log(p^t + 1e-6) / log C``: the published code's 1e-6 moves u by 1e-6 C / log C at most.

    Raises:
        InputError: of one class nothing is uncertain, and log C is 0.
    """
    classes = teacher.shape[-1]
    if classes < 2:
        raise InputError(f"classes: expected at least 2, of which a teacher can be more or less sure, got {classes}")
    p = _log_p(teacher).exp()
    return 1 + (p * (p + CONFIDENCE_EPS).log()).sum(-1) / math.log(classes)


def negative_entropy(logits: Tensor) -> Tensor:
    """``sum_c p log p`` of each image, (B, C) -> (B,), nats: least, ``-log C``, where the prediction is flat.

    >>> negative_entropy(torch.zeros(1, 2))
    tensor([-0.6931])
    """
    log_p = _log_p(logits)
    return (log_p.exp() * log_p).sum(-1)


def first_order_cosine(positive: Tensor, negative: Tensor) -> Tensor:
    """Of each image, the cosine of its two vectors of logits, z^+ and z^- (B, C) -> (B,): FDBPL's first-order term."""
    dtype = compute_dtype(positive, negative)
    return torch.cosine_similarity(positive.to(dtype), negative.to(dtype), dim=-1)


def margin(differences: Tensor, teacher: Tensor, least: float = MARGIN) -> Tensor:
    """A second-order term as FDBPL's text describes it, in our reading: a scalar, in cosines.

    With ``d_c = w_c^+ - w_c^-``, the class ``y_b`` that the teacher names for image b, u its :func:`confidence`::

        L = mean over pairs a < b with y_a != y_b of  u_a u_b relu(least - (f_a - f_b) . (d_{y_a} - d_{y_b}))

    Images of one class lie further along the difference of its prompts' differences than those of another. The product is
    ``M_aa - M_ab - M_ba + M_bb`` with ``M_ab = f_a . d_{y_b}``, one (B, B) matrix. The published code's own second-order term
    is identically 0 (docs/fidelity.md).

    Args:
        differences: (B, C), ``f . d_c``, the cosines with the positive class features less those with the negative ones.
        teacher: z^t (B, C).
        least: by how much.
    """
    u, y = confidence(teacher), teacher.argmax(-1)
    m = differences.to(compute_dtype(differences)).index_select(1, y)  # (B, B)
    own = m.diagonal()
    product = own.unsqueeze(1) - m - m.T + own.unsqueeze(0)
    # the sums over all ordered pairs: each pair twice in both
    pairs = (y.unsqueeze(1) != y.unsqueeze(0)).to(m.dtype)
    loss = pairs * (u.unsqueeze(1) * u.unsqueeze(0)) * (least - product).relu()
    return loss.sum() / pairs.sum().clamp_min(1)
