"""A run on shapes alone asks of torch what a real run asks, and holds as much; its operations can be timed."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.estimate import throughput
from plpp_reg.estimate.operation import Operation, Shape
from plpp_reg.estimate.throughput import Machine, operation_seconds, overhead, plpp_seconds
from plpp_reg.estimate.trace import ALL, IMAGE, OTHER, TEXT, Tracer
from plpp_reg.loss.regularizer import PerplexityRegularizer

from counting import NAMES, counted

CPU = torch.device("cpu")
MANY = [f"{a} {b}" for a in NAMES for b in NAMES]
KINDS = {  # G, class-specific, position, memory bound in MiB, whether states are read
    "shared": (1, False, "end", 1024, True),
    "shared, without states": (1, False, "end", 1024, False),
    "class-specific": (1, True, "end", 1024, True),
    "middle": (1, False, "middle", 1024, True),
    "front": (1, False, "front", 1024, True),
    "an image each (CoCoOp)": (3, False, "end", 1024, True),
    "in chunks": (1, False, "end", 0.2, True),
}


def text_pass(model: nn.Module, kind: str):
    """A function that runs the tower forward and gives a sum, for one of KINDS."""
    groups, class_specific, position, mib, need_hidden = KINDS[kind]
    prompts = PromptLearner(model, NAMES, 4, class_specific=class_specific, position=position)
    tower, context = TextTower(model, mib), prompts.ctx.flatten(0, -2).expand(groups, -1, -1)
    tree = prompts.tree(tower.max_rows(groups))

    def run() -> Tensor:
        out = tower(tree, context, need_hidden=need_hidden)
        return out.features.sum() + (out.hidden.sum() if need_hidden else 0)

    return run


def both_ways(run) -> None:
    out = run()
    if out.requires_grad:
        out.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_pass_on_shapes_is_a_real_one(kind, make_clip):
    model = make_clip(layers=4)
    run = text_pass(model, kind)
    real, (forward, backward) = Tracer().of(lambda: both_ways(run)), counted(run)
    on_shapes = text_pass(model.to("meta"), kind)
    traced = Tracer().of(lambda: both_ways(on_shapes))
    assert traced.flops() == real.flops() == forward + backward
    assert traced.most == real.most and traced.most[ALL] > 0


@pytest.mark.parametrize("prompts", [0, 2])
def test_an_image_pass_on_shapes_is_a_real_one(prompts, make_clip):
    same_as_a_real_one(make_clip(vision_layers=3), prompts)


def test_a_resnet_on_shapes_is_a_real_one(tiny_resnet):
    same_as_a_real_one(tiny_resnet, 0)


def same_as_a_real_one(model: nn.Module, prompts: int) -> None:
    def run() -> Tensor:
        device = model.visual.conv1.weight.device
        rows = torch.randn(prompts, 64, device=device, requires_grad=True) if prompts else None
        return ImageTower(model)(torch.randn(3, 3, 32, 32, device=device), rows).sum()

    real, (forward, backward) = Tracer().of(lambda: both_ways(run)), counted(run)
    model.to("meta")
    traced = Tracer().of(lambda: both_ways(run))
    assert traced.flops() == real.flops() == forward + backward and (backward > 0) == (prompts > 0)
    assert traced.most[ALL] == pytest.approx(real.most[ALL], rel=0.01)


def test_a_block_has_the_operations_of_its_formula(make_clip):
    """A row: 24 D^2 of linear maps in either direction, and attention to L rows 4 D L, backward 10 D L."""
    model, rows, width = make_clip(layers=1).to("meta"), 5, 128
    x = torch.randn(2, rows, width, device="meta", requires_grad=True)
    attn, block = model.transformer.resblocks[0].attn, model.transformer.resblocks[0]

    def run() -> Tensor:
        q, k, v = (
            t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            for t in F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        )
        y = x + attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (y + block.mlp(block.ln_2(y))).sum()

    forward = Tracer().of(run).flops()
    assert forward == 2 * rows * (24 * width**2 + 4 * width * rows)
    assert Tracer().of(lambda: run().backward()).flops() - forward == 2 * rows * (24 * width**2 + 10 * width * rows)


def test_bytes_are_those_that_live_at_once():
    def work() -> None:
        a = torch.empty(1000, device="meta")  # 4000 bytes
        b = a + 1  # 8000
        del a
        view = b[:10]  # the same bytes
        c = b * 2  # 8000 again
        del b, c, view

    tracer = Tracer()
    assert tracer.of(work).most[ALL] == 8000 and not tracer.bytes[ALL]
    kept: list[Tensor] = []
    assert tracer.of(lambda: kept.append(torch.empty(100, device="meta"))).most[ALL] == 400
    assert tracer.of(work).most[ALL] == 8400  # what stays alive is among the bytes of what follows


def test_a_call_of_the_same_shapes_is_another_one_where_its_numbers_are_of_another_type():
    made = []

    def work() -> None:
        whole = torch.zeros(3, 2, dtype=torch.int64, device="meta")
        made.extend([whole * 2, whole * 2.0, whole * 2, whole.t() * 2, whole.float() * 2])

    Tracer().of(work)
    assert [t.dtype for t in made] == [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32]
    assert [t.stride() for t in made] == [(2, 1), (2, 1), (2, 1), (1, 2), (2, 1)]


def test_a_tower_that_is_watched_has_both_of_its_ways():
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(3, 4, requires_grad=True)
    tracer = Tracer()
    tracer.watch(first, TEXT)
    tracer.watch(second, IMAGE)

    def work() -> None:
        total = (first(x) @ second(x).T).sum()
        tracer.follow(total, OTHER)
        total.backward()

    done = tracer.of(work)
    assert done.flops(TEXT) == done.flops(IMAGE) == 2 * 3 * 4 * 4 * 3  # there, to the input, to the weight
    assert done.flops(OTHER) == 2 * 3 * 4 * 3 * 3 and done.flops() == done.flops(TEXT, IMAGE, OTHER)


def test_a_memory_bound_lowers_the_bytes_and_runs_chunks_twice(make_clip):
    model = make_clip(layers=4).to("meta")
    runs = [text_pass(model, kind) for kind in ("shared", "in chunks")]
    whole, in_chunks = (Tracer().of(functools.partial(both_ways, run)) for run in runs)
    assert in_chunks.most[ALL] < whole.most[ALL] and in_chunks.flops() > 1.3 * whole.flops()


def test_operations_can_be_made_again(make_clip):
    run = text_pass(make_clip(layers=2).to("meta"), "shared")
    done = Tracer().of(lambda: both_ways(run))
    operations = done.counts()
    pool = torch.ones(2**18).view(torch.uint8)
    for operation in operations:
        operation.on(CPU, pool)()
    assert operations.total() > len(operations) > 20


def test_weights_come_from_other_places_each_time():
    weight, activation = Shape((4, 4), (1, 4), torch.float32, True), Shape((2, 4), (4, 1), torch.float32, False)
    seen = []
    product = Operation(
        lambda x, w: seen.append((x.data_ptr(), w.data_ptr(), w.stride(), w.sum().item())), (activation, weight), (), 64
    )
    product.function.overloadpacket = None
    call = product.on(CPU, torch.ones(3 * 16).view(torch.uint8))
    for _ in range(4):
        call()
    assert len({x for x, *_ in seen}) == 1 and len({w for _, w, *_ in seen}) == 3 and seen[0] == seen[3]
    assert all(rest == [(1, 4), 16.0] for _, _, *rest in seen)


def test_what_is_not_timed_is_in_proportion(monkeypatch):
    monkeypatch.setattr(throughput, "MOST_SHAPES", 1)
    large, small = (
        Operation(torch.ops.aten.mul.Tensor, (Shape((n,), (1,), torch.float32, False),) * 2, (), 0) for n in (1000, 100)
    )
    monkeypatch.setattr(Machine, "seconds", lambda *_: 5.0)
    seconds = operation_seconds({large: 1, small: 3}, Machine(CPU))
    assert seconds == {large: 5.0, small: pytest.approx(0.5, rel=0.01)}


def test_everything_that_is_timed_runs_and_takes_time(make_clip, monkeypatch):
    monkeypatch.setattr(throughput, "REPEATS", 1)
    monkeypatch.setattr(throughput, "LONG", 1e-4)
    machine = Machine(CPU)
    assert 0 <= overhead(machine) < 0.01
    run = text_pass(make_clip(layers=2).to("meta"), "shared")
    done = Tracer().of(lambda: both_ways(run))
    assert all(0 < seconds < 1 for seconds in operation_seconds(done.counts(), machine).values())
    regularizer = PerplexityRegularizer(torch.empty(200, 16, device="meta"), top_k=3)
    for new_each_step in (False, True):
        assert 0 < plpp_seconds(regularizer, torch.Size((1, 4, 16)), torch.Size((2, 4, 16)), new_each_step, machine) < 1


def test_a_shared_context_that_is_read_in_many_places_is_timed_in_some(monkeypatch):
    monkeypatch.setattr(Machine, "seconds", lambda _, work: work() or 1.0)
    regularizer = PerplexityRegularizer(torch.empty(200, 16, device="meta"), top_k=3)
    shapes = torch.Size((1, 4, 16)), torch.Size((640, 4, 16))
    assert plpp_seconds(regularizer, *shapes, False, Machine(CPU)) == 10  # 64 of 640 prompts with 4 vectors
