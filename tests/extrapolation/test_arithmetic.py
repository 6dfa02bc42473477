"""One piece of a weight: sums of squares, the realised error and what is refused, against fp64."""

from __future__ import annotations

import math
import os

import pytest
import torch

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import arithmetic as arithmetic_module
from hf_unlearn.extrapolation.arithmetic import (
    RealisedError,
    compute_threads,
    extrapolate_weight,
    lora_delta,
    squared_norm,
)


ALPHA = 1.7


def relative_error(result: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor) -> float:
    """The definition, in fp64."""
    realised = result.double() - weight.double()
    return ((realised - wanted).norm() / wanted.norm()).item()


# 1e-25 and 1e25 have squares that fp32 cannot hold
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25])
@pytest.mark.parametrize("shape", [(1,), (5000,), (300, 70), (4, 30000)])
@pytest.mark.parametrize("transposed", [False, True])
def test_squared_norm(scale, shape, transposed):
    torch.manual_seed(0)
    tensor = torch.randn(shape) * scale
    tensor = tensor.T if transposed and len(shape) == 2 else tensor
    assert squared_norm(tensor) == pytest.approx(tensor.double().square().sum().item(), rel=1e-6)


def test_squared_norm_of_many_equal_values():
    # 1e-5 is what the realised error may be off by; one row after the other in fp32 would be off by more
    tensor = torch.full((1 << 10, 1 << 12), 0.1)
    assert squared_norm(tensor) == pytest.approx((1 << 22) * torch.tensor(0.1).double().item() ** 2, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_squared_norm_without_a_finite_positive_value(value):
    norm = squared_norm(torch.tensor([[0.0, 0.0], [0.0, value]]))
    assert norm == abs(value) or (math.isnan(norm) and math.isnan(value))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_and_its_error(stored, dtype, transposed):
    torch.manual_seed(0)
    weight = torch.randn(90, 130).to(stored)
    before = weight.clone()
    a, b = torch.randn(8, 90 if transposed else 130), torch.randn(130 if transposed else 90, 8)
    product = 0.3 * b.double() @ a.double()
    wanted = -ALPHA * (product.T if transposed else product)
    errors = RealisedError()
    result = extrapolate_weight("x", weight, lora_delta(a, b, 0.3, transposed), ALPHA, dtype, errors)
    assert result.dtype == dtype and result.is_contiguous()
    assert torch.equal(weight, before)
    resolution = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(result.double(), weight.double() + wanted, rtol=resolution, atol=5e-6)
    assert errors.tensors["x"].changed
    assert errors.tensors["x"].squared_norm == pytest.approx(wanted.square().sum().item(), rel=1e-6)
    # what the product lost in fp32 counts as wanted
    assert errors.relative == pytest.approx(relative_error(result, weight, wanted), rel=1e-4, abs=2e-7)


def test_an_update_lost_in_fp32_has_an_error_of_one():
    errors = RealisedError()
    weight = torch.full((4, 8), 1.0)
    result = extrapolate_weight("x", weight, torch.full((4, 8), 1e-9), 1.0, torch.float32, errors)
    assert torch.equal(result, weight)
    assert errors.relative == 1.0 and errors.changed_tensors == 0


@pytest.mark.parametrize("row", [None, 0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed(row, dtype):
    delta = torch.full((6, 8), 1e-12)
    if row is not None:
        delta[row, 3] = 1.0
    errors = RealisedError()
    extrapolate_weight("x", torch.ones(6, 8), delta, 1.0, dtype, errors)
    assert errors.changed_tensors == (row is not None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(value, dtype):
    weight = torch.ones(6, 8)
    weight[5, 7] = value
    with pytest.raises(UnlearningError, match="'x' would hold NaN or infinite"):
        extrapolate_weight("x", weight, torch.ones(6, 8), 1.0, dtype, RealisedError())


def test_an_error_whose_square_exceeds_fp32_is_none_of_the_weights():
    torch.manual_seed(0)
    weight, delta = torch.randn(6, 8) * 1e30, torch.randn(6, 8) * 1e28
    errors = RealisedError()
    result = extrapolate_weight("x", weight, delta.clone(), 1.0, torch.bfloat16, errors)
    assert errors.relative == pytest.approx(relative_error(result, weight, -delta.double()), rel=1e-4)


@pytest.mark.parametrize(
    ("cores", "torchs", "threads"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (8, 3, 2), (1, 4, 1), (64, 1, 4)]
)
def test_compute_threads(monkeypatch, cores, torchs, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(arithmetic_module.torch, "get_num_threads", lambda: torchs)
    assert compute_threads() == threads
