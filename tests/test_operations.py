"""Budgets: how many operations a step may ask of a device, and for how many values the host may wait.

Each is a kernel's launch on an accelerator. The counts are exact and the same on every machine, so they stand for one that is
not here.
"""

from __future__ import annotations

import pytest
import torch

import on_gpu
import operations
from operations import NARROW, STEPS, TEXT


@pytest.mark.parametrize("case", TEXT)
def test_the_text_tower_is_fewer_operations_than_the_literal_one(case):
    row = operations.measure(case, NARROW)
    assert row["operations"] <= 310 and row["literal"] in (432, 433)  # 12 layers
    # 1,600 vectors of their own meet the vocabulary in five parts, for the bound on memory
    assert 0 < row["plpp"] <= (82 if case == "text-class-specific-short-names" else 60)


BUDGETS = {
    "CoOp_PLPP": 220,
    "KgCoOp_PLPP": 230,
    "ProGrad_PLPP": 330,
    "CoCoOp": 190,
    "CoCoOp_PLPP": 250,
    "MaPLe_PLPP": 460,
    "IVLP_PLPP": 430,
    "PromptSRC": 410,
    "PromptSRC_PLPP": 470,
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_whole_step_of_the_embedded_model(name):
    (case,) = [case for case, (method, _) in STEPS.items() if method == name]
    row = operations.measure(case, NARROW)
    assert BUDGETS[name] - 60 < row["operations"] <= BUDGETS[name]  # a budget that is far off holds nothing
    assert row["waits"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="bash benchmarks/on_gpu.sh runs all of it")
@pytest.mark.parametrize("method", on_gpu.METHODS)
def test_the_script_for_a_gpu_measures_steps_on_a_cpu(method):
    rows = [on_gpu.measure(on_gpu.Case(method, "fp32", 3, which), 1) for which in (on_gpu.LITERAL, on_gpu.PLAIN, on_gpu.PLPP)]
    literal, plain, plpp = rows
    assert plain["operations"] < literal["operations"] and plain["operations"] < plpp["operations"]
    assert plain["waits"] == plpp["waits"] == 1
    assert all(row["loss_rel_diff"] < 1e-5 and row["grad_rel_diff"] < 1e-4 for row in rows)
    assert on_gpu.said(plpp).split()[:5] == [method, "fp32", "3", "with", "PLPP"]
