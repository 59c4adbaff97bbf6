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


@pytest.mark.parametrize(
    ("bits", "max_1960"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)]
)
def test_uniform_levels_cost_what_max_says(bits: int, max_1960: float) -> None:
    """Max, "Quantizing for minimum distortion" (1960), Table II; a little less on a sphere."""
    x = unit_vectors(256)
    error = (through(TurboQuant(bits, "none", levels="uniform"), x) - x).square().sum(-1).mean()
    assert 0.95 * max_1960 < error < 1.01 * max_1960, f"{error:.4f}, {max_1960} in Max"
    more = error / (through(TurboQuant(bits, "none"), x) - x).square().sum(-1).mean()
    assert 0.999 < more < 1.24, f"{more:.3f} times the error of Lloyd-Max levels"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("side", ["key", "value"])
def test_uniform_levels_are_read_as_digits(bits: int, side: str) -> None:
    """So that kernels multiply them: no table, and columns of 2 and of 1 bit at 3 bits."""
    bound = TurboQuant(bits, levels="uniform").bind(Site(side, 2, 64, 64))
    assert bound.stored is not None
    assert bound.stored.levels is None
    fields = bound.encode(unit_vectors(64), POSITIONS)
    reading = bound.read(fields, POSITIONS)
    assert torch.equal(reading.columns, bound.plan.columns(fields).float())
    assert reading.columns.shape[-1] == (128 if bits == 3 else 64)
    assert reading.columns.max() == (3 if bits == 3 else 2**bits - 1)
    assert bound.plan.unpack(fields).unique().tolist() == list(range(2**bits))


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


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_take_no_bits(bits: int) -> None:
    found = kvfold.get(f"turboquant{bits}-uniform").bits_per_element(head_dim=128)
    assert found == bits + 16 / 128, f"{found}"


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
    with pytest.raises(CodecError, match="levels are 'lloyd-max' or 'uniform', not 'log'"):
        revalidate(TurboQuant(), levels="log")
    with pytest.raises(CodecError, match="with qjl=True they must be 'lloyd-max'"):
        TurboQuant(3, "none", qjl=True, levels="uniform")
