"""The equations: a literal transcription, values known by hand, limits, stop-gradients, memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plpp_reg.loss import functional as PF

from helpers import literal

V, D, M, P = 13, 6, 3, 4
LN2, LN3 = math.log(2), math.log(3)


def problem(context_prompts=1, hidden_prompts=1, *, vocabulary=V, m=M, dtype=torch.float64, seed=0):
    """context, hidden (leaves) and E, whose rows are longer and shorter than 1, as CLIP's are."""
    g = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, generator=g, dtype=torch.float64)
    E = make(vocabulary, D) * (0.1 + torch.rand(vocabulary, 1, generator=g, dtype=torch.float64))
    context, hidden = make(context_prompts, m, D) * 0.3, make(hidden_prompts, m, D) * 0.7
    return context.to(dtype).requires_grad_(), hidden.to(dtype).requires_grad_(), E.to(dtype)


def plpp(context, hidden, E, **changed):
    """``at_once``: rows that may meet the vocabulary together."""
    settings = dict(top_k=4, temperature=0.3) | changed
    max_bytes = settings.pop("at_once", 100) * len(E) * E.element_size()
    return PF.plpp(context, hidden, E, max_bytes=max_bytes, **settings)


@pytest.mark.parametrize("sharing", [(1, 1), (1, P), (P, P), (P, 1)], ids=lambda s: f"context{s[0]}-hidden{s[1]}")
@pytest.mark.parametrize("detach_label", [True, False])
@pytest.mark.parametrize(
    ("label", "normalize_over"), [("soft", "vocabulary"), ("soft", "topk"), ("hard", "vocabulary"), ("hard", "topk")]
)
@pytest.mark.parametrize("at_once", [100, 2], ids=["whole", "chunked"])
def test_equals_the_literal_loops_forward_and_backward(label, normalize_over, detach_label, sharing, at_once):
    context, hidden, E = problem(*sharing)
    settings = dict(temperature=0.3, normalize_over=normalize_over, detach_label=detach_label)
    rows = plpp(context, hidden, E, top_k=1 if label == "hard" else 4, at_once=at_once, **settings)
    # unequal weights: with equal ones, direct and inverse exchanged would give the same total
    ours = 0.7 * rows.perplexity_loss.mean() + 0.2 * rows.inverse_loss.mean()
    theirs = literal.plpp(context, hidden, E, weight=0.7, inverse_weight=0.2, top_k=4, label=label, **settings)
    for got, want in zip(
        (ours, rows.perplexity_loss.mean(), rows.inverse_loss.mean(), PF.perplexity(rows.hard_nll)), theirs, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss, (context, hidden), materialize_grads=True) for loss in (ours, theirs.total)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_rows_are_in_order_of_prompt_then_position():
    context, hidden, E = problem(P, P)
    rows = plpp(context, hidden, E)
    for p in range(P):
        for m in range(M):
            one = plpp(context[p : p + 1, m : m + 1], hidden[p : p + 1, m : m + 1], E)
            for whole, single in zip(rows, one, strict=True):
                torch.testing.assert_close(whole[p * M + m], single[0])


class TestByHand:
    """E = identity, so that cosines and logits are v's and h's own numbers.

    v = (3, 4, 0) / 5 -> cosines .6, .8, 0: words 1, 0 at K = 2; temperature .2 -> q = softmax(4, 3).
    h = (ln 2, ln 3, 0) -> p = 2/6, 3/6, 1/6.
    """

    E = torch.eye(3, dtype=torch.float64)
    v = torch.tensor([[[3.0, 4.0, 0.0]]], dtype=torch.float64) * 7  # a cosine knows no length
    h = torch.tensor([[[LN2, LN3, 0.0]]], dtype=torch.float64)
    q = (1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1)))

    def test_nearest_words(self):
        cosines, ids = PF.nearest_words(self.v[0], self.E, 3)
        assert ids.tolist() == [[1, 0, 2]]
        torch.testing.assert_close(cosines, torch.tensor([[0.8, 0.6, 0.0]], dtype=torch.float64))

    def test_over_the_vocabulary(self):
        rows = plpp(self.v, self.h, self.E, top_k=2, temperature=0.2)
        assert rows.perplexity_loss.item() == pytest.approx(self.q[0] * math.log(2) + self.q[1] * math.log(3))
        assert rows.inverse_loss.item() == pytest.approx(-math.log(self.q[0]) / 2 - math.log(self.q[1]) / 3)
        assert PF.perplexity(rows.hard_nll).item() == pytest.approx(2)

    def test_over_the_label_words(self):  # p = 3/5, 2/5; the reported likelihood stays over V
        rows = plpp(self.v, self.h, self.E, top_k=2, temperature=0.2, normalize_over="topk")
        assert rows.perplexity_loss.item() == pytest.approx(-self.q[0] * math.log(0.6) - self.q[1] * math.log(0.4))
        assert rows.inverse_loss.item() == pytest.approx(-0.6 * math.log(self.q[0]) - 0.4 * math.log(self.q[1]))
        assert PF.perplexity(rows.hard_nll).item() == pytest.approx(2)


