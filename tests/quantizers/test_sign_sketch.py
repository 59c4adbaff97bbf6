"""Sign sketches: unbiased products, and the price in error."""

import math

import torch

from kvfold.quantizers.sign_sketch import expansion, sketch, sketch_matrix


def test_estimate_is_unbiased_and_farther_than_zero() -> None:
    generator = torch.Generator().manual_seed(23_001)
    r, q = torch.randn(2, 1, 1, 16, 64, generator=generator)
    estimates = []
    for seed in range(400, 700):
        matrix = sketch_matrix(64, seed)
        signs = 2.0 * sketch(r, matrix).float() - 1.0
        size = r.square().mean(-1, keepdim=True).sqrt()
        estimates.append(size * signs @ expansion(matrix))
    estimates = torch.stack(estimates)
    found, true = (estimates.mean(0) * q).sum(-1), (r * q).sum(-1)
    noise = (estimates * q).sum(-1).std(0) / math.sqrt(len(estimates))
    deviation = ((found - true) / noise).abs().max().item()
    assert deviation < 4.5, f"the mean product is {deviation:.1f} standard errors off"
    error = ((estimates - r).square().mean() / r.square().mean()).item()
    assert abs(error - math.pi / 2) < 0.03, f"error {error:.3f} of the residual, pi/2 expected"
