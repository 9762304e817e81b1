"""PerplexityRegularizer: where the gradient goes, off, wiring, bad input."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import nn

from plpp_reg import Components, PerplexityRegularizer
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import settings_defaults

from helpers import literal
from helpers.vectors import D, M, P, V, embedding, states

NAMES = ["cat", "tiger cat", "golden retriever"]


# ------------------------------------------------------------------ the gradient reaches the context and nothing else


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_gradient_reaches_every_context_vector_and_nothing_of_clip(tiny_vit, class_specific, position):
    learner = PromptLearner(tiny_vit, NAMES, n_ctx=M, class_specific=class_specific, position=position)
    tower, reg = TextTower(tiny_vit), PerplexityRegularizer(tiny_vit.token_embedding.weight)
    reg(learner.ctx, learner(tower).hidden).backward()
    assert learner.ctx.grad.isfinite().all()
    assert (learner.ctx.grad.flatten(0, -2).abs().amax(-1) > 0).all()
    assert [n for n, p in tiny_vit.named_parameters() if p.grad is not None or p.requires_grad] == []


def test_each_loss_alone_reaches_the_context_through_its_own_way(tiny_vit):
    # end position: h_m has seen v_1..v_{m-1}, so through h the last vector learns nothing; L_inv reaches v directly
    learner, tower = PromptLearner(tiny_vit, NAMES, n_ctx=M), TextTower(tiny_vit)
    moved = {}
    for name, weights in {"direct": (1.0, 0.0), "inverse": (0.0, 1.0)}.items():
        reg = PerplexityRegularizer(tiny_vit.token_embedding.weight, *weights)
        (grad,) = torch.autograd.grad(reg(learner.ctx, learner(tower).hidden), learner.ctx)
        moved[name] = grad.abs().amax(-1).gt(0).tolist()
    assert moved == {"direct": [True] * (M - 1) + [False], "inverse": [True] * M}


@pytest.mark.parametrize(
    "settings", [{}, {"detach_label": False}, {"memory_mib": 2 * V * 4 / 2**20}, {"candidates": range(12)}]
)
def test_an_embedding_that_is_not_frozen_gets_no_gradient(settings):
    table, (context, hidden) = embedding(), states(P, P)
    PerplexityRegularizer(table.weight, **settings)(context, hidden).backward()
    assert table.weight.requires_grad and table.weight.grad is None
    assert context.grad.any() and hidden.grad.any()


# ------------------------------------------------------------------ off is exactly off


@pytest.mark.parametrize("position", ["end", "front"])
def test_off_is_bit_identical(tiny_vit, position):
    def train(reg: PerplexityRegularizer | None):
        torch.manual_seed(3)
        learner, tower = PromptLearner(tiny_vit, NAMES, n_ctx=M, position=position), TextTower(tiny_vit)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
        trace = []
        for _ in range(3):
            images = torch.randn(4, 32)  # takes from the random stream, as a data loader does
            out = learner(tower)
            loss = nn.functional.cross_entropy(images @ out.features.T, torch.tensor([0, 1, 2, 0]))
            if reg is not None:
                loss = loss + reg(learner.ctx, out.hidden)
            optimizer.zero_grad()
            loss.backward()
            trace += [loss.detach(), learner.ctx.grad.clone()]
            optimizer.step()
        return [*trace, learner.ctx.detach(), torch.random.get_rng_state()]

    make = partial(PerplexityRegularizer, tiny_vit.token_embedding.weight)
    plain, off, on = train(None), train(make(weight=0, inverse_weight=0)), train(make())
    assert all(a.equal(b) for a, b in zip(plain, off, strict=True))
    assert not plain[0].equal(on[0]) and not plain[-2].equal(on[-2]) and plain[-1].equal(on[-1])


def test_off_needs_no_pass_over_the_vocabulary(monkeypatch):
    reg = PerplexityRegularizer(embedding().weight, weight=0, inverse_weight=0)
    (context, hidden) = states(P, P)
    monkeypatch.setattr("plpp_reg.loss.functional.plpp", lambda *_, **__: pytest.fail("computed"))
    value = reg(context, hidden)
    assert value.item() == 0 and value.shape == () and not value.requires_grad


def test_a_weight_of_zero_takes_its_term_out_of_the_graph():
    table, (context, hidden) = embedding(), states(P, P)
    total = PerplexityRegularizer(table.weight, weight=1, inverse_weight=0)(context, hidden)
    assert torch.autograd.grad(total, (context, hidden), allow_unused=True, retain_graph=True)[0] is None
    total = PerplexityRegularizer(table.weight, weight=0, inverse_weight=1)(context, hidden)
    assert torch.autograd.grad(total, (context, hidden), allow_unused=True)[1] is None


# ------------------------------------------------------------------ wiring


@pytest.mark.parametrize("sharing", [(1, 1), (1, P), (P, P), (P, 1), (0, 0), (0, P), (P, 0)], ids=str)
@pytest.mark.parametrize("detach_label", [True, False])
@pytest.mark.parametrize(("label", "normalize_over"), [("soft", "vocabulary"), ("soft", "topk"), ("hard", "vocabulary")])
def test_components_equal_the_literal_loops(label, normalize_over, detach_label, sharing):
    settings = dict(weight=0.7, inverse_weight=0.2, top_k=4, temperature=0.3)  # unequal: a mix-up shows
    settings |= dict(label=label, normalize_over=normalize_over, detach_label=detach_label)
    table, (context, hidden) = embedding(torch.float64), states(*sharing, dtype=torch.float64)
    reg = PerplexityRegularizer(table.weight, memory_mib=5 * V * 8 / 2**20, **settings)
    ours = reg.components(context, hidden)
    v, h = (t if t.dim() == 3 else t.unsqueeze(0) for t in (context, hidden))
    theirs = literal.plpp(v, h, table.weight.detach(), **settings)
    assert ours._fields == theirs._fields and isinstance(ours, Components)
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == ()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert reg(context, hidden).equal(ours.total) and not ours.perplexity.requires_grad
    grads = [torch.autograd.grad(t, (context, hidden)) for t in (ours.total, theirs.total)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_result_is_float32_in_any_precision(dtype, autocast):
    table, (context, hidden) = embedding(dtype), states(P, P, dtype=dtype)
    reg = PerplexityRegularizer(table.weight)
    exact = PerplexityRegularizer(table.weight.detach().float())(context.detach().float(), hidden.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = reg(context, hidden)
    assert got.dtype == torch.float32 and got.equal(exact)
    got.backward()
    assert context.grad.dtype == dtype and context.grad.isfinite().all()


def test_defaults_are_those_of_the_signature():
    expected = dict(weight=0.1, inverse_weight=0.1, top_k=10, temperature=0.1, label="soft")
    expected |= dict(normalize_over="topk", detach_label=True, memory_mib=64.0)
    assert settings_defaults() == expected
    given = inspect.signature(PerplexityRegularizer).parameters
    assert set(given) - set(expected) == {"embedding", "candidates"}
    reg = PerplexityRegularizer(embedding().weight)
    assert {name: getattr(reg, name) for name in expected} == expected
    assert all(f"{name}=" in repr(reg) for name in expected if name != "memory_mib") and f"V={V}" in repr(reg)


# ------------------------------------------------------------------ bad input

WEIGHT = torch.zeros(V, D)
BAD_SETTINGS = [
    ("embedding", dict(embedding=torch.zeros(V))),
    ("embedding", dict(embedding=torch.zeros(V, D, dtype=torch.long))),
    ("embedding", dict(embedding=[[0.0]])),
    *[(n, {n: bad}) for n in ("weight", "inverse_weight") for bad in (-0.1, float("nan"), float("inf"), "1", None, True)],
    *[("temperature", dict(temperature=bad)) for bad in (0, -1.0, float("nan"), float("inf"), "0.1", True)],
    *[("top_k", dict(top_k=bad)) for bad in (0, -1, V + 1, 2.0, "3", True)],
    ("top_k", dict(top_k=6, candidates=range(5))),
    *[("memory_mib", dict(memory_mib=bad)) for bad in (0, -1, float("inf"), "64", None)],
    *[("label", dict(label=bad)) for bad in ("Soft", "", None, 1, ["soft"])],
    *[("normalize_over", dict(normalize_over=bad)) for bad in ("vocab", None)],
    ("normalize_over", dict(normalize_over="topk", label="hard")),
    ("normalize_over", dict(normalize_over="topk", top_k=1)),
    *[("detach_label", dict(detach_label=bad)) for bad in (1, None, "yes")],
    *[("candidates", dict(candidates=bad)) for bad in ([], [[1, 2]], [-1], [0, V], [0.5], 3)],
    ("candidates", dict(candidates=torch.ones(V, dtype=torch.bool))),  # a mask is not a list of ids
    *[("candidates", dict(candidates=bad)) for bad in ("cat", ["cat"], [[1, 2], [3]])],
]


@pytest.mark.parametrize(("name", "settings"), BAD_SETTINGS, ids=lambda x: str(x)[:50] if isinstance(x, dict) else x)
def test_a_bad_setting_is_named(name, settings):
    with pytest.raises(InputError, match=rf"^{name}: expected .*, got ") as raised:
        PerplexityRegularizer(**({"embedding": WEIGHT} | settings))
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("weights", [(0.1, 0.1), (0, 0)], ids=["on", "off"])
@pytest.mark.parametrize(
    ("name", "context", "hidden"),
    [
        ("context", torch.ones(D), torch.ones(M, D)),
        ("context", torch.ones(1, 1, M, D), torch.ones(M, D)),
        ("context", torch.ones(M, D + 1), torch.ones(M, D)),
        ("context", torch.ones(M, D, dtype=torch.long), torch.ones(M, D)),
        ("context", [[0.0] * D] * M, torch.ones(M, D)),
        ("context", torch.ones(0, D), torch.ones(0, D)),
        ("context", None, torch.ones(M, D)),
        ("hidden", torch.ones(M, D), torch.ones(M, D - 1)),
        ("hidden", torch.ones(M, D), torch.ones(M, D, dtype=torch.int32)),
        ("hidden", torch.ones(M, D), torch.ones(M + 1, D)),
        ("hidden", torch.ones(2, M, D), torch.ones(3, M, D)),
        ("hidden", torch.ones(1, M, D), torch.ones(P, M + 1, D)),
        ("hidden", torch.ones(M, D), None),
    ],
    ids=range(13),
)
def test_a_bad_tensor_is_named(name, context, hidden, weights):
    reg = PerplexityRegularizer(embedding().weight, *weights)
    for call in (reg, reg.components):
        with pytest.raises(InputError, match=rf"^{name}: expected .*, got "):
            call(context, hidden)
