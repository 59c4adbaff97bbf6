"""Uniform quantisers: step bounds, degenerate groups, saturation."""

import pytest
import torch

from kvfold.quantizers.uniform import (
    GAUSSIAN_STEPS,
    asymmetric,
    sphere_step,
    symmetric,
    to_float16,
)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [1, 2])
def test_asymmetric_is_within_half_a_step(bits: int, dim: int) -> None:
    x = torch.randn(5, 32, 48, generator=torch.Generator().manual_seed(22_001)) * 3 + 1
    codes, scale, zero = asymmetric(x, bits, dim)
    assert scale.shape[dim] == zero.shape[dim] == 1
    assert scale.dtype == zero.dtype == torch.float16
    assert codes.max() == 2**bits - 1, f"the top code is {codes.max()}"
    assert codes.min() == 0, f"the lowest code is {codes.min()}"
    step = scale.float()
    error = ((codes.float() * step + zero.float() - x).abs() / step).max().item()
    # the rounding of scale and zero to float16 comes on top of half a step
    assert error < 0.5 + 2**bits * 2e-3, f"{error} steps"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_is_within_half_a_step(bits: int) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(22_002))
    codes, scale = symmetric(x, bits, -1)
    step, middle = scale.float(), 2 ** (bits - 1)
    error = (((codes.float() - middle) * step - x).abs() / step).max().item()
    assert error < 0.5 + middle * 2e-3, f"{error} steps"
    mirrored, _ = symmetric(-x, bits, -1)
    assert torch.equal(mirrored.int() - middle, middle - codes.int()), "not symmetric"


def test_degenerate_groups() -> None:
    codes, scale, zero = asymmetric(torch.full((2, 8), 0.75), 4, -1)
    assert codes.sum() == scale.sum() == 0, f"{codes} {scale}"
    assert zero.flatten().tolist() == [0.75, 0.75], f"{zero}"
    codes, scale = symmetric(torch.zeros(2, 8), 8, -1)
    assert scale.sum() == 0
    assert codes.unique().tolist() == [128], f"{codes.unique()}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_sphere_step_is_best_for_unit_vectors(bits: int, dim: int) -> None:
    x = torch.randn(400_000 // dim, dim, generator=torch.Generator().manual_seed(22_003)).double()
    x = x / x.norm(dim=-1, keepdim=True) * dim**0.5

    def error(step: float) -> float:
        middle = (2**bits - 1) / 2
        codes = (x / step + middle).round().clamp(0, 2**bits - 1)
        return (step * (codes - middle) - x).square().mean().item()

    best = error(sphere_step(bits, dim))
    for factor in (0.97, 1.03):
        other = error(sphere_step(bits, dim) * factor)
        assert best < other, f"{best}, but {other} with the step times {factor}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_sphere_step_tends_to_that_of_max(bits: int) -> None:
    """Max 1960, Table II: a coordinate of a long unit vector is Gaussian."""
    found = sphere_step(bits, 2048)
    assert abs(found / GAUSSIAN_STEPS[bits] - 1) < 2e-3, f"{found}, {GAUSSIAN_STEPS[bits]} in Max"


def test_to_float16_saturates() -> None:
    found = to_float16(torch.tensor([1e9, -1e9, 65504.0, 1.0])).tolist()
    assert found == [65504.0, -65504.0, 65504.0, 1.0], f"{found}"
