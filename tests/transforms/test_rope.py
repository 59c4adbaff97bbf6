"""RoPE against complex numbers."""

import pytest
import torch

from kvfold.transforms.rope import Rope

FREQUENCIES = tuple(1e4 ** (-i / 32) for i in range(32))


def naive(x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    half, out = len(rope.inv_freq), x.double().clone()
    angle = positions[:, None, :, None].double() * torch.tensor(rope.inv_freq).double()
    for i in range(half):
        a, b = (i, i + half) if rope.pairs == "half" else (2 * i, 2 * i + 1)
        z = torch.complex(x[..., a].double(), x[..., b].double())
        z = z * torch.polar(torch.full_like(angle[..., i], rope.scaling), angle[..., i])
        out[..., a], out[..., b] = z.real, z.imag
    return out


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("head_dim", [64, 80])  # 80: the last 16 channels pass through
def test_equals_complex_rotation_and_is_undone(pairs: str, head_dim: int) -> None:
    rope = Rope(FREQUENCIES, 1.3, pairs)
    x = torch.randn(2, 3, 16, head_dim, generator=torch.Generator().manual_seed(14_001))
    positions = torch.stack((torch.arange(16), torch.arange(16) * 3 + 100))
    turned = rope.rotate(x, positions)
    error = (turned - naive(x, positions, rope)).abs().max().item()
    assert error < 2e-4, f"differs from complex rotation by {error}"
    assert torch.equal(turned[..., 64:], x[..., 64:]), "channels beyond rotary_dim changed"
    back = (rope.unrotate(turned, positions) - x).abs().max().item()
    assert back < 2e-6, f"unrotate leaves {back}"


def test_scores_depend_on_distance_alone() -> None:
    rope = Rope(FREQUENCIES)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(14_002))
    at = [torch.tensor([[n]]) for n in (3, 10, 503, 510)]
    near = (rope.rotate(q, at[1]) * rope.rotate(k, at[0])).sum().item()
    far = (rope.rotate(q, at[3]) * rope.rotate(k, at[2])).sum().item()
    assert abs(near - far) < 1e-3, f"{near} at 3 and 10, {far} at 503 and 510"


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_no_frequencies_is_no_rotation(pairs: str) -> None:
    x = torch.randn(1, 2, 16, 64, generator=torch.Generator().manual_seed(14_003))
    positions = torch.arange(16)[None]
    for turned in (Rope((), 1.0, pairs).rotate(x, positions), Rope(()).unrotate(x, positions)):
        assert torch.equal(turned, x), f"changed by {(turned - x).abs().max()}"
