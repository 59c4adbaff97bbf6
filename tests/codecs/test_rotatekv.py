"""RotateKV: every channel stored, rotation applied and undone, an order per group of heads."""

from typing import Any

import pytest
import torch

import kvfold
from kvfold.codec import CodecError, Site
from kvfold.codecs.rotatekv import BoundRotateKV, RotateKV, channel_order
from kvfold.transforms.hadamard import hadamard
from kvfold.transforms.rope import Rope

POSITIONS = torch.arange(128).view(2, 64) + 1000


class Tables:
    """An artefact of one layer."""

    def __init__(self, **tables: torch.Tensor) -> None:
        self.tables = tables

    def at(self, layer: int, side: str) -> dict[str, torch.Tensor]:
        return self.tables


def rope(dim: int) -> Rope:
    return Rope(tuple(1e4 ** (-2 * i / dim) for i in range(dim // 2)))


def bind(heads: int = 4, dim: int = 64, artefact: Any = None, **knobs: Any) -> BoundRotateKV:
    return RotateKV(**knobs).bind(Site("key", heads, dim, 64, rope=rope(dim)), artefact)


def states(heads: int = 4, dim: int = 64, seed: int = 35_001) -> torch.Tensor:
    return torch.randn(2, heads, 64, dim, generator=torch.Generator().manual_seed(seed))


def keys_with_means(heads: int = 4, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Post-RoPE keys, 3/4 of whose pre-RoPE energy is a constant, as in real models; and it."""
    mean = 1.7 * torch.randn(heads, 1, dim, generator=torch.Generator().manual_seed(35_002))
    return rope(dim).rotate(states(heads, dim) + mean, POSITIONS), mean[:, 0]


def through(codec: BoundRotateKV, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x, POSITIONS), POSITIONS)


def nmse(decoded: torch.Tensor, x: torch.Tensor) -> float:
    return ((decoded - x).square().mean() / x.square().mean()).item()


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 96])
def test_every_channel_is_stored(heads: int, dim: int) -> None:
    """Each channel of each head and row comes back: no channel, head or row is dropped or mixed."""
    x = torch.zeros(2, heads, 64, dim)
    # a different channel for each token, a different size for each head and row
    for t in range(64):
        x[:, :, t, t % dim] = 1.0 + torch.arange(2 * heads).view(2, heads)
    codec = bind(heads, dim, bits=8)
    worst = (through(codec, x) - x).abs().max().item()
    assert worst < 0.2, f"a channel is off by {worst}"


@pytest.mark.parametrize("ordered", [False, True])
def test_rotation_is_applied_and_inverted(ordered: bool) -> None:
    x = states()
    order = torch.stack([torch.randperm(128, generator=torch.Generator().manual_seed(g))
                         for g in (1, 2)]) if ordered else None  # fmt: skip
    codec = bind(artefact=Tables(channel_order=order) if ordered else None)
    rotated = codec.rotate(x)
    back = (codec.unrotate(rotated) - x).abs().max().item()
    assert back < 1e-5, f"unrotate leaves {back}"
    # against the definition: H across the two heads of a group, then the group's order
    for group in range(2):
        wide = torch.cat((x[:, 2 * group], x[:, 2 * group + 1]), -1)
        y = hadamard(wide)
        y = y if order is None else y[..., order[group]]
        for k in range(2):
            error = (rotated[:, 2 * group + k] - y[..., 64 * k : 64 * (k + 1)]).abs().max().item()
            assert error < 1e-6, f"slice {k} of group {group} differs by {error}"
    assert (rotated - x).abs().mean() > 0.5, "nothing was rotated"


def test_rotation_spreads_an_outlier_channel() -> None:
    """Section 3 of the paper: a channel 20 times the others, before RoPE, ruins codes unrotated."""
    x = states()
    x[..., 5] += 20
    x = rope(64).rotate(x, POSITIONS)
    rotated = nmse(through(bind(bits=4), x), x)
    flat = x.unflatten(-1, (1, 64)).squeeze(-2)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = nmse(((flat - low) / step).round() * step + low, x)
    assert rotated < 0.35 * plain, f"{rotated:.5f} rotated, {plain:.5f} not"


def test_keys_are_coded_before_rope() -> None:
    """A constant pre-RoPE key has the same code at every position; RoPE is back after decoding."""
    constant = states()[:1, :, :1].expand(2, -1, 64, -1)
    x = rope(64).rotate(constant, POSITIONS)
    codec = bind(bits=8)
    codes = codec.plan.unpack(codec.encode(x, POSITIONS)).int()
    spread = (codes - codes[:1, :, :1]).abs().max().item()
    assert spread <= 1, f"codes move by {spread} steps over positions"
    error = nmse(through(codec, x), x)
    assert error < 1e-4, f"nmse {error}"


def test_batch_axis_is_kept() -> None:
    x = torch.cat((states(), 100 + states(seed=35_003)))
    positions = torch.cat((POSITIONS, POSITIONS + 17))
    codec = bind()
    decoded = codec.decode(codec.encode(x, positions), positions)
    for row in range(4):
        alone = codec.decode(
            codec.encode(x[row : row + 1], positions[row : row + 1]), positions[row : row + 1]
        )
        assert torch.equal(decoded[row], alone[0]), f"row {row} depends on the batch"


def test_order_belongs_to_its_group_of_heads() -> None:
    """The right order for each group shortens the steps; swapped between groups it does not."""
    x, mean = keys_with_means()
    order = channel_order(mean.view(2, 128))
    found = {
        name: nmse(through(bind(artefact=tables and Tables(channel_order=tables[0])), x), x)
        for name, tables in (("own", [order]), ("swapped", [order.flip(0)]), ("none", None))
    }
    assert found["own"] < 0.75 * found["none"], f"{found}"
    assert found["own"] < 0.75 * found["swapped"], f"{found}"


def test_calibration_finds_the_order() -> None:
    x, mean = keys_with_means()
    calibrator = RotateKV(4).calibrator(Site("key", 4, 64, 64, rope=rope(64)))
    for row in range(2):
        calibrator.add(x[row : row + 1], POSITIONS[row : row + 1])
    order = calibrator.tables()["channel_order"]
    fresh = rope(64).rotate(states(seed=35_009) + mean[:, None], POSITIONS)
    plain, ordered = (
        nmse(through(bind(artefact=a), fresh), fresh) for a in (None, Tables(channel_order=order))
    )
    assert ordered < 0.8 * plain, f"{ordered:.5f} with the calibrated order, {plain:.5f} without"


def test_channel_order_sorts_the_rotated_means() -> None:
    means = torch.randn(2, 160, generator=torch.Generator().manual_seed(35_004))
    order = channel_order(means)
    assert torch.equal(order.sort(-1).values, torch.arange(160).expand(2, -1)), "no permutation"
    rotated = hadamard(means).gather(-1, order)
    assert (rotated.diff(dim=-1) >= 0).all(), "not ascending"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_really_packed(bits: int) -> None:
    codec = bind(bits=bits)
    fields = codec.encode(states(), POSITIONS)
    stored = sum(f.numel() * f.element_size() for n, f in fields.items() if "digits" in n)
    per_element = 8 * stored / states().numel()
    assert per_element == bits, f"{per_element} bits"
    codes = codec.plan.unpack(fields)
    assert codes.min() == 0, f"{codes.min()}"
    assert codes.max() == 2**bits - 1, f"{codes.max()}"


def test_bits_at_head_dim_64() -> None:
    names = ("rotatekv2", "rotatekv3", "rotatekv4", "rotatekv8")
    bits = [kvfold.get(name).bits_per_element(num_kv_heads=4, head_dim=64) for name in names]
    assert bits == [2.5, 3.5, 4.5, 8.5], f"{bits}"


def test_heads_are_grouped_by_the_largest_divisor() -> None:
    found = {heads: RotateKV(4).heads_per_group(heads) for heads in (1, 2, 3, 4, 8, 9)}
    assert found == {1: 1, 2: 2, 3: 1, 4: 2, 8: 2, 9: 1}, f"{found}"
    assert RotateKV(4, group_heads=4).heads_per_group(6) == 3


@pytest.mark.parametrize("group_heads", [1, 2])
@pytest.mark.parametrize("side", ["key", "value"])
def test_without_rope_codes_are_read_where_heads_are_alone(group_heads: int, side: Any) -> None:
    codec = RotateKV(4, group_heads, before_rope=False).bind(Site(side, 4, 64, 64))
    x = states()
    fields = codec.encode(x, POSITIONS)
    reading, decoded = codec.read(fields, POSITIONS), codec.decode(fields, POSITIONS)
    on_codes = not torch.equal(reading.columns, decoded)
    assert on_codes == (group_heads == 1), f"columns {tuple(reading.columns.shape)}"
    q = torch.randn(1, 4, 3, 64, generator=torch.Generator().manual_seed(35_005))
    query = codec.query(q, fields, POSITIONS)
    scores = query.columns[:, :, 0] @ reading.columns.mT
    if on_codes:
        scores = scores * reading.gain.mT + query.offset * reading.offset.mT
    error = (scores - q @ decoded.mT).abs().max().item()
    assert error < 1e-3, f"scores differ by {error}"


def test_rope_that_rotates_nothing() -> None:
    codec = RotateKV(4).bind(Site("key", 4, 64, 64, rope=Rope(())))
    x = states()
    error = nmse(through(codec, x), x)
    assert 0.003 < error < 0.0115, f"nmse {error}"


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(CodecError, match="the rope of layer 5 is not known"):
        RotateKV(4).bind(Site("key", 4, 64, 64, layer=5))
    with pytest.raises(CodecError, match="values have no RoPE"):
        RotateKV(4).bind(Site("value", 4, 64, 64))
    with pytest.raises(CodecError, match="1 to 8 bits, not 0"):
        RotateKV(0)
    with pytest.raises(CodecError, match="group_heads \\(0\\) must be at least 1"):
        RotateKV(4, 0)
    with pytest.raises(CodecError, match="the rope rotates 128 channels; head_dim is 64"):
        RotateKV(4).bind(Site("key", 4, 64, 64, rope=rope(128)))
    for order in (torch.arange(64).expand(4, -1), torch.zeros(2, 128, dtype=torch.int64)):
        with pytest.raises(CodecError, match="a permutation of 128 channels for each of 2 groups"):
            bind(artefact=Tables(channel_order=order))
