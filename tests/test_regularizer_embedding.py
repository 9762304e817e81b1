"""PerplexityRegularizer follows the embedding that it shares: changed, moved, copied, compiled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from plpp_reg import PerplexityRegularizer

from helpers.vectors import P, V, embedding, states


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
