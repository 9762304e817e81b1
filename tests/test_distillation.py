"""The losses of distillation: what upstream's own modules gave, values known by hand, limits, and a term that is none.

references/*.npz hold what went into upstream's loss modules and what came out of them, in fp32 on a CPU.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from plpp_reg.errors import InputError
from plpp_reg.loss import distillation

REFERENCES = Path(__file__).parent / "references"
WITHIN = 1e-4  # of the largest entry


def reference(file: str, case: str) -> dict[str, Tensor]:
    """One case of a file, by its names."""
    with np.load(REFERENCES / f"{file}.npz", allow_pickle=False) as content:
        return {n.partition(".")[2]: torch.from_numpy(content[n]) for n in content.files if n.startswith(f"{case}.")}


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= WITHIN * theirs.abs().max() and theirs.abs().max() > 0


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what upstream's modules gave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["t1", "t2", "c37"])
def test_promptkds_loss_and_gradient_are_upstreams(case: str) -> None:
    r = reference("promptkd_loss", case)
    features = r["features"].requires_grad_()  # normalised already
    logits = r["scale"] * features @ r["class_features"].T
    loss = r["kd_weight"] * distillation.kd(logits, r["teacher_logits"], r["temperature"].item())
    assert_near(loss.detach(), r["loss"])
    assert_near(torch.autograd.grad(loss, features)[0], r["grad_features"])


@pytest.mark.parametrize("case", ["all", "top3", "c100"])
def test_kdpls_loss_and_gradient_are_upstreams_over_all_classes_and_the_kept_ones(case: str) -> None:
    r = reference("kdpl_loss", case)
    student = r["student"].requires_grad_()
    kept = distillation.kept_classes(r["teacher"], int(r["k"]))
    assert kept.tolist() == sorted(r["kept"].tolist())
    loss = distillation.symmetric_kl(student[:, kept], r["teacher"][:, kept]).mean()
    assert_near(loss.detach(), r["loss"])
    assert_near(torch.autograd.grad(loss, student)[0], r["grad_student"])


def test_both_directions_of_kdpls_loss_count_half() -> None:
    with np.load(REFERENCES / "kdpl_coop.npz", allow_pickle=False) as r:
        teacher, student = torch.from_numpy(r["teacher_logits"]), torch.from_numpy(r["student_logits"])
        loss = distillation.symmetric_kl(student, teacher).mean()
        assert loss.item() == pytest.approx((r["all.forward"] + r["all.reverse"]).item() / 2, rel=1e-4)
        assert loss.item() == pytest.approx(r["all.loss"].item(), rel=1e-4)


def fdbpl(positive: Tensor, negative: Tensor, teacher: Tensor) -> Tensor:
    """FDBPL's loss as its method sums it, with its weights."""
    u = distillation.confidence(teacher)
    kd = u * distillation.symmetric_kl(positive, teacher)
    entropy = (1 - u) * distillation.negative_entropy(negative)
    return (kd + entropy + 0.001 * u * distillation.first_order_cosine(positive, negative)).mean()


@pytest.mark.parametrize("case", ["soft", "mixed", "sharp"])
def test_fdbpls_loss_and_gradients_are_upstreams_without_its_second_order_term(case: str) -> None:
    r = reference("fdbpl_loss", case)
    positive, negative = r["pos"].requires_grad_(), r["neg"].requires_grad_()
    loss = fdbpl(positive, negative, r["teacher"])
    assert_near(loss.detach(), r["loss"])
    for ours, theirs in zip(torch.autograd.grad(loss, (positive, negative)), ("grad_pos", "grad_neg"), strict=True):
        assert_near(ours, r[theirs])
    for features in ("grad_w_pos", "grad_w_neg"):  # what upstream's own term gave the class features: rounding
        assert r[features].abs().max() < 1e-8


def second_order_as_published(d: Tensor) -> Tensor:
    """FDBPL's term as its code has it: the means of d_i - d_j, over ordered pairs of the classes that the teacher names."""
    pairs = [(i, j) for i in range(len(d)) for j in range(len(d)) if i != j]
    return sum((d[i] - d[j]).mean() for i, j in pairs)


def test_the_published_second_order_term_and_its_gradient_are_identically_zero() -> None:
    d = random(12, 64).requires_grad_()
    term = second_order_as_published(d)
    (gradient,) = torch.autograd.grad(term, d)
    one_pair = torch.autograd.grad((d[0] - d[1]).mean(), d)[0]
    assert abs(term.item()) < 1e-12 and gradient.abs().max() < 1e-15 < one_pair.abs().max()


# ---- values by hand, limits ----------------------------------------------------------------------------------------------


def test_a_student_that_agrees_loses_nothing() -> None:
    z = random(5, 7)
    assert distillation.kd(z + 3, z).abs() < 1e-12  # what all logits share is nobody's
    assert distillation.symmetric_kl(z, z - 2).abs().max() < 1e-12


