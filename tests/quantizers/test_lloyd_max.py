"""Lloyd-Max levels against Max's table and against samples."""

import pytest
import torch

from kvfold.quantizers.lloyd_max import (
    fit_samples,
    gaussian_levels,
    quantise,
    rayleigh_levels,
    sphere_levels,
)

MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", MAX_1960)
def test_gaussian_errors_are_those_of_max(bits: int) -> None:
    """Max, "Quantizing for minimum distortion" (1960), Table I, by integration."""
    levels = gaussian_levels(bits).double()
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    error = (weight * (x - levels[quantise(x, levels).long()]) ** 2).sum() / weight.sum()
    assert abs(error.item() / MAX_1960[bits] - 1) < 1e-3, f"{error:.6f}, {MAX_1960[bits]} in Max"


def test_known_levels() -> None:
    found = gaussian_levels(2).tolist()
    assert found == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3), f"{found}"
    assert torch.equal(gaussian_levels(3), -gaussian_levels(3).flip(0))


@pytest.mark.parametrize("dim", [64, 80, 256])
def test_sphere_levels_are_best_for_unit_vectors(dim: int) -> None:
    x = torch.randn(200_000 // dim, dim, generator=torch.Generator().manual_seed(21_001)).double()
    x = (x / x.norm(dim=-1, keepdim=True) * dim**0.5).float()

    def error(levels: torch.Tensor) -> float:
        return (x - levels[quantise(x, levels).long()]).square().mean().item()

    best = error(sphere_levels(4, dim))
    assert best < error(gaussian_levels(4)), f"{best} with sphere, {error(gaussian_levels(4))}"
    for factor in (0.97, 1.03):
        other = error(sphere_levels(4, dim) * factor)
        assert best < other, f"{best}, but {other} with levels times {factor}"


def test_rayleigh_levels_fit_radii() -> None:
    pairs = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(21_002))
    radius = pairs.norm(dim=-1)
    for bits in (1, 2, 3, 4):
        levels, fitted = rayleigh_levels(bits), fit_samples(radius, 2**bits)
        error = (radius - levels[quantise(radius, levels).long()]).square().mean().item()
        least = (radius - fitted[quantise(radius, fitted).long()]).square().mean().item()
        assert error < 1.03 * least, f"{bits} bits: {error:.5f}, {least:.5f} when fitted"


def test_fit_samples_finds_clusters() -> None:
    generator = torch.Generator().manual_seed(21_003)
    centres = torch.tensor([-3.0, 0.5, 2.0, 9.0])
    samples = (centres[:, None] + 0.01 * torch.randn(4, 500, generator=generator)).flatten()
    found = fit_samples(samples, 4)
    assert (found - centres).abs().max() < 0.01, f"{found}"
    assert torch.equal(fit_samples(samples.flip(0), 4), found), "the order of samples matters"
    constant = fit_samples(torch.ones(10), 4)
    assert constant.tolist() == [1.0] * 4, f"{constant}"


def test_quantise_takes_the_nearest_level() -> None:
    levels = torch.tensor([-2.0, -1.0, 0.5, 4.0])
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(21_004)) * 3
    nearest = (x[..., None] - levels).abs().argmin(-1)
    assert torch.equal(quantise(x, levels).long(), nearest)
    assert torch.equal(quantise(x.transpose(0, 2), levels).long(), nearest.transpose(0, 2))
