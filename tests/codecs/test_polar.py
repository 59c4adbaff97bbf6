"""Polar codes: true packing, uniform angles, codebooks, and the sketch that is off by default."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import kvfold
from kvfold.codec import Codec, CodecError, Site
from kvfold.codecs.polar import Polar
from kvfold.quantizers.lloyd_max import rayleigh_levels

POSITIONS = torch.arange(256).view(4, 64)


class Tables:
    """An artefact of one layer."""

    def __init__(self, **tables: torch.Tensor) -> None:
        self.tables = tables

    def at(self, layer: int, side: str) -> dict[str, torch.Tensor]:
        return self.tables


def states(dim: int = 64) -> torch.Tensor:
    return torch.randn(4, 2, 64, dim, generator=torch.Generator().manual_seed(34_001)) * 2.5


def through(codec: Polar, x: torch.Tensor, artefact: Any = None) -> torch.Tensor:
    bound = codec.bind(Site("key", x.shape[1], x.shape[-1], 64), artefact)
    return bound.decode(bound.encode(x, POSITIONS), POSITIONS)


def nmse(decoded: torch.Tensor, x: torch.Tensor) -> float:
    return ((decoded - x).square().mean() / x.square().mean()).item()


@pytest.mark.parametrize(("radius", "angle"), [(1, 1), (2, 2), (3, 3), (4, 4), (2, 4)])
def test_codes_are_really_packed(radius: int, angle: int) -> None:
    bound = Polar(radius, angle).bind(Site("value", 2, 64, 64))
    fields = bound.encode(states(), POSITIONS)
    codes = sum(f.numel() * f.element_size() for n, f in fields.items() if n != "gain")
    per_pair = 8 * codes / (states().numel() / 2)
    assert per_pair == radius + angle, f"{per_pair} bits a pair"


def test_bits_at_head_dim_64() -> None:
    names = [f"polar-{form}" for form in ("r4a4", "r3a3", "r2a4", "r2a2", "r1a1")]
    bits = [kvfold.get(name).bits_per_element(num_kv_heads=3, head_dim=64) for name in names]
    assert bits == [4.25, 3.25, 3.25, 2.25, 1.25], f"{bits}"


def test_angles_are_uniform_after_preconditioning() -> None:
    """PolarQuant, arXiv:2502.02617, Section 3: first-level angles are uniform on [0, 2 pi)."""
    x = torch.ones(4, 2, 64, 128) * torch.linspace(-3, 3, 128)  # far from Gaussian before
    x = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(34_002))
    x = x * torch.where(
        torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.5, 1, -1
    )
    bound = Polar(4, 3).bind(Site("key", 2, 128, 64))
    codes = bound.angle_plan.unpack(bound.encode(x, POSITIONS), "angle")
    share = codes.flatten().long().bincount(minlength=8) / codes.numel()
    off = (share * 8 - 1).abs().max().item()
    assert off < 0.05, f"shares of the sectors {share.tolist()}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_sectors_equal_those_of_atan2(bits: int) -> None:
    x = states()
    bound = Polar(8, bits).bind(Site("key", 2, 64, 64))
    decoded = bound.decode(bound.encode(x, POSITIONS), POSITIONS)
    from kvfold.transforms.hadamard import hadamard

    y, z = hadamard(x * bound.signs), hadamard(decoded * bound.signs)
    turn = torch.atan2(y[..., 1::2], y[..., ::2]) - torch.atan2(z[..., 1::2], z[..., ::2])
    turn = torch.remainder(turn + math.pi, 2 * math.pi) - math.pi
    worst = turn.abs().max().item() / (math.pi / 2**bits)
    assert 0.98 < worst < 1.001, f"an angle is {worst} of half a sector off"


def test_the_sketch_is_off_by_default_and_loses_at_equal_bits() -> None:
    assert Polar().qjl_rounds == 0
    for preset in kvfold.presets().values():
        if isinstance(preset.keys, Polar):
            assert preset.keys.qjl_rounds == 0, preset.name
    x = states()
    plain = nmse(through(Polar(3, 4), x), x)  # 3.5 bits of codes
    sketched = nmse(through(Polar(2, 3, qjl_rounds=1), x), x)  # 2.5 bits and a sign
    assert sketched > 3 * plain, f"{sketched:.4f} with a sketch, {plain:.4f} without"


def test_rounds_of_the_sketch_refine_when_fitted() -> None:
    x = states()
    errors = [
        nmse(through(Polar(2, 2, qjl_rounds=k, sketch_gain="least-squares"), x), x)
        for k in range(4)
    ]
    ratios = [b / a for a, b in pairwise(errors)]
    least = 1 - 1 / (1 + math.pi / 2)
    assert ratios == pytest.approx([least] * 3, abs=0.03), f"{ratios}, {least:.3f} expected"
    unbiased = nmse(through(Polar(2, 2, qjl_rounds=1), x), x) / errors[0]
    assert abs(unbiased / (math.pi / 2) - 1) < 0.1, f"the unbiased round multiplies by {unbiased}"
    fields = Polar(2, 2, qjl_rounds=3).bind(Site("key", 2, 64, 64)).layout.fields
    sketched = {f.name: f.nbytes for f in fields if f.name.startswith(("sketch", "residual"))}
    expected = {f"sketch{k}_1": 2 * 64 * 64 // 8 for k in range(3)} | {"residual": 2 * 64 * 3 * 2}
    assert sketched == expected, f"{sketched}"


@pytest.mark.parametrize("rounds", [1, 3])
def test_sketches_read_on_codes(rounds: int) -> None:
    x = states()
    bound = Polar(2, 2, qjl_rounds=rounds).bind(Site("key", 2, 64, 64))
    fields = bound.encode(x, POSITIONS)
    q = torch.randn(1, 2, 3, 64, generator=torch.Generator().manual_seed(34_003))
    reading, query = bound.read(fields, POSITIONS), bound.query(q, fields, POSITIONS)
    runs = (query.columns[:, :, 0].unflatten(-1, (rounds + 1, 64)),
            reading.columns.unflatten(-1, (rounds + 1, 64)))  # fmt: skip
    found = torch.einsum("nhqgc,nhtgc,nhtg->nhqt", *(r.expand(4, *r.shape[1:]) for r in runs),
                         reading.gain)  # fmt: skip
    expected = q @ bound.decode(fields, POSITIONS).mT
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, f"scores differ by {error}"


def test_codebooks_of_an_artefact_are_used() -> None:
    x = states()
    plain = through(Polar(2, 2), x)
    same = through(Polar(2, 2), x, Tables(radius_levels=rayleigh_levels(2)))
    assert torch.equal(plain, same), "Rayleigh levels as a codebook change the code"
    centres = (torch.arange(4) + 0.5) * math.pi / 2
    sectors = through(Polar(2, 2), x, Tables(angle_levels=centres))
    error = (sectors - plain).abs().max().item()
    assert error < 1e-4, f"sector centres as a codebook change the states by {error}"
    other = through(Polar(2, 2), x, Tables(radius_levels=rayleigh_levels(2) * 1.5))
    assert nmse(other, x) > 1.1 * nmse(plain, x), "another codebook is ignored"
    uneven = torch.tensor([-3.1, -0.2, 0.1, 3.1])  # nearest around the circle, -3.1 beside 3.1
    bound = Polar(4, 2).bind(Site("key", 2, 64, 64), Tables(angle_levels=uneven))
    a = torch.tensor([-1.0, -1.0, 1.0]).expand(1, 1, 1, 3)
    b = torch.tensor([0.001, -0.001, 0.0]).expand(1, 1, 1, 3)
    found = bound._nearest_angle(a, b).flatten().tolist()
    assert found == [3, 0, 2], f"{found}"


def test_calibrated_radii_are_better_where_radii_are_not_rayleigh() -> None:
    # two channels far above the others: the rotated coordinates are no longer Gaussian
    x = states()
    x[..., :2] *= 12
    calibrator = Polar(2, 4).calibrator(Site("key", 2, 64, 64))
    for i in range(4):
        calibrator.add(x[i : i + 1], POSITIONS[i : i + 1])
    tables = calibrator.tables()
    other = x.flip(0) * torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
    plain, fitted = (nmse(through(Polar(2, 4), other, a), other) for a in (None, Tables(**tables)))
    assert fitted < 0.97 * plain, f"{fitted:.4f} with a codebook, {plain:.4f} with Rayleigh's"
    gaussian = Polar(2, 4).calibrator(Site("key", 2, 64, 64))
    gaussian.add(states(), POSITIONS)
    off = (gaussian.tables()["radius_levels"] - rayleigh_levels(2)).abs().max().item()
    assert off < 0.08, f"levels of Gaussian states are {off} from Rayleigh's"


def revalidate(codec: Codec, **knobs: object) -> None:
    """Validate knobs of any type, as a user without type checks meets it."""
    other = object.__new__(type(codec))
    vars(other).update(vars(codec) | knobs)
    other.__post_init__()


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(CodecError, match=r"radius_levels of layer 3 have shape \(8,\).*\(4,\)"):
        Polar(2, 2).bind(Site("key", 2, 64, 64, layer=3), Tables(radius_levels=torch.ones(8)))  # pyright: ignore
    with pytest.raises(CodecError, match=r"head_dim \(65\) must be even"):
        Polar().bind(Site("key", 2, 65, 64))
    with pytest.raises(CodecError, match="angle_bits is 1 to 8, not 0"):
        Polar(2, 0)
    with pytest.raises(CodecError, match="qjl_rounds is 0 to 3, not 4"):
        Polar(qjl_rounds=4)
    with pytest.raises(CodecError, match="'unbiased' or 'least-squares', not 'none'"):
        revalidate(Polar(), sketch_gain="none")
