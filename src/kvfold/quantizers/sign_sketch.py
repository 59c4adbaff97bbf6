"""Sign sketches (QJL, Zandieh et al. 2024, arXiv:2406.03482): one bit a coordinate and a norm."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from kvfold.transforms.orthogonal import apply_tiles


@lru_cache(maxsize=64)
def sketch_matrix(dim: int, seed: int) -> Tensor:
    """S^T `[dim, dim]` (float32), entries N(0, 1): `r @ sketch_matrix` is S r."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, dim, generator=generator, dtype=torch.float64).float()


def sketch(residual: Tensor, matrix: Tensor) -> Tensor:
    """Sign bits (uint8, 1 where S r >= 0) of residuals `[blocks, heads, block_len, dim]`."""
    return (apply_tiles(residual, matrix) >= 0).to(torch.uint8)


def expansion(matrix: Tensor) -> Tensor:
    """E `[dim, dim]` with `rms(r) * sign(S r) @ E` an unbiased estimate of r.

        r^ = ||r|| sqrt(pi / 2) / d  S^T sign(S r)

    Its squared error is pi / 2 times ||r||**2 on average: inner products with it are unbiased, but
    it is farther from r than zero is.
    """
    dim = matrix.shape[0]
    return matrix.T * (math.sqrt(math.pi / 2) / math.sqrt(dim))
