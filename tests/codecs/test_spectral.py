"""`spectral`: the eigenbasis is found, widths are water-filled, the sketch is selective."""

import pytest
import torch
from torch import Tensor

import kvfold
from kvfold.codec import BoundCodec, CodecError, ExampleTables, Site
from kvfold.codecs.spectral import Spectral

HEADS, DIM, TOKENS = 2, 64, 6000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(seed: int = 81_001, tokens: int = TOKENS, tails: bool = False) -> Tensor:
    """`[1, heads, tokens, dim]` with a mean, and variances over four decades in a hidden basis."""
    hidden = generator(81_000)
    basis = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=hidden))[0]
    sigma = torch.logspace(0.5, -1.5, DIM)
    mean = 5 * torch.randn(HEADS, 1, DIM, generator=hidden)
    z = torch.randn(HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))
    if tails:  # a Laplace density
        u = torch.rand(z.shape, generator=torch.Generator().manual_seed(seed + 1)) - 0.5
        z = -u.sign() * (1 - 2 * u.abs()).clamp_min(1e-7).log() / 2**0.5
    return ((z * sigma) @ basis + mean)[None]


def fitted(codec: Spectral, side: str = "value", **more) -> BoundCodec:
    site = Site(side, HEADS, DIM, 128)  # type: ignore[arg-type]
    calibrator = codec.calibrator(site)
    x = correlated(**more)
    for part in x.split(1500, 2):
        calibrator.add(part, torch.arange(part.shape[2])[None])
    return codec.bind(site, ExampleTables(calibrator.tables()))


def error(code: BoundCodec, **more) -> float:
    x = correlated(81_500, 1280, **more)
    blocks = x.unflatten(2, (-1, 128))[0].transpose(0, 1)
    positions = torch.arange(1280).view(-1, 128)
    rest = code.decode(code.encode(blocks, positions), positions) - blocks
    power = (x - x.mean(2, keepdim=True)).square().mean()
    return (rest.square().mean() / power).item()


def test_error_is_that_of_water_filling() -> None:
    """Close to the reverse water-filling bound times the Lloyd-Max loss; far below a flat code."""
    sigma = torch.logspace(0.5, -1.5, DIM).double().square()
    codec = Spectral(3.0)
    widths, _ = codec.widths(sigma.expand(2, -1), "value")
    left = torch.tensor([1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000644]).double()
    expected = ((sigma * left[widths[0]]).sum() / sigma.sum()).item()
    found = error(fitted(codec))
    assert 0.9 * expected < found < 1.1 * expected, f"{found:.5f}, expected {expected:.5f}"
    assert found < 0.03454 / 3, f"{found:.5f} is hardly below a flat code's 0.0345"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_exactly_its_bits(bits: int) -> None:
    preset = kvfold.get(f"spectral{bits}")
    for heads, dim in ((3, 64), (8, 128)):
        assert preset.bits_per_element(num_kv_heads=heads, head_dim=dim) == bits
    code = fitted(Spectral(float(bits)))
    assert code.layout.nbytes * 8 / (HEADS * DIM * 128) == bits


def test_fitted_codebooks_beat_gaussian_ones_on_heavy_tails() -> None:
    codec = Spectral(2.0)
    site = Site("value", HEADS, DIM, 128)
    calibrator = codec.calibrator(site)
    calibrator.add(correlated(tails=True), torch.arange(TOKENS)[None])
    made = calibrator.tables()
    gaussian = made | {"levels": codec.example(site).tables["levels"]}
    own, other = (
        error(codec.bind(site, ExampleTables(tables)), tails=True) for tables in (made, gaussian)
    )
    assert own < 0.95 * other, f"{own:.4f} fitted, {other:.4f} Gaussian"


