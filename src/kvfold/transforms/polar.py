"""Neighbouring channels as polar pairs: x -> (radius, angle), and back."""

import torch
from torch import Tensor


def to_polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., dim]` to radius and angle `[..., dim / 2]`; angles in [-pi, pi]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.hypot(a, b), torch.atan2(b, a)


def from_polar(radius: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Radius, cosine and sine `[..., dim / 2]` to `[..., dim]`."""
    return torch.stack((radius * cos, radius * sin), -1).flatten(-2)
