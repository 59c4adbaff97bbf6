"""Uniform quantisers: reals to unsigned codes with a scale, and a zero point where asymmetric.

Parameters are rounded to float16 first and the codes chosen for the rounded ones.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kvfold.quantizers.lloyd_max import sphere_density

FLOAT16_MAX = 65504.0


def to_float16(x: Tensor) -> Tensor:
    """Round to float16, saturating, so that a parameter is finite for every finite input."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)


def asymmetric(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scale and zero point (float16, `dim` kept with size 1) of groups along `dim`.

        q = round((x - z) / s),   z = min x,   s = (max x - min x) / (2**bits - 1)

    A constant group has scale 0 and decodes to its zero point.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = to_float16(low)
    scale = to_float16((high - low) / (2**bits - 1))
    step = scale.float()
    codes = ((x - zero.float()) / torch.where(step > 0, step, 1.0)).round()
    codes = torch.where(step > 0, codes.clamp(0, 2**bits - 1), 0.0)
    return codes.to(torch.uint8), scale, zero


def symmetric(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8, offset by 2**(bits-1)) and scale (float16) of groups along `dim`.

        q = round(x / s) + 2**(bits-1),   s = max |x| / (2**(bits-1) - 1)

    A group of zeros has scale 0 and decodes to zeros.
    """
    top = 2 ** (bits - 1) - 1
    scale = to_float16(x.abs().amax(dim, keepdim=True) / top)
    step = scale.float()
    codes = (x / torch.where(step > 0, step, 1.0)).round().clamp(-top, top)
    codes = torch.where(step > 0, codes, 0.0) + (top + 1)
    return codes.to(torch.uint8), scale


#: step of the best uniform quantiser of N(0, 1) at 0 to 8 bits (Max 1960, Table II, extended).
GAUSSIAN_STEPS = (0.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)


def gaussian_affine(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Step and offset (float32) of levels `offset + step * code` for N(0, 1), of integer widths."""
    step = torch.tensor(GAUSSIAN_STEPS, device=bits.device)[bits.long()]
    return step, -step * (2.0**bits - 1) / 2


@lru_cache
def sphere_step(bits: int, dim: int) -> float:
    """Step of the levels `step * (c - (2**bits - 1) / 2)` with least error for `sphere_density`.

    By bisection: of a step that is too small, the best step for its cells is larger.
    """
    x = (torch.arange(2**16, dtype=torch.float64) + 0.5) * (dim**0.5 / 2**16)
    weight = sphere_density(x, dim)
    low, high = 0.0, 2.0
    for _ in range(32):
        step = (low + high) / 2
        level = (x / step).floor().clamp(max=2 ** (bits - 1) - 1) + 0.5  # in steps, nearest to x
        best = float((weight * level * x).sum() / (weight * level.square()).sum())
        low, high = (step, high) if best > step else (low, step)
    return low


def fit_affine(
    x: Tensor, bits: Tensor, weight: Tensor | None = None, rounds: int = 3
) -> tuple[Tensor, Tensor]:
    """Step and offset of levels `offset + step * code` with least squared error, per coordinate.

    Several starts around the Gaussian step; each is improved by regressing x on its codes. A
    search, because the error has local minima where tails are heavy.

    Args:
        x: samples `[..., samples, coordinates]`.
        bits: widths `[..., coordinates]`; 0 gives a step and an offset of 0.
        weight: of the samples `[..., samples, 1]`.
        rounds: regressions of each start.
    """
    top = (2.0 ** bits.to(x.dtype) - 1).unsqueeze(-2)
    weight = torch.ones_like(x[..., :1]) if weight is None else weight
    weight = weight / weight.sum(-2, keepdim=True).clamp_min(1e-30)
    mean = (weight * x).sum(-2, keepdim=True)
    spread = (weight * (x - mean).square()).sum(-2, keepdim=True).sqrt()
    best_step = torch.zeros_like(mean)
    best_offset, least = torch.zeros_like(mean), torch.full_like(mean, torch.inf)
    unit = gaussian_affine(bits)[0].to(x.dtype).unsqueeze(-2)

    def assign(step: Tensor, offset: Tensor) -> Tensor:
        codes = ((x - offset) / step.clamp_min(1e-30)).round_()
        return torch.minimum(codes.clamp_min_(0.0), top)

    for factor in (0.8, 1.0, 1.25, 1.6):
        step = (factor * unit * spread).clamp_min(1e-12)
        offset = mean - step * top / 2
        for left in range(rounds, -1, -1):
            codes = assign(step, offset)
            error = (weight * (codes * step + offset - x).square()).sum(-2, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best_step = torch.where(better, step, best_step)
            best_offset = torch.where(better, offset, best_offset)
            if not left:
                break
            middle = (weight * codes).sum(-2, keepdim=True)
            away = codes - middle
            power = (weight * away.square()).sum(-2, keepdim=True)
            slope = (weight * away * x).sum(-2, keepdim=True) / power.clamp_min(1e-12)
            step = torch.where((power > 1e-12) & (slope > 0), slope, step)
            offset = mean - step * middle
    stored = (bits > 0).unsqueeze(-2)
    return (
        torch.where(stored, best_step, 0.0).squeeze(-2),
        torch.where(stored, best_offset, 0.0).squeeze(-2),
    )