def test_effective_dimension() -> None:
    variances = torch.tensor([[1.0] * 8 + [1e-4] * 56, [1.0] * 64])
    assert Spectral(coverage=0.99).effective_dim(variances).tolist() == [8, 64]
    by_share = Spectral(effective="participation").effective_dim(variances)
    # 8.01 coordinates round up to a whole group
    assert by_share.tolist() == [16, 64]


def test_noise_bits_are_the_tails_width() -> None:
    variances = torch.tensor([[1.0] * 8 + [1e-4] * 56])
    codec = Spectral(2.0, noise_bits=1, value_noise_bits=0)
    keys, values = (codec.widths(variances, side)[0][0] for side in ("key", "value"))
    assert keys[8:].tolist() == [1] * 56
    assert keys[:8].sum() <= 48
    assert values[8:].tolist() == [0] * 56
    assert values[:8].tolist() == [6] * 8


def test_sketch_is_selective_and_costs_more_error() -> None:
    """QJL on the effective coordinates alone: reading agrees with decoding; error is worse."""
    codec = Spectral(3.0, qjl=True, coverage=0.9)
    code = fitted(codec, "key")
    fields = code.encode(correlated(81_502, 128), torch.arange(128)[None])
    assert fields["signs1"].numel() * 16 < 128 * HEADS * DIM  # not every coordinate
    assert error(code) > error(fitted(Spectral(3.0), "key"))


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_gain_follows_the_tokens(scope: str) -> None:
    """Where tokens differ in size, a byte of gain is worth more than the bits it costs."""
    size = (0.7 * torch.randn(1, HEADS, TOKENS, 1, generator=generator(81_700))).exp()
    x = correlated() * size
    site = Site("value", HEADS, DIM, 128)
    blocks, positions = x[:, :, :1280].unflatten(2, (-1, 128))[0].transpose(0, 1), torch.arange(128)
    positions = positions.expand(len(blocks), -1)
    errors = []
    for gain in (False, True):
        codec = Spectral(3.0, scope=scope, gain=gain)  # type: ignore[arg-type]
        calibrator = codec.calibrator(site)
        calibrator.add(x, torch.arange(TOKENS)[None])
        code = codec.bind(site, ExampleTables(calibrator.tables()))
        assert code.layout.nbytes * 8 == 3 * HEADS * DIM * 128
        rest = code.decode(code.encode(blocks, positions), positions) - blocks
        errors.append(rest.square().mean().item())
    assert errors[1] < 0.75 * errors[0], f"{errors[1]:.4f} with a gain, {errors[0]:.4f} without"


def test_a_layers_budget_goes_to_the_wider_head() -> None:
    variances = torch.tensor([[1.0] * DIM, [1e-2] * DIM])
    alone = Spectral(3.0).widths(variances, "value")[0].sum(1)
    shared = Spectral(3.0, scope="layer").widths(variances, "value")[0].sum(1)
    assert alone.tolist() == [3 * DIM, 3 * DIM]
    assert shared.sum() == 6 * DIM
    assert shared[0] > shared[1] + 2 * DIM


def test_stated_errors() -> None:
    with pytest.raises(CodecError, match="gain and qjl exclude each other"):
        Spectral(3.0, gain=True, qjl=True)
    wrong = object.__new__(Spectral)  # the tests' type checker refuses it at the constructor
    vars(wrong).update(vars(Spectral(3.0)) | {"scope": "model"})
    with pytest.raises(CodecError, match="scope is 'head' or 'layer', not 'model'"):
        wrong.__post_init__()
    with pytest.raises(CodecError, match="kvfold calibrate --model M --preset spectral3"):
        Spectral(3.0).bind(Site("key", 2, 64))
    with pytest.raises(CodecError, match="at most 6 bits, not 7"):
        Spectral(7.0)
    codec = Spectral(3.0)
    other = codec.example(Site("key", 2, 64))
    with pytest.raises(
        CodecError, match=r"are for \(2, 64\); the layer has \[heads, dim\] \(4, 64\)"
    ):
        codec.bind(Site("key", 4, 64), other)
