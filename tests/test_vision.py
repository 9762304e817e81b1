"""The image tower equals the stock one, and with visual prompts a literal loop over images and layers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from plpp_reg.clip.load import set_precision
from plpp_reg.clip.vision import ImageTower
from plpp_reg.errors import InputError

from helpers import literal
from helpers import literal_methods as lm
from helpers.clips import make_clip

WIDTH, LAYERS, EMBED = 128, 4, 96
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@functools.cache
def model_of(dtype: torch.dtype, resnet: bool = False, layers: int = LAYERS) -> nn.Module:
    model = make_clip(
        width=64, layers=1, resnet=resnet, embed_dim=EMBED, vision_layers=layers, vision_width=WIDTH, image_resolution=48
    )
    return literal.double(model) if dtype == torch.float64 else set_precision(model, dtype)


def images_of(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def prompts_of(count: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the size of what stands beside them: far from nothing."""
    generator = torch.Generator().manual_seed(count)
    rows = [torch.randn(count, WIDTH, generator=generator) for _ in range(depth)]
    return [r.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_() for r in rows]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.isfinite().all()
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("resnet", [False, True], ids=["vit", "resnet"])
def test_without_prompts_it_is_encode_image(resnet: bool, dtype: torch.dtype) -> None:
    model = model_of(dtype, resnet)
    with torch.no_grad():
        got, want = ImageTower(model)(images_of()), model.encode_image(images_of().to(dtype))
    assert got.dtype == dtype and got.shape == (3, EMBED) and error(got, want) < TOLERANCE[dtype]
    assert error(want[:1], want[1:2]) > 10 * TOLERANCE[dtype]  # the images differ
    assert not resnet or got.equal(want)  # it runs as it is


@pytest.mark.parametrize(("resnet", "depth"), [(False, 0), (True, 0), (False, 3)])
def test_bfloat16_is_as_near_to_the_truth_as_the_stock_tower(resnet: bool, depth: int) -> None:
    model = model_of(torch.bfloat16, resnet)
    prompts = prompts_of(2, depth, torch.bfloat16)
    with torch.no_grad():
        truth = lm.image_tower(model_of(torch.float64, resnet), images_of(), [p.double() for p in prompts])
        stock = lm.image_tower(model, images_of(), prompts)
        got = ImageTower(model)(images_of(), prompts[0], prompts[1:]) if depth else ImageTower(model)(images_of())
    assert got.dtype == torch.bfloat16
    assert error(got, truth) < 1.5 * error(stock, truth) < 0.05


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_deep_prompts_equal_a_literal_loop(depth: int, count: int, dtype: torch.dtype) -> None:
    model, prompts = model_of(dtype), prompts_of(count, depth, dtype)
    exact = [p.detach().double().requires_grad_() for p in prompts]
    got = ImageTower(model)(images_of(), prompts[0], prompts[1:])
    want = lm.image_tower(model_of(torch.float64), images_of(), exact)
    assert error(got, want) < TOLERANCE[dtype]
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(9))  # so that no two outputs can be exchanged
    ours = torch.autograd.grad((got * weights).sum(), prompts)
    for a, b in zip(ours, torch.autograd.grad((want * weights).sum(), exact), strict=True):
        assert b.abs().amax(-1).gt(0).all() and error(a, b) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("prompted", [False, True])
def test_one_layer_is_first_and_last(prompted: bool) -> None:
    model = model_of(torch.float32, layers=1)
    prompts = prompts_of(2, 1, torch.float32) if prompted else []
    with torch.no_grad():
        got = ImageTower(model)(images_of(), *prompts)
        want = lm.image_tower(model_of(torch.float64, layers=1), images_of(), [p.double() for p in prompts])
    assert error(got, want) < 1e-5


def test_the_gradient_goes_to_the_prompts_alone() -> None:
    model, prompts = make_clip(width=64, layers=1, vision_layers=3, vision_width=WIDTH), prompts_of(2, 2, torch.float32)
    tower = ImageTower(model)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    tower(images, prompts[0], prompts[1:]).square().sum().backward()
    assert all(p.grad.abs().amax(-1).gt(0).all() for p in prompts)
    assert all(p.grad is None for p in model.parameters()) and images.grad is None
    assert {id(p) for p in tower.parameters()} == {id(p) for p in model.visual.parameters()}  # nothing of its own
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not tower(images).requires_grad


def test_images_do_not_meet() -> None:
    model, (first, *deep) = model_of(torch.float32), prompts_of(2, 3, torch.float32)
    tower = ImageTower(model)
    with torch.no_grad():
        together = tower(images_of(), first, deep)
        alone = torch.cat([tower(image[None], first, deep) for image in images_of()])
    assert error(together, alone) < 1e-5


def test_prompts_change_the_features_and_do_not_outlive_the_call() -> None:
    tower, (first, *deep) = ImageTower(model_of(torch.float32)), prompts_of(2, 3, torch.float32)
    with torch.no_grad():
        plain, shallow, both = tower(images_of()), tower(images_of(), first), tower(images_of(), first, deep)
        assert min(error(shallow, plain), error(both, plain), error(both, shallow)) > 1e-3
        assert tower(images_of()).equal(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_it_says_of_itself(dtype: torch.dtype) -> None:
    tower = ImageTower(model_of(dtype))
    assert (tower.width, tower.depth, tower.dtype, tower.is_transformer) == (WIDTH, LAYERS, dtype, True)


def test_a_tower_without_projection_gives_its_width() -> None:
    model = copy.deepcopy(model_of(torch.float32))
    model.visual.proj = None
    with torch.no_grad():
        got = ImageTower(model)(images_of())
        assert error(got, model.visual(images_of())) < 1e-5
    assert got.shape == (3, WIDTH)


def test_prompts_that_cannot_be_are_refused() -> None:
    tower = ImageTower(model_of(torch.float32, resnet=True))
    assert not tower.is_transformer and tower.dtype == torch.float32
    with pytest.raises(InputError, match=r"^prompts: expected rows that deep prompts of 2 layers replace, got None$"):
        ImageTower(model_of(torch.float32))(images_of(), deep=prompts_of(2, 2, torch.float32))
    for ask in (lambda: tower.width, lambda: tower.depth, lambda: tower(images_of(), torch.zeros(2, WIDTH))):
        with pytest.raises(InputError, match=r"^visual prompts: expected .*vision transformer.*got a ResNet$"):
            ask()


def test_it_is_one_graph() -> None:
    """torch.compile finds nothing that it must leave to Python: with fullgraph it would raise."""
    tower, (first, *deep) = ImageTower(model_of(torch.float32, layers=2)), (prompts := prompts_of(2, 2, torch.float32))
    passes = []
    for forward in (torch.compile(tower.forward, backend="aot_eager", fullgraph=True, dynamic=False), tower.forward):
        features = forward(images_of(2), first, deep)
        passes.append([features, *torch.autograd.grad(features.square().sum(), prompts)])
    assert all(error(got, want) < 1e-6 for got, want in zip(*passes, strict=True))
