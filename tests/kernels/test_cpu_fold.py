"""The C++ fold against the encoders in torch: every code it serves, every instruction set."""

import pytest
import torch

import kvfold
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import Site
from kvfold.codecs.fisher import Fisher
from kvfold.codecs.spectral import Spectral
from kvfold.kernels import cpu
from kvfold.kernels.cpu import fold
from kvfold.transforms.rope import Rope

pytestmark = pytest.mark.skipif(cpu.native() is None, reason="the C++ extension is not built")
SETS = cpu.instruction_sets()
SERVED = [name for name in kvfold.presets() if name.startswith(("fisher", "spectral"))]
HEADS = 3


def bound(codec, side="key", dim=64, block=128):
    """A codec on tables that differ between heads: 0 to 6 bits, costs and means."""
    rope = Rope(tuple(1e4 ** (-2 * i / dim) for i in range(dim // 2)))
    site = Site(side, HEADS, dim, block, rope=rope)
    tables = codec.example(site).at(0, side)
    generator = torch.Generator().manual_seed(3)
    for name, table in tables.items():
        if name == "mean":
            tables[name] = torch.randn(table.shape, generator=generator)
        if name.endswith("scales"):
            tables[name] = table * torch.rand(table.shape, generator=generator).add(0.5)
        if name.endswith(("codes", "widths")):
            table = table.clone()
            widths = table[0] if name.endswith("codes") else table
            widths[0, :8], widths[0, -8:], widths[1, 0], widths[2, 5:9] = 6, 0, 0, 5
            tables[name] = table
        if name.endswith("codes"):
            tables[name][1].clamp_(min=0.02)
    return codec.bind(site, kvfold.codec.ExampleTables(tables))


def states(dim=64, block=128, blocks=3):
    """Blocks as a cache hands them over, tokens of zeros, huge and tiny ones among them."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(blocks, block, HEADS, dim, generator=generator).transpose(1, 2)
    x = x * torch.rand(blocks, HEADS, block, 1, generator=generator).mul(4)
    x[0, 0, 5], x[-1, 1] = 0, x[-1, 1] * 1e-4
    x[0, 2, :, 3] *= 3000
    x[0, 1, 7, :] = 65504
    return x, torch.arange(blocks)[:, None] * 700 + torch.arange(block) + 9


def reference(made, x, positions):
    return made.layout.join(made.encode(x, positions))


def check(made, x, positions, isa=None):
    assert fold.serves(made)
    wanted, found = reference(made, x, positions), fold.encoded(made, x, positions, isa=isa)
    assert found.shape == wanted.shape
    # a gain that differs moves codes of its token, and nothing else does
    gains, other = (made.layout.split(page)["gain"] for page in (found, wanted))
    moved = int((gains != other).sum())
    assert moved <= max(1, gains.numel() // 5000), f"{moved} of {gains.numel()} gains differ"
    codes, others = (made.plan.unpack(made.layout.split(page)) for page in (found, wanted))
    same = (gains == other)[..., None]
    assert torch.equal(torch.where(same, codes, 0), torch.where(same, others, 0))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("name", SERVED)
def test_each_code_on_each_instruction_set(name, side, isa) -> None:
    check(bound(getattr(kvfold.get(name), f"{side}s"), side), *states(), isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(
    ("dim", "block"), [(64, 256), (80, 128), (96, 48), (128, 128), (256, 16), (40, 64)]
)
def test_dims_and_pages(dim, block, side, isa) -> None:
    for codec in (Fisher(2.5, tile=16), Spectral(3.0, scope="layer", gain=True)):
        check(bound(codec, side, dim, block), *states(dim, block), isa)


@pytest.mark.parametrize("search", [0, 1, 16])
def test_searches_of_any_reach(search) -> None:
    check(bound(Fisher(2.0, search=search)), *states())
    check(bound(Spectral(3.0, scope="layer", gain=True, search=search)), *states())


@pytest.mark.parametrize("codec", [Fisher(2.5), Spectral(3.0, scope="layer", gain=True)])
def test_one_set_of_bytes(codec) -> None:
    """On every instruction set, on any number of threads, alone and in another memory order."""
    made, (x, positions) = bound(codec), states()
    wanted, threads = fold.encoded(made, x, positions), torch.get_num_threads()
    for isa in SETS:
        assert torch.equal(fold.encoded(made, x, positions, isa=isa), wanted), isa
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(fold.encoded(made, x, positions), wanted), f"{n} threads"
    finally:
        torch.set_num_threads(threads)
    for i in range(len(x)):
        alone = fold.encoded(made, x[i : i + 1].contiguous(), positions[i : i + 1])
        assert torch.equal(alone[0], wanted[i]), i
    among = torch.cat((x * 100, x[1:2]))
    found = fold.encoded(made, among, torch.cat((positions, positions[1:2])))
    assert torch.equal(found[-1], wanted[1])


@pytest.mark.parametrize("isa", SETS)
def test_ties_go_the_same_way(isa) -> None:
    """States of -1, 0 and 1 in their own basis, levels and steps that have them in the middle."""
    site = Site("value", HEADS, 64, 128)
    x, positions = states()
    x, eye = x.sign() * (x.abs() > 1), torch.eye(64).expand(HEADS, -1, -1)
    spectral = Spectral(2.0, scope="layer", gain=True)
    tables = spectral.example(site).at(0, "value") | {"basis": eye}
    made = spectral.bind(site, kvfold.codec.ExampleTables(tables))
    check(made, x, positions, isa)
    fisher = Fisher(2.0, search=0)
    tables = fisher.example(site).at(0, "value")
    tables["tile_2_codes"] = torch.tensor([2.0, 2.0, -2.0]).view(3, 1, 1).expand(3, HEADS, 64)
    names = {name: eye for name in tables if name.endswith("basis")}
    made = fisher.bind(site, kvfold.codec.ExampleTables(tables | names))
    x = torch.where(x >= 0, 1.0, -1.0)  # an RMS of 1: codes of 0.5 and 1.5
    check(made, x, positions, isa)
    codes = made.plan.unpack(made.layout.split(fold.encoded(made, x, positions, isa=isa)))
    assert codes.unique().tolist() == [0, 2]


def test_a_head_without_bits_and_no_bits_at_all() -> None:
    codec, site = Fisher(2.0), Site("value", 2, 64, 128)
    for heads in ([0], [0, 1]):
        tables = codec.example(site).at(0, "value")
        codes = tables["tile_2_codes"].clone()
        codes[0, heads] = 0
        made = codec.bind(site, kvfold.codec.ExampleTables(tables | {"tile_2_codes": codes}))
        x, positions = states()
        x = x[:, :2]
        assert torch.equal(fold.encoded(made, x, positions), reference(made, x, positions))
        assert not made.layout.split(fold.encoded(made, x, positions))["gain"][:, heads].any()


def test_the_store_folds_with_it_where_it_can(monkeypatch) -> None:
    x, positions = states()
    for codec in (Fisher(2.0), Spectral(2.0, scope="layer", gain=True)):
        made = bound(codec)
        found = LayerStore.encoded(made, x, positions)
        assert torch.equal(found, fold.encoded(made, x, positions))
        assert "fold_tables" in vars(made), "torch folded"
    for codec in (Spectral(2.0), Spectral(2.0, qjl=True), kvfold.get("kivi4-g32").keys):
        assert not fold.serves(codec.bind(made.site, codec.example(made.site)))
    monkeypatch.setattr(fold, "native", lambda: None)
    made = bound(Fisher(2.0))
    assert torch.equal(LayerStore.encoded(made, x, positions), reference(made, x, positions))
    assert "fold_tables" not in vars(made)


def test_what_it_holds_is_counted() -> None:
    made = bound(Fisher(2.0)), bound(Fisher(2.0), "value")
    held = {t.data_ptr() for t in cpu.held_by(LayerStore(*made, Timeline(4, 64, 128)))}
    for side in made:
        assert {t.data_ptr() for t in fold.tables_of(side).tensors} <= held
