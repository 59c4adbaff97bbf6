"""Pairs of channels to radius and angle, and back."""

import math

import torch

from kvfold.transforms.polar import from_polar, to_polar


def test_round_trip_pairs_neighbours() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(13_001))
    radius, angle = to_polar(x)
    back = from_polar(radius, angle.cos(), angle.sin())
    error = (back - x).abs().max().item()
    assert error < 1e-6, f"off by {error}"
    expected = math.hypot(x[0, 2], x[0, 3])
    assert abs(radius[0, 1].item() - expected) < 1e-6, f"{radius[0, 1]}, {expected} expected"
    assert radius.min() >= 0, f"radius {radius.min()}"
    assert angle.abs().max() <= math.pi + 1e-6, f"angle {angle.abs().max()}"
