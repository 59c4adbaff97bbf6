"""Random rotations, and tiles whose products do not depend on the batch."""

import pytest
import torch

from kvfold.transforms.orthogonal import apply_tiles, random_rotation


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_rotation_is_orthogonal_and_repeatable(dim: int) -> None:
    r = random_rotation(dim, 7)
    error = (r.double() @ r.double().T - torch.eye(dim)).abs().max().item()
    assert error < 1e-5, f"R R^T differs from 1 by {error}"
    assert torch.equal(r, random_rotation.__wrapped__(dim, 7))
    assert not torch.equal(r, random_rotation(dim, 8))


def test_rotation_is_haar_distributed() -> None:
    """Coordinates of a rotated basis vector look like those of a random unit vector."""
    columns = torch.stack([random_rotation(64, 500 + s)[:, 0] for s in range(40)]) * 8
    mean, fourth = columns.mean().item(), columns.pow(4).mean().item()
    assert abs(mean) < 0.06, f"mean {mean}: R's diagonal was not signed"
    assert abs(fourth - 3 * 64 / 66) < 0.4, f"fourth moment {fourth}, {3 * 64 / 66:.3f} expected"


@pytest.mark.parametrize("per_head", [False, True])
def test_tiles_equal_the_product_and_ignore_their_batch(per_head: bool) -> None:
    generator = torch.Generator().manual_seed(12_001)
    x = torch.randn(5, 3, 32, 80, generator=generator)
    matrix = torch.randn(*((3,) if per_head else ()), 80, 48, generator=generator)
    found = apply_tiles(x, matrix)
    error = (found - x.double() @ matrix.double()).abs().max().item()
    assert error < 1e-4, f"differs from the product by {error}"
    alone = torch.cat([apply_tiles(block[None], matrix) for block in x])
    assert torch.equal(found, alone), f"{int((found != alone).sum())} entries depend on the batch"
