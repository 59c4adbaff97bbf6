"""TurboQuant: the paper's distortions, and the norm corrected after quantising."""

import math

import pytest
import torch

import kvfold
from kvfold.codec import Codec, CodecError, Site
from kvfold.codecs.turboquant import TurboQuant

POSITIONS = torch.arange(256).view(4, 64)


def unit_vectors(dim: int, seed: int = 33_001) -> torch.Tensor:
    x = torch.randn(4, 2, 64, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def through(codec: TurboQuant, x: torch.Tensor, side: str = "key") -> torch.Tensor:
    bound = codec.bind(Site(side, x.shape[1], x.shape[-1], 64))
    return bound.decode(bound.encode(x, POSITIONS), POSITIONS)


@pytest.mark.parametrize(("bits", "paper"), [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_mse_is_that_of_theorem_1(bits: int, paper: float) -> None:
    """arXiv:2504.19874, Theorem 1: D_mse = 0.36, 0.117, 0.03, 0.009 at 1 to 4 bits (rounded)."""
    x = unit_vectors(256)
    error = (through(TurboQuant(bits, "none"), x) - x).square().sum(-1).mean().item()
    assert 0.93 * paper < error < 1.18 * paper, f"D_mse {error:.4f}, the paper has {paper}"


@pytest.mark.parametrize(("bits", "paper"), [(2, 0.56), (3, 0.18), (4, 0.047)])
def test_product_error_is_that_of_theorem_2(bits: int, paper: float) -> None:
    """arXiv:2504.19874, Theorem 2: D_prod = 0.56/d, 0.18/d, 0.047/d at 2 to 4 bits, unbiased."""
    dim, x, q = 256, unit_vectors(256), unit_vectors(256, 33_002)
    decoded = through(TurboQuant(bits, "none", qjl=True), x)
    error = ((decoded - x) * q).sum(-1)
    found = dim * error.square().mean().item()
    assert 0.85 * paper < found < 1.2 * paper, f"D_prod {found:.4f}/d, the paper has {paper}/d"
    bias = (decoded * x).sum(-1).mean().item()
    assert abs(bias - 1) < 0.02, f"<x^, x> is {bias:.4f} of ||x||**2 on average"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_norm_is_corrected_after_quantising(bits: int) -> None:
    x = unit_vectors(64) * 5
    x[..., 3] *= 30  # a direction that a rotation makes uneven
    ratio = {
        kind: through(TurboQuant(bits, kind), x).norm(dim=-1) / x.norm(dim=-1)
        for kind in ("norm", "none")
    }
    worst = (ratio["norm"] - 1).abs().max().item()
    assert worst < 1e-3, f"a norm is {worst:.4f} off"
    shrunk = (ratio["none"] - 1).abs().mean().item()
    assert shrunk > 5 * 1e-3, f"without correction {shrunk:.4f}: this test shows nothing"


@pytest.mark.parametrize("bits", [2, 4])
def test_least_squares_has_the_least_error(bits: int) -> None:
    x = unit_vectors(64)
    error = {
        kind: (through(TurboQuant(bits, kind), x) - x).square().sum(-1)
        for kind in ("norm", "none", "least-squares")
    }
    for kind in ("norm", "none"):
        excess = (error["least-squares"] - error[kind]).max().item()
        assert excess < 2e-5, f"{kind} is better by {excess} somewhere"


def test_rotation_spreads_one_huge_channel() -> None:
    """The reason for rotating: an outlier costs no more than any other direction."""
    x = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(33_003))
    x[..., 9] = 50.0
    error = (through(TurboQuant(4), x) - x).square().sum() / x.square().sum()
    assert error < 0.02, f"nmse {error:.4f} with a huge channel"


def test_bits_at_head_dim_64() -> None:
    names = ("turboquant4", "turboquant3", "turboquant2", "turboquant3-qjl")
    bits = [kvfold.get(name).bits_per_element(num_kv_heads=3, head_dim=64) for name in names]
    assert bits == [4.25, 3.25, 2.25, 3.5], f"{bits}"


def test_the_sketch_loses_at_more_bits() -> None:
    """The record that the variant is kept for: 3.5 bits with a sketch against 3.25 without."""
    x = unit_vectors(64)
    plain = (through(TurboQuant(3), x) - x).square().sum(-1).mean().item()
    sketched = (through(TurboQuant(3, "none", qjl=True), x) - x).square().sum(-1).mean().item()
    assert sketched > 4 * plain, f"{sketched:.4f} with a sketch, {plain:.4f} without"
    assert abs(sketched / (0.1175 * math.pi / 2) - 1) < 0.15, f"{sketched:.4f}"


def revalidate(codec: Codec, **knobs: object) -> None:
    """Validate knobs of any type, as a user without type checks meets it."""
    other = object.__new__(type(codec))
    vars(other).update(vars(codec) | knobs)
    other.__post_init__()


def test_knobs_are_checked() -> None:
    with pytest.raises(CodecError, match="1 to 4 bits, not 5"):
        TurboQuant(5)
    with pytest.raises(CodecError, match=r"2 to 4 bits \(one of them the sketch's\), not 1"):
        TurboQuant(1, "none", qjl=True)
    with pytest.raises(CodecError, match="norm_correction is 'norm', 'least-squares' or 'none'"):
        revalidate(TurboQuant(), norm_correction="both")
    with pytest.raises(CodecError, match="it must be 'none'"):
        TurboQuant(3, "norm", qjl=True)
