"""PerplexityRegularizer: wiring, off, the vocabulary it shares, bad input."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from plpp_reg import Components, PerplexityRegularizer
from plpp_reg.clip.prompts import PromptLearner, encode, tokenizer
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vocabulary import candidate_ids, nearest_words, whole_word_ids
from plpp_reg.errors import InputError
from plpp_reg.loss.regularizer import settings_defaults

from helpers import literal

V, D, M, P = 40, 8, 3, 4
NAMES = ["cat", "tiger cat", "golden retriever"]


def embedding(dtype=torch.float32, seed=0) -> nn.Embedding:
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, V)[:, None]
    return nn.Embedding.from_pretrained(table.to(dtype), freeze=False)


def states(*prompts: int, dtype=torch.float32, seed=1) -> list[torch.Tensor]:
    """A leaf (P, M, D) for each number of prompts; (M, D) for 0."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*((p,) if p else ()), M, D, generator=g).to(dtype).requires_grad_() for p in prompts]


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


# ------------------------------------------------------------------ the vocabulary


def test_candidates_are_a_smaller_vocabulary():
    table, (context, hidden) = embedding(), states(1, P)
    ids = [3, 30, 7, 7, 12, 25, 1]  # out of order, one twice
    part = PerplexityRegularizer(table.weight, candidates=ids, top_k=4)
    alone = PerplexityRegularizer(table.weight.detach()[sorted(set(ids))], top_k=4)
    whole = PerplexityRegularizer(table.weight, top_k=4)
    assert all(a.equal(b) for a, b in zip(part.components(context, hidden), alone.components(context, hidden), strict=True))
    assert not part(context, hidden).isclose(whole(context, hidden))
    as_tensor = PerplexityRegularizer(table.weight, candidates=torch.tensor(ids, dtype=torch.int32), top_k=4)
    assert as_tensor(context, hidden).equal(part(context, hidden))


def test_a_float32_embedding_is_shared_and_never_copied():
    table = embedding()
    reg = PerplexityRegularizer(table.weight)
    assert reg.vocabulary.data_ptr() == table.weight.data_ptr()
    for move in (reg.half, reg.double, reg.float, lambda: reg.to(torch.bfloat16), lambda: reg.to("cpu")):
        move()
        assert reg.vocabulary.dtype == torch.float32 == reg.inverse_norm.dtype
        assert reg.vocabulary.data_ptr() == table.weight.data_ptr()


def reload(table: nn.Embedding) -> None:
    table.load_state_dict(embedding(table.weight.dtype, seed=9).state_dict())


def overwrite(table: nn.Embedding) -> None:
    with torch.no_grad():
        table.weight.mul_(torch.linspace(-1, 3, V)[:, None])


CHANGES = {
    "reload": reload,
    "overwrite": overwrite,
    "half": nn.Module.half,
    "double": nn.Module.double,
    "bfloat16 and back": lambda table: table.bfloat16().float(),
    "new data": lambda table: setattr(table.weight, "data", embedding(seed=5).weight.data),
}