def test_uniform_prediction_over_v_has_perplexity_v():
    context, hidden, E = problem(P, P)
    rows = plpp(context, torch.zeros_like(hidden), E)  # h = 0: all logits are equal
    assert PF.perplexity(rows.hard_nll).item() == pytest.approx(V)
    torch.testing.assert_close(rows.perplexity_loss, torch.full_like(rows.perplexity_loss, math.log(V)))
    over_k = plpp(context, torch.zeros_like(hidden), E, normalize_over="topk").perplexity_loss
    torch.testing.assert_close(over_k, torch.full_like(over_k, math.log(4)))


def test_perplexity_is_the_exponential_of_the_mean_not_the_mean_of_exponentials():
    assert PF.perplexity(torch.tensor([2.0, 8.0]).log()).item() == pytest.approx(4)


def test_one_word_vocabulary_is_predicted_surely():
    context, hidden, E = problem(vocabulary=1)
    rows = plpp(context, hidden, E, top_k=1)
    assert rows.inverse_loss.abs().max() == 0
    # two products of h and the word, which not every BLAS adds up in one order
    assert max(rows.perplexity_loss.abs().max(), rows.hard_nll.abs().max()) < 1e-14


@pytest.mark.parametrize("normalize_over", PF.NORMALIZE_OVER)
def test_hard_label_has_no_inverse_loss(normalize_over):
    context, hidden, E = problem(P, P)
    inverse = plpp(context, hidden, E, top_k=1, normalize_over=normalize_over).inverse_loss
    assert inverse.abs().max() == 0
    assert torch.autograd.grad(inverse.sum(), context)[0].abs().max() < 1e-15


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_word_is_nearest_to_itself(scale):
    E = problem()[2]
    cosines, ids = PF.nearest_words(E * scale, E / scale, 2)  # a cosine knows no length
    assert ids[:, 0].tolist() == list(range(V))
    torch.testing.assert_close(cosines[:, 0], torch.ones(V, dtype=E.dtype))
    assert (cosines[:, 1] < 1).all()


def test_zero_rows_stay_finite():
    context, hidden, E = problem()
    E[3] = 0
    with torch.no_grad():
        context[0, 1] = 0
    rows = plpp(context, hidden, E, top_k=V)
    torch.stack([rows.perplexity_loss, rows.inverse_loss]).sum().backward()
    assert all(t.isfinite().all() for t in (*rows, context.grad, hidden.grad))
    cosines, ids = PF.nearest_words(hidden.detach()[0], E, V)
    assert (cosines[ids == 3] == 0).all()  # a zero word is neither near nor far


def test_low_temperature_approaches_the_hard_label():
    context, hidden, E = problem(P, P)
    hard = plpp(context, hidden, E, top_k=1).perplexity_loss
    gap = [(plpp(context, hidden, E, temperature=t).perplexity_loss - hard).abs().max().item() for t in (1, 0.1, 1e-4)]
    assert gap[0] > gap[1] > gap[2] and gap[2] < 1e-6 < 0.1 < gap[0]


def test_high_temperature_approaches_equal_weights():
    context, hidden, E = problem()
    ids = PF.nearest_words(context[0], E, 4)[1]
    log_p = (hidden[0] @ E.T).log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(plpp(context, hidden, E, temperature=1e9).perplexity_loss, -log_p.mean(1))


