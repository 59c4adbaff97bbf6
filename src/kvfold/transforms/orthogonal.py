"""Random rotations, and matrix products whose result does not depend on the batch."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def random_rotation(dim: int, seed: int) -> Tensor:
    """A Haar-distributed orthogonal matrix `[dim, dim]` (float32), the same on every machine.

    The Q of a QR decomposition of a Gaussian matrix, columns signed by R's diagonal (Mezzadri
    2007, arXiv:math-ph/0609050); float64 keeps the result stable to the last float32 bit or two.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


def apply_tiles(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` over fixed tiles `[block_len, dim]`: x `[blocks, heads, block_len, dim]`.

    One product of the same shape for every tile, so that a block's bytes are the same however many
    blocks are encoded at once. `matrix` is `[dim, out]` or `[heads, dim, out]`.
    """
    blocks, heads = x.shape[:2]
    tiles = x.reshape(blocks * heads, *x.shape[2:])
    per_head = matrix if matrix.ndim == 3 else matrix[None]
    if x.device.type == "cpu":
        # a batched product may pick another kernel for another batch size; single ones do not
        out = tiles.new_empty(*tiles.shape[:2], matrix.shape[-1])
        for i, tile in enumerate(tiles):
            torch.mm(tile, per_head[i % len(per_head)], out=out[i])
        return out.unflatten(0, (blocks, heads))
    per_tile = per_head.repeat(blocks, 1, 1) if matrix.ndim == 3 else per_head
    return torch.bmm(tiles, per_tile.expand(len(tiles), -1, -1)).unflatten(0, (blocks, heads))
