"""Walsh-Hadamard rotations: orthonormal, their own inverse, bit-identical however batched."""

import torch
from torch import Tensor


def power_of_two_parts(dim: int) -> tuple[int, ...]:
    """The binary digits of `dim`, largest first: 96 -> (64, 32), 80 -> (64, 16)."""
    return tuple(1 << b for b in range(dim.bit_length() - 1, -1, -1) if dim >> b & 1)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, H = H^T = H^-1.

    A last axis that is no power of two is taken as blocks of its power-of-two parts. Computed with
    butterflies of elementwise sums, so that a row's result never depends on the rows beside it.
    """
    parts = power_of_two_parts(x.shape[-1])
    if len(parts) == 1:
        return _butterflies(x)
    return torch.cat([_butterflies(part) for part in x.split(parts, -1)], -1)


def random_signs(dim: int, seed: int) -> Tensor:
    """`[dim]` of +1 and -1 (float32), the diagonal that makes a Hadamard rotation random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (dim,), generator=generator).float() * 2 - 1


def _butterflies(x: Tensor) -> Tensor:
    dim, half = x.shape[-1], 1
    while half < dim:
        pairs = x.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return x * dim**-0.5