@pytest.mark.parametrize("normalize_over", PF.NORMALIZE_OVER)
@pytest.mark.parametrize("at_once", [100, 2])
def test_the_label_side_has_exactly_no_gradient(normalize_over, at_once):
    context, hidden, E = problem(P, P)
    for detach_label in (True, False):
        rows = plpp(context, hidden, E, normalize_over=normalize_over, detach_label=detach_label, at_once=at_once)
        sides = [(rows.perplexity_loss, hidden, context), (rows.inverse_loss, context, hidden)]
        for loss, prediction, label in sides:
            grads = torch.autograd.grad(loss.sum(), (prediction, label), materialize_grads=True, retain_graph=True)
            assert (grads[0].abs().amax(-1) > 1e-6).all()  # every row of the learning side, always
            if detach_label:
                assert not grads[1].any()
            else:
                assert (grads[1].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("normalize_over", PF.NORMALIZE_OVER)
@pytest.mark.parametrize("at_once", [100, 3], ids=["whole", "chunked"])
def test_gradcheck(normalize_over, at_once):
    # detach_label False: a numerical gradient knows no stop-gradient. The ids stay put: no near tie at eps 1e-6.
    context, hidden, E = problem(1, 2)

    def losses(v, h):
        return plpp(v, h, E, normalize_over=normalize_over, detach_label=False, at_once=at_once)[:2]

    assert torch.autograd.gradcheck(losses, (context, hidden))


@pytest.mark.parametrize("sharing", [(1, 1), (1, 2), (2, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("normalize_over", PF.NORMALIZE_OVER)
@pytest.mark.parametrize("at_once", [100, 2], ids=["whole", "chunked"])
def test_gradgradcheck(normalize_over, at_once, sharing):
    context, hidden, E = problem(*sharing, m=2)

    def losses(v, h):
        rows = plpp(v, h, E, normalize_over=normalize_over, detach_label=False, at_once=at_once)
        return 0.7 * rows.perplexity_loss.sum() + 0.2 * rows.inverse_loss.square().sum()

    assert torch.autograd.gradgradcheck(losses, (context, hidden))


@pytest.mark.parametrize("detach_label", [True, False])
@pytest.mark.parametrize("normalize_over", PF.NORMALIZE_OVER)
def test_a_gradient_penalty_is_that_of_the_literal_loops(normalize_over, detach_label):
    context, hidden, E = problem(1, 2, m=2)
    settings = dict(temperature=0.3, normalize_over=normalize_over, detach_label=detach_label)
    rows = plpp(context, hidden, E, **settings)
    ours = 0.7 * rows.perplexity_loss.mean() + 0.2 * rows.inverse_loss.mean()
    theirs = literal.plpp(context, hidden, E, weight=0.7, inverse_weight=0.2, top_k=4, label="soft", **settings).total
    found = []
    for loss in (ours, theirs):
        gradient = torch.autograd.grad(loss, (context, hidden), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradient), (context, hidden)))
    for got, want in zip(*found, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("normalize_over", PF.NORMALIZE_OVER)
@pytest.mark.parametrize("at_once", [1, 5, 11, 12])
def test_what_meets_the_vocabulary_at_once_changes_nothing(normalize_over, at_once):
    context, hidden, E = problem(1, P)
    results = []
    for size in (P * M, at_once):
        rows = plpp(context, hidden, E, normalize_over=normalize_over, at_once=size)
        total = (rows.perplexity_loss * torch.arange(1, P * M + 1)).sum() + rows.inverse_loss.square().sum()
        results.append((*rows, *torch.autograd.grad(total, (context, hidden))))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)


class Shapes(TorchDispatchMode):
    """Shapes of every tensor that any operation returns, backward included."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("normalize_over", PF.NORMALIZE_OVER)
def test_no_more_than_chunk_rows_meet_the_vocabulary(normalize_over):
    vocabulary, at_once, m = 101, 4, 5
    context, hidden, E = problem(7, 7, vocabulary=vocabulary, m=m)
    rows_of = {}
    for size in (at_once, 7 * m):
        with Shapes() as shapes:
            rows = plpp(context, hidden, E, normalize_over=normalize_over, at_once=size)
            (rows.perplexity_loss.sum() + rows.inverse_loss.sum()).backward()
        wide = [s for s in shapes.seen if vocabulary in s and s not in ((vocabulary, D), (D, vocabulary))]
        rows_of[size] = max(math.prod(s) // vocabulary for s in wide)
    assert rows_of == {at_once: at_once, 7 * m: 7 * m}  # the second proves that the mode would see it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_float32_at_least_whatever_comes_in(dtype):
    context, hidden, E = problem(dtype=dtype)
    want_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rows = plpp(context, hidden, E)
    exact = plpp(*(t.detach().to(want_dtype) for t in (context, hidden, E)))
    for got, want in zip(rows, exact, strict=True):
        assert got.dtype == want_dtype and got.equal(want)
    rows.perplexity_loss.sum().backward()
    assert hidden.grad.dtype == dtype and hidden.grad.any()


@pytest.mark.parametrize("at_once", [100, 2], ids=["whole", "chunked"])
def test_autocast_changes_nothing(at_once):
    context, hidden, E = problem(1, P, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rows = plpp(context, hidden, E, at_once=at_once)
            loss = rows.perplexity_loss.mean() + rows.inverse_loss.mean()
            inside = torch.autograd.grad(loss, (context, hidden), retain_graph=True)  # as some do
        # backward outside, as most do; with chunks it computes forward again and must not fall into autocast's dtype
        results.append((*rows, *inside, *torch.autograd.grad(loss, (context, hidden))))
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(*results, strict=True))


def test_large_logits_do_not_overflow():
    context, hidden, E = problem(dtype=torch.float32)
    rows = plpp(context, hidden.detach() * 1e4, E)
    assert all(t.isfinite().all() for t in rows)
    assert rows.perplexity_loss.max() > 100  # float32's exp overflows from 88.7 on: the test reached that far


@pytest.mark.parametrize("max_bytes", [2**20, 3 * 8 * 200])
def test_few_words_looked_up_and_many_among_all_are_the_same(max_bytes, monkeypatch):
    torch.manual_seed(1)
    E, h = torch.randn(200, 16).double(), torch.randn(7, 1, 16, dtype=torch.double, requires_grad=True)
    ids = torch.stack([torch.randperm(200)[:40] for _ in range(7)])
    weights = torch.randn(7, 40).double()
    found = []
    for many in (0, 1000):  # never, always
        monkeypatch.setattr(PF, "MANY", many)
        products = PF.word_products(h, E, ids, max_bytes)
        (first,) = torch.autograd.grad((products.squeeze(1).sin() * weights).sum(), h, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), h)
        found.append((products, first, second, PF.weighted_words(weights, E, ids, max_bytes)))
    for looked_up, among_all in zip(*found, strict=True):
        torch.testing.assert_close(looked_up, among_all)
    assert second.abs().max() > 1e-3
