"""Walsh-Hadamard rotations against the matrix that defines them."""

import pytest
import torch

from kvfold.transforms.hadamard import hadamard, power_of_two_parts, random_signs


def sylvester(dim: int) -> torch.Tensor:
    """H[i, j] = (-1)**popcount(i & j) / sqrt(dim)."""
    rows = [[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    return torch.tensor(rows, dtype=torch.float64) / dim**0.5


@pytest.mark.parametrize("dim", [1, 2, 64, 80, 96, 128, 160, 256])
def test_equals_the_block_matrix(dim: int) -> None:
    matrix = torch.block_diag(*(sylvester(part) for part in power_of_two_parts(dim)))
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(11_003)).double()
    error = (hadamard(x) - x @ matrix).abs().max().item()
    assert error < 1e-12, f"differs from the matrix by {error}"
    back = (hadamard(hadamard(x)) - x).abs().max().item()
    assert back < 1e-12, f"twice is not the identity: {back}"


def test_parts_add_up() -> None:
    found = {dim: power_of_two_parts(dim) for dim in (64, 80, 96, 160, 192)}
    expected = {64: (64,), 80: (64, 16), 96: (64, 32), 160: (128, 32), 192: (128, 64)}
    assert found == expected, f"{found}"


def test_rows_do_not_see_each_other() -> None:
    x = torch.randn(37, 96, generator=torch.Generator().manual_seed(11_004))
    alone = torch.stack([hadamard(row) for row in x])
    assert torch.equal(hadamard(x), alone), f"{int((hadamard(x) != alone).sum())} entries differ"


def test_random_signs_are_signs_of_their_seed() -> None:
    signs = random_signs(4096, 3)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 0.06, f"mean {signs.mean()}"
    assert torch.equal(signs, random_signs(4096, 3))
    assert not torch.equal(signs, random_signs(4096, 4))