@pytest.mark.parametrize("candidates", [None, range(5, 35)], ids=["all", "candidates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_follows_the_embedding_when_it_changes(change, dtype, candidates):
    table, (context, hidden) = embedding(dtype), states(1, P)
    reg = PerplexityRegularizer(table.weight, candidates=candidates)
    before = reg(context, hidden)
    CHANGES[change](table)
    after = reg(context, hidden)
    assert after.equal(PerplexityRegularizer(table.weight, candidates=candidates)(context, hidden))
    if change in ("reload", "overwrite", "new data"):
        assert not after.isclose(before)


@pytest.mark.parametrize("candidates", [None, range(5, 35)], ids=["all", "candidates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_address_that_is_used_again_is_not_taken_for_the_same_weights(dtype, candidates):
    # ``model.half().float()``: the first storage is freed, and the allocator likes to give its address to the second
    table, (context, hidden) = embedding(dtype), states(1, P)
    reg = PerplexityRegularizer(table.weight, candidates=candidates)
    for seed in range(10):
        reg(context, hidden)
        for values in (embedding(dtype, seed=100 + seed), embedding(dtype, seed=seed)):
            table.weight.data = values.weight.data.clone()
            del values
        assert reg(context, hidden).equal(PerplexityRegularizer(table.weight, candidates=candidates)(context, hidden))


@pytest.mark.parametrize("candidates", [None, range(5, 35)], ids=["all", "candidates"])
@pytest.mark.parametrize("order", ["regularizer first", "embedding first"])
@pytest.mark.parametrize("move", ["half", "double", "bfloat16"])
def test_moves_within_a_host_that_holds_both(move, order, candidates):
    table, (context, hidden) = embedding(), states(1, P)
    reg = PerplexityRegularizer(table.weight, candidates=candidates)
    host = nn.ModuleList([reg, table] if order == "regularizer first" else [table, reg])
    getattr(host, move)()
    fresh = PerplexityRegularizer(table.weight, candidates=candidates)
    assert reg(context, hidden).equal(fresh(context, hidden))
    host.float()
    fresh = PerplexityRegularizer(table.weight, candidates=candidates)
    assert reg(context, hidden).equal(fresh(context, hidden)) and reg.vocabulary.dtype == torch.float32


def test_a_weight_that_another_takes_the_place_of_is_seen_where_the_module_was_given():
    table, (context, hidden) = embedding(), states(1, P)
    reg = PerplexityRegularizer(table)
    before = reg(context, hidden)
    table.load_state_dict(embedding(seed=9).state_dict(), assign=True)
    after = reg(context, hidden)
    assert after.equal(PerplexityRegularizer(embedding(seed=9).weight)(context, hidden)) and not after.isclose(before)


def test_refresh_reads_what_was_written_through_data():
    table, (context, hidden) = embedding(), states(1, P)
    reg = PerplexityRegularizer(table)
    before = reg(context, hidden)
    table.weight.data.copy_(embedding(seed=9).weight)
    reg.refresh()
    after = reg(context, hidden)
    assert after.equal(PerplexityRegularizer(embedding(seed=9))(context, hidden)) and not after.isclose(before)


@pytest.mark.parametrize("candidates", [None, range(5, 35)], ids=["all", "candidates"])
def test_the_vocabulary_follows_the_context_to_its_device(candidates):
    """ "meta" stands for an accelerator: a number that the host reads there, or two devices in one operation, would raise."""
    table, (context, hidden) = embedding(), states(1, P)
    reg = PerplexityRegularizer(table, candidates=candidates)
    here = reg(context, hidden)
    there = reg.components(*(t.detach().to("meta").requires_grad_() for t in (context, hidden)))
    there.total.backward()
    assert there.total.is_meta and reg(context, hidden).equal(here)
    assert not list(reg.buffers()) and reg.to("meta").vocabulary.device.type == "cpu"  # it is nobody's to move


def test_a_pickle_and_a_copy_are_no_larger_than_the_embedding():
    table, (context, hidden) = embedding(torch.float16), states(1, P)
    reg = PerplexityRegularizer(table)
    want = reg(context, hidden)  # what is derived is there now
    pickled = pickle.dumps(reg)
    assert len(pickled) < table.weight.nbytes + 4000
    for twin in (pickle.loads(pickled), copy.deepcopy(reg)):
        assert twin._words is None and twin(context, hidden).equal(want)


@pytest.mark.parametrize("normalize_over", ["topk", "vocabulary"])
def test_torch_func_gives_the_same_gradient(normalize_over):
    table, (context, hidden) = embedding(), states(1, P)
    reg = PerplexityRegularizer(table, normalize_over=normalize_over)
    want = torch.autograd.grad(reg(context, hidden), (context, hidden))
    got = torch.func.grad(reg.forward, argnums=(0, 1))(context.detach(), hidden.detach())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalize_over", ["topk", "vocabulary"])
def test_compiles_into_one_graph(normalize_over):
    table, (context, hidden) = embedding(), states(1, P)
    reg = PerplexityRegularizer(table, normalize_over=normalize_over)
    want = PerplexityRegularizer(table, normalize_over=normalize_over)(context, hidden)
    compiled = torch.compile(reg, fullgraph=True, backend="aot_eager")
    got = compiled(context, hidden)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(loss, (context, hidden)) for loss in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_adds_nothing_to_a_host():
    host = nn.Module()
    host.table = embedding()
    before = list(host.state_dict())
    host.reg = PerplexityRegularizer(host.table.weight, candidates=range(20))
    assert list(host.reg.parameters()) == [] and host.reg.state_dict() == {}
    assert list(host.state_dict()) == before and [n for n, _ in host.named_parameters()] == ["table.weight"]
    host.load_state_dict(host.state_dict(), strict=True)


@pytest.mark.parametrize("candidates", [None, range(5, 35)], ids=["all", "candidates"])
def test_a_deep_copy_follows_its_own_embedding(candidates):
    host = nn.ModuleList([embedding()])
    host.append(PerplexityRegularizer(host[0].weight, candidates=candidates))
    (context, hidden) = states(1, P)
    twin = copy.deepcopy(host)
    original = host[1](context, hidden)
    assert twin[1](context, hidden).equal(original)
    reload(twin[0])
    assert not twin[1](context, hidden).isclose(original) and host[1](context, hidden).equal(original)
    if candidates is None:
        assert twin[1].vocabulary.data_ptr() == twin[0].weight.data_ptr() != host[0].weight.data_ptr()


def test_a_compiled_one_follows_its_embedding():
    table, (context, hidden) = embedding(), states(1, P)
    compiled = torch.compile(PerplexityRegularizer(table), fullgraph=True, backend="aot_eager")
    before = compiled(context, hidden)
    reload(table)
    after = compiled(context, hidden)
    torch.testing.assert_close(after, PerplexityRegularizer(table)(context, hidden))
    assert not after.isclose(before)


def test_what_was_first_used_in_inference_mode_trains_afterwards():
    table, (context, hidden) = embedding(), states(1, P)
    reg = PerplexityRegularizer(table.weight)
    with torch.inference_mode():
        quiet = reg(context, hidden)
    for _ in range(2):
        loss = reg(context, hidden)
        loss.backward()
        assert loss.equal(quiet)


def test_an_inference_tensor_that_is_written_to_is_read_again():
    (context, hidden) = states(1, P)
    with torch.inference_mode():
        table = embedding().weight.clone()
        reg = PerplexityRegularizer(table)
        before = reg(context, hidden)
        table.copy_(embedding(seed=9).weight)
        assert reg(context, hidden).equal(PerplexityRegularizer(embedding(seed=9).weight)(context, hidden))
        assert not reg(context, hidden).isclose(before)


def test_works_under_inference_mode_and_with_an_inference_tensor():
    table, (context, hidden) = embedding(), states(1, P)
    want = PerplexityRegularizer(table.weight)(context, hidden)
    with torch.inference_mode():
        assert PerplexityRegularizer(table.weight)(context, hidden).equal(want)
        copied = table.weight.clone()
        assert PerplexityRegularizer(copied)(context, hidden).equal(want)


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


# ------------------------------------------------------------------ reading prompts


def test_a_words_own_vector_reads_as_that_word(tiny_vit):
    table = tiny_vit.token_embedding.weight
    ids = [encode(word)[0] for word in ("photo", "cat", "tiger")]
    read = nearest_words(table[ids] * 5, table, k=2)
    assert [[near.word for near in row][0] for row in read] == ["photo", "cat", "tiger"]
    assert all(row[0].cosine == pytest.approx(1, abs=1e-5) and row[1].cosine < 0.9 for row in read)
    among = nearest_words(table[ids].view(1, 3, -1), table, k=2, candidates=torch.tensor(sorted([ids[0], ids[2]])))
    assert [row[0].word for row in among] == ["photo", among[1][0].word, "tiger"]
    assert {near.word for row in among for near in row} == {"photo", "tiger"}


def test_whole_words_are_words():
    ids = set(whole_word_ids().tolist())
    encoder = tokenizer().encoder
    assert {encoder[token] for token in ("photo</w>", "cat</w>", "a</w>")} <= ids
    assert encode("café")[0] in ids  # the encoder's keys are bytes in disguise: é is two signs there
    # a piece that only begins words, punctuation, a digit, the marks
    assert not ids & {encode("♪")[0], encode("–")[0]}
    assert not ids & {encoder[token] for token in ("cat", "!</w>", "7</w>", "<|startoftext|>", "<|endoftext|>")}


def test_candidates_are_the_trained_whole_words(make_clip):
    model = make_clip(width=64, layers=1)
    assert candidate_ids(model) is None
    cat, mark = encode("cat")[0], encode("!")[0]
    model.trained_token_ids = torch.tensor(sorted([mark, cat, 49407]))
    assert candidate_ids(model).tolist() == [cat]