def test_kd_is_divided_by_images_times_classes_and_multiplied_by_the_squared_temperature() -> None:
    student, teacher = random(5, 7), random(5, 7, seed=1)
    for t in (1.0, 3.0):
        log_s, log_t = (student / t).log_softmax(1), (teacher / t).log_softmax(1)
        want = sum(log_t[b, c].exp() * (log_t[b, c] - log_s[b, c]) for b in range(5) for c in range(7)) * t * t / 35
        torch.testing.assert_close(distillation.kd(student, teacher, t), want)


def test_the_symmetric_loss_does_not_know_who_teaches() -> None:
    a, b = random(4, 6), random(4, 6, seed=1)
    torch.testing.assert_close(distillation.symmetric_kl(a, b), distillation.symmetric_kl(b, a))
    assert distillation.symmetric_kl(a, b).shape == (4,) and distillation.symmetric_kl(a, b).gt(0).all()


def test_confidence_is_one_for_one_class_and_zero_for_none() -> None:
    sure, flat, half = torch.tensor([100.0, 0, 0, 0]), torch.zeros(4), torch.tensor([50.0, 50, 0, 0])
    u = distillation.confidence(torch.stack([sure, flat, half]).double())
    assert u.tolist() == pytest.approx([1, 0, 0.5], abs=4e-6)
    with pytest.raises(InputError, match=r"classes: expected at least 2, .*got 1$"):
        distillation.confidence(torch.zeros(3, 1))


def test_negative_entropy_is_least_where_the_prediction_is_flat() -> None:
    z = torch.stack([torch.zeros(5), torch.tensor([90.0, 0, 0, 0, 0])]).double().requires_grad_()
    value = distillation.negative_entropy(z)
    assert value.tolist() == pytest.approx([-math.log(5), 0])
    assert torch.autograd.grad(value.sum(), z)[0].abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 0, 8])
def test_classes_that_are_not_there_cannot_be_kept(k: int) -> None:
    with pytest.raises(InputError, match=rf"k: expected 2 to 7 of the classes, got {k}$"):
        distillation.kept_classes(random(3, 7), k)


def literal_margin(f: Tensor, d: Tensor, teacher: Tensor, least: float) -> Tensor:
    """Pair by pair, with the features that :func:`distillation.margin` never sees."""
    u, y = distillation.confidence(teacher), teacher.argmax(1)
    terms = [
        u[a] * u[b] * (least - (f[a] - f[b]) @ (d[y[a]] - d[y[b]])).clamp_min(0)
        for a in range(len(f))
        for b in range(a + 1, len(f))
        if y[a] != y[b]
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("least", [0.2, 5.0])  # some pairs act, all pairs act
def test_margin_equals_the_literal_pairs_forward_and_backward(least: float) -> None:
    f, teacher = random(8, 16), 4 * random(8, 5, seed=1)
    teacher[3] = teacher[0]  # two images of one class: their pair does not count
    d = (0.3 * random(5, 16, seed=2)).requires_grad_()
    ours, theirs = distillation.margin(f @ d.T, teacher, least), literal_margin(f, d, teacher, least)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, d)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_margin_of_one_class_alone_is_zero() -> None:
    differences = random(3, 4).requires_grad_()
    loss = distillation.margin(differences, torch.tensor([[9.0, 0, 0, 0]]).expand(3, -1))
    assert loss.item() == 0 and torch.autograd.grad(loss, differences)[0].abs().max() == 0


def test_margin_goes_down_where_each_image_lies_further_along_its_own_class() -> None:
    teacher = torch.eye(4, dtype=torch.float64) * 9
    apart = torch.eye(4, dtype=torch.float64)  # f_b . d_c
    values = [distillation.margin(s * apart, teacher).item() for s in (-0.1, 0.0, 0.05, 0.2)]
    assert values == sorted(values, reverse=True) and values[-1] == 0 < values[1]


LOSSES = {
    "kd": lambda a, b: distillation.kd(a, b, 2.0),
    "symmetric_kl": lambda a, b: distillation.symmetric_kl(a, b),
    "negative_entropy": lambda a, b: distillation.negative_entropy(a),
    "first_order_cosine": lambda a, b: distillation.first_order_cosine(a, b),
    "margin": lambda a, b: distillation.margin(a, b, 5.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right(name: str) -> None:
    a, b = random(4, 5).requires_grad_(), random(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda logits: LOSSES[name](logits, b), a)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_autocast_compute_in_float32(name: str) -> None:
    a, b = (3 * random(4, 5)).bfloat16(), (3 * random(4, 5, seed=1)).bfloat16()
    want = LOSSES[name](a.float(), b.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = LOSSES[name](a, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
