"""`fisher`: gains, frames, reading on codes in every form, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

import kvfold
from kvfold.attention import oracle as oracle_module
from kvfold.attention import paged
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import CodecError, ExampleTables, Site
from kvfold.codecs import fisher
from kvfold.codecs.fisher import Fisher
from kvfold.transforms.rope import Rope

HEADS, DIM = 2, 32
ROPES = {
    "default": Rope(tuple(1e4 ** (-2 * i / DIM) for i in range(DIM // 2))),
    "yarn": Rope(tuple(1e4 ** (-2 * i / DIM) for i in range(DIM // 2)), scaling=1.3),
    "interleaved": Rope(tuple(1e4 ** (-2 * i / DIM) for i in range(DIM // 2)), 1.0, "interleaved"),
    "partial": Rope(tuple(1e4 ** (-2 * i / 16) for i in range(8))),
    "none": Rope(()),
    "unknown": None,
}


def tables(codec: Fisher, side: str, seed: int = 70_001) -> ExampleTables:
    """Tables of another kind than the example's: a mean, an oblique basis, a width per group."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor([[6, 5, 4, 3, 2, 1, 0, 0], [3, 3, 2, 2, 1, 1, 1, 0]])
    widths = widths.repeat_interleave(DIM // 8, -1)
    step, offset = fisher.gaussian_affine(widths)
    basis, scales = ("basis", "scales")
    if side == "key":
        basis, scales = codec.table(basis), codec.table(scales)
    oblique = torch.eye(DIM) + 0.2 * torch.randn(HEADS, DIM, DIM, generator=generator)
    return ExampleTables(
        {
            "mean": 3.0 * torch.randn(HEADS, DIM, generator=generator),
            basis: oblique.to(torch.float16),
            scales: torch.rand(2, HEADS, DIM, generator=generator) + 0.5,
            codec.table("codes"): torch.stack((widths, step, offset + 0.1 * step)),
        }
    )


def bound(codec: Fisher, side: str, rope: Rope | None, block_len: int = 32) -> fisher.BoundFisher:
    site = Site(side, HEADS, DIM, block_len, rope=rope if side == "key" else None)  # type: ignore[arg-type]
    return codec.bind(site, tables(codec, side))


def states(*shape: int, seed: int = 70_002) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- gains ------------------------------------------------------------------------------------


def test_gain_bytes_round_trip() -> None:
    table = fisher.gain_table()
    assert torch.equal(fisher.gain_byte(table), torch.arange(256).short())
    assert table[128] == 1.0
    assert table[0] == 0.0
    ratio = (table[2:] / table[1:-1]).log2()
    assert (ratio - 1 / 16).abs().max() < 1e-5, f"{ratio}"


def test_gains_saturate() -> None:
    rms = torch.tensor([0.0, 1e-30, 1e30])
    assert fisher.gain_byte(rms).tolist() == [0, 0, 255]


def test_the_rounded_gain_is_what_is_coded_with() -> None:
    """With its own rounded gain a token's error is smaller than with a neighbouring one."""
    codec = Fisher(2.0, "post")
    site = Site("value", HEADS, DIM, 32)
    code = codec.bind(site, codec.example(site))
    x = states(64, HEADS, 32, DIM)
    positions = torch.arange(32).expand(64, -1)
    fields = code.encode(x, positions)
    error = (code.decode(fields, positions) - x).square().mean()
    for move in (-4, 4):
        moved = fields | {"gain": (fields["gain"].int() + move).to(torch.uint8)}
        other = (code.decode(moved, positions) - x).square().mean()
        assert error < other, f"{error:.5f} at the gain, {other:.5f} at {move} bytes off"


def test_search_never_costs_more() -> None:
    x, positions = states(2, HEADS, 32, DIM), torch.arange(64).view(2, 32)
    costs = []
    for search in (0, 3):
        code = bound(Fisher(2.0, "post", search=search), "value", None)
        rest = x - code.decode(code.encode(x, positions), positions)
        y = fisher.apply_tiles(rest, code.forward)
        costs.append((y.square() * code.cost).sum(-1))
    assert (costs[1] <= costs[0] * (1 + 1e-5)).all()
    assert costs[1].sum() < 0.99 * costs[0].sum(), f"{costs[0].sum()} {costs[1].sum()}"


# --- frames -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("form", fisher.FORMS)
def test_a_frame_is_undone_exactly(rope: str, form: fisher.Form) -> None:
    code = bound(Fisher(2.0, form, tile=16), "key", ROPES[rope])
    x = states(3, HEADS, 32, DIM)
    positions = torch.tensor([[0], [777], [30_000]]) + torch.arange(32)
    error = (code._states(code._residual(x, positions), positions) - x).abs().max().item()
    assert error < 2e-5, f"{error:.3g}"


@pytest.mark.parametrize("form", fisher.FORMS)
def test_a_turning_mean_is_removed(form: fisher.Form) -> None:
    """Keys that are R_n mu and nothing else leave no residual, whatever scaling R has."""
    rope = ROPES["yarn"]
    assert rope is not None
    code = bound(Fisher(2.0, form), "key", rope)
    positions = torch.tensor([[4], [132]]) + torch.arange(32)
    mean = code.mean[:, None].expand(2, -1, 32, -1)
    rest = code._residual(rope.rotate(mean, positions), positions).abs().max().item()
    assert rest < 1e-4, f"{rest:.3g}"


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("form", fisher.FORMS)
@pytest.mark.parametrize("tile", [16, 128])
def test_attention_on_codes_is_attention_on_decoded_states(
    rope: str, form: fisher.Form, tile: int
) -> None:
    codec = Fisher(2.0, form, tile=tile)
    key, value = bound(codec, "key", ROPES[rope]), bound(codec, "value", None)
    timeline = Timeline(4, 16, 32)
    store = LayerStore(key, value, timeline)
    rows, length, group = 2, 150, 3
    keys, values = (states(rows, HEADS, length, DIM, seed=s) for s in (70_003, 70_004))
    # the first row is padded on the left, so that its pages start elsewhere
    valid = torch.ones(rows, length, dtype=torch.bool)
    valid[0, :21] = False
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    step = timeline.plan(rows, length, valid, positions)
    store.append(keys, values, step)
    timeline.commit(step)
    last = timeline.plan(rows, 1, torch.ones(rows, 1, dtype=torch.bool), positions[:, -1:] + 1)
    view = store.append(*(states(rows, HEADS, 1, DIM, seed=s) for s in (70_005, 70_006)), last)
    assert view is not None
    assert min(view.folded) >= 3
    q = states(rows, HEADS * group, 1, DIM, seed=70_007)
    found = paged.attend(q, view, scaling=0.2)
    expected = oracle_module.oracle(q, view, scaling=0.2)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 2e-5, f"{error:.3g}"


def test_a_head_without_bits_reads_as_its_mean() -> None:
    codec = Fisher(2.0, "tile")
    made = dict(tables(codec, "key").tables)
    made[codec.table("codes")] = torch.zeros(3, HEADS, DIM)
    rope = ROPES["default"]
    code = codec.bind(Site("key", HEADS, DIM, 32, rope=rope), ExampleTables(made))  # type: ignore[arg-type]
    assert [f.name for f in code.layout.fields] == ["gain"]
    positions = torch.arange(32)[None] + 9
    fields = code.encode(states(1, HEADS, 32, DIM), positions)
    assert rope is not None
    mean = rope.rotate(code.mean[:, None].expand(1, -1, 32, -1), positions)
    error = (code.decode(fields, positions) - mean).abs().max().item()
    assert error < 1e-5, f"{error:.3g}"
    q = states(1, HEADS, 2, DIM)
    score = paged.score(code.query(q, fields, positions), code.read(fields, positions))
    error = (score - q @ mean.mT).abs().max().item()
    assert error < 1e-4, f"{error:.3g}"


# --- catalogue --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2.5, 2, 1.5, 1])
def test_presets_store_their_bits_and_a_byte_per_token_and_head(bits: float) -> None:
    for form in ("", "-post", "-pre"):
        for dim in (64, 128):
            found = kvfold.get(f"fisher{bits:g}{form}").bits_per_element(head_dim=dim)
            assert found == bits + 8 / dim, f"{found}"


def test_any_number_of_bits_is_a_preset() -> None:
    preset = kvfold.get("fisher2.3-pre")
    assert preset.keys == Fisher(2.3, "pre")
    assert preset.name == "fisher2.3-pre"
    with pytest.raises(CodecError, match="at most 6 bits, not 9"):
        kvfold.get("fisher9")
    with pytest.raises(CodecError, match="unknown preset 'fisher2-past'"):
        kvfold.get("fisher2-past")


def test_says_what_is_missing() -> None:
    site = Site("key", HEADS, DIM, 32, rope=ROPES["default"])
    with pytest.raises(CodecError, match=r"kvfold calibrate --model M --preset fisher2-pre"):
        Fisher(2.0, "pre").bind(site)
    with pytest.raises(CodecError, match=r"no pre_3_codes .*it has pre_2_codes"):
        Fisher(3.0, "pre").bind(site, tables(Fisher(2.0, "pre"), "key"))
    with pytest.raises(CodecError, match=r"block_len \(48\) must be a multiple of tile \(32\)"):
        bound(Fisher(2.0, "tile", tile=32), "key", ROPES["default"], 48)


def test_distortion_is_that_of_uniform_levels() -> None:
    """Max 1960, Table II: the best uniform quantiser of N(0, 1) leaves 0.3634, 0.1188, 0.0374."""
    for bits, known in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        codec = Fisher(float(bits), "post", search=0)
        site = Site("value", 2, 128, 128)
        code = codec.bind(site, codec.example(site))
        x = states(8, 2, 128, 128, seed=70_010)
        positions = torch.arange(8 * 128).view(8, 128)
        error = (code.decode(code.encode(x, positions), positions) - x).square().mean().item()
        # a gain in steps of 1/16 octave, and the RMS of 128 samples rather than 1
        assert 0.97 * known < error < 1.05 * known, f"{error:.4f} at {bits} bits, known {known}"
        assert math.isclose(code.layout.nbytes * 8 / (2 * 128 * 128), bits + 8 / 128)
