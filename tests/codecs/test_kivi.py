"""KIVI: groups closed before they are quantised, each with its own scale and zero."""

import pytest
import torch

import kvfold
from kvfold.codec import Codec, CodecError, Site
from kvfold.codecs.kivi import Kivi


def naive(x: torch.Tensor, bits: int, group: int, axis: str) -> torch.Tensor:
    """Eq. 1 of the paper, group by group."""
    out = x.clone()
    blocks, heads, tokens, dim = x.shape
    for n in range(blocks):
        for h in range(heads):
            for i in range(0, tokens if axis == "token" else dim, group):
                for j in range(dim if axis == "token" else tokens):
                    part = (slice(i, i + group), j) if axis == "token" else (j, slice(i, i + group))
                    values = x[n, h][part]
                    z = values.min().half().float()
                    s = ((values.max() - values.min()) / (2**bits - 1)).half().float()
                    q = ((values - z) / s).round().clamp(0, 2**bits - 1)
                    out[n, h][part] = q * s + z
    return out


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_equals_equation_1_group_by_group(axis: str, side: str) -> None:
    # groups of very different sizes: shared or averaged parameters would be far off
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(32_001))
    x = x * torch.logspace(-2, 1, 64)[None, None, :, None] * torch.logspace(1, -2, 64) + 3
    codec = Kivi(2, 32, axis).bind(Site(side, 2, 64, 64))
    positions = torch.arange(64)[None]
    decoded = codec.decode(codec.encode(x, positions), positions)
    error = (decoded - naive(x, 2, 32, axis)).abs().max().item()
    assert error < 1e-5, f"differs from the equation by {error}"


def test_each_group_has_its_own_scale_and_zero() -> None:
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, :32] = torch.linspace(0, 3, 32)[:, None]
    x[0, 0, 32:] = torch.linspace(100, 130, 32)[:, None]
    codec = Kivi(2, 32, "token").bind(Site("key", 1, 64, 64))
    fields = codec.encode(x, torch.arange(64)[None])
    found = (fields["scale"][0, 0, :, 0].tolist(), fields["zero"][0, 0, :, 0].tolist())
    assert found == ([1.0, 10.0], [0.0, 100.0]), f"{found}"


def test_bits_count_scales_and_zeros() -> None:
    """Groups of 32 with two float16 parameters cost one whole bit per element."""
    names = ("kivi2-g32", "kivi2-g64", "kivi4-g32", "kivi4-g64")
    bits = [kvfold.get(name).bits_per_element(num_kv_heads=3, head_dim=64) for name in names]
    assert bits == [3.0, 2.5, 5.0, 4.5], f"{bits}"


def test_the_exact_window_may_not_be_shorter_than_a_group() -> None:
    preset = kvfold.get("kivi2-g64")
    assert (preset.keys.group_len, preset.values.group_len) == (64, 1)


def revalidate(codec: Codec, **knobs: object) -> None:
    """Validate knobs of any type, as a user without type checks meets it."""
    other = object.__new__(type(codec))
    vars(other).update(vars(codec) | knobs)
    other.__post_init__()


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(
        CodecError, match=r"head_dim \(80\) must be a multiple of group_size \(32\)"
    ):
        Kivi(2, 32, "channel").bind(Site("value", 1, 80, 64))
    with pytest.raises(
        CodecError, match=r"block_len \(48\) must be a multiple of group_size \(32\)"
    ):
        Kivi(2, 32, "token").bind(Site("key", 1, 64, 48))
    with pytest.raises(CodecError, match="1 to 8 bits, not 9"):
        Kivi(9)
    with pytest.raises(CodecError, match="'token' or 'channel', not 'head'"):
        revalidate(Kivi(), group_axis="head")
