"""The three plain codecs: exact, e4m3, and int8."""

import pytest
import torch

import kvfold
from kvfold.codec import Site

POSITIONS = torch.arange(64)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_is_exact_in_the_models_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(31_001)).to(dtype)
    codec = kvfold.get("identity").keys.bind(Site("key", 2, 64, 64, dtype=dtype))
    fields = codec.encode(x, POSITIONS)
    assert fields["states"].dtype == dtype
    assert torch.equal(codec.decode(fields, POSITIONS), x.float())


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    """e4m3 (arXiv:2209.05433, Table 1): 3 mantissa bits, so at most 2**-4 of a normal value."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(31_002))
    codec = kvfold.get("fp8").values.bind(Site("value", 2, 64, 64))
    fields = codec.encode(x, POSITIONS)
    decoded = codec.decode(fields, POSITIONS)
    normal = x.abs() > 2**-6 * fields["gain"].float()[..., None]
    error = ((decoded - x).abs() / x.abs())[normal].max().item()
    # half a unit of the last of 3 bits; float16 rounding of the scale may clip the largest a little
    assert 0.9 * 2**-4 < error <= 2**-4 + 1e-3, f"relative error {error}"
    largest = fields["states"].float().abs().amax(-1)
    assert largest.min() > 440, f"a token's largest channel is stored as {largest.min()}, not 448"


@pytest.mark.parametrize("side", ["key", "value"])
def test_int8_zero_row_gives_zeros_and_leaves_its_neighbours(side: str) -> None:
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(31_003))
    x[0, 1, 7] = 0.0
    codec = kvfold.get("int8").keys.bind(Site(side, 2, 64, 64))
    decoded = codec.decode(codec.encode(x, POSITIONS), POSITIONS)
    assert decoded[0, 1, 7].abs().max() == 0, f"{decoded[0, 1, 7]}"
    error = (decoded - x).abs() / x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    worst = error.max().item()
    # half of 1/127 and the rounding of the scale
    assert worst < 0.5 / 127 + 1e-3, f"error {worst} of a token's largest channel"


def test_int8_bits_at_head_dim_64() -> None:
    bits = kvfold.get("int8").bits_per_element(num_kv_heads=3, head_dim=64)
    assert bits == 8.25, f"{bits}"
