"""The C++ kernel against the float32 oracle: every preset, every instruction set of the machine."""

import pytest
import torch

import kvfold
from kvfold.attention import paged
from kvfold.attention.oracle import oracle
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import CodecError, ExampleTables, Site
from kvfold.kernels import cpu
from kvfold.transforms.rope import Rope
from tests.cache.test_store import feed

pytestmark = pytest.mark.skipif(cpu.native() is None, reason="the C++ extension is not built")
SETS = cpu.instruction_sets()


def filled(
    name,
    heads=2,
    dim=64,
    rows=2,
    chunks=(330, 1),
    padded=True,
    dtype=torch.float32,
    block=128,
    rope=None,
    mean=None,
):
    generator = torch.Generator().manual_seed(77)
    preset, made = kvfold.get(name), []
    rope = rope or Rope(tuple(1e4 ** (-2 * i / dim) for i in range(dim // 2)))
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, heads, dim, block, dtype=dtype, rope=rope)
        try:
            tables = codec.example(site)
            if mean is not None:
                tables = ExampleTables({**tables.tables, "mean": mean})
            made.append(codec.bind(site, tables))
        except CodecError as error:
            pytest.skip(str(error))
    length, valid = sum(chunks), None
    states = torch.randn(2, rows, heads, length, dim, generator=generator)
    states[0, :, :, :, 3] *= 30  # one huge channel
    states[:, :, :, length // 2] = 0  # one token of zeros
    if padded:
        valid = torch.ones(rows, length, dtype=torch.bool)
        valid[-1, :131] = False
    return feed(LayerStore(*made, Timeline(4, 64, block)), *states.to(dtype), chunks, valid)


def check(view, group, isa=None, **more):
    rows, heads = view.keys.shape[:2]
    queries, dim = view.query_tokens.shape[1], view.keys.shape[3]
    generator = torch.Generator().manual_seed(78)
    q = torch.randn(rows, heads * group, queries, dim, generator=generator).to(view.keys.dtype)
    q = q * 0.2  # scores of the huge channel within reach of the others
    assert cpu.refuses(q, view) is None
    more = {"scaling": dim**-0.5, **more}
    found, wanted = cpu.attend(q, view, isa=isa, **more), oracle(q, view, **more)
    reference = paged.attend(q, view, **more).to(q.dtype).float()
    error, other = (float((x - wanted).norm() / wanted.norm()) for x in (found.float(), reference))
    floor = 1e-5 if q.dtype == torch.float32 else 1e-3
    assert error <= 2 * other + floor, f"{isa}: {error:.2g}, the page walk's is {other:.2g}"


@pytest.mark.parametrize("name", kvfold.presets())
@pytest.mark.parametrize("isa", SETS)
def test_each_code_on_each_instruction_set(name, isa) -> None:
    check(filled(name), 4, isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    ("heads", "group", "dim", "chunks"),
    [
        (1, 1, 128, (200, 1)),
        (3, 3, 64, (330, 5)),
        (1, 8, 80, (330, 2)),
        (2, 1, 96, (463, 8)),
        (1, 4, 256, (1000, 1)),
        (2, 2, 64, (63, 1)),
    ],
)
def test_groups_queries_and_dims(isa, heads, group, dim, chunks) -> None:
    for name in ("fisher2", "fisher2-pre", "kivi4-g32" if dim % 32 == 0 else "int8"):
        check(filled(name, heads, dim, chunks=chunks, padded=chunks[0] > 300), group, isa)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["fisher2", "turboquant4", "turboquant3-uniform", "rotatekv4", "identity"]
)
def test_half_precision(name, dtype) -> None:
    check(filled(name, dtype=dtype), 4)


@pytest.mark.parametrize("block", [16, 32, 256])
def test_other_pages(block) -> None:
    """Of 32 tokens, KIVI's groups are one for a page."""
    for name in ("int8", "kivi4-g32", "fisher2-post"):
        if block >= 32 or name != "kivi4-g32":
            check(filled(name, block=block, chunks=(700, 1)), 4)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "inv_freq",
    [
        tuple(5e5 ** (-i / 16) for i in range(16)),  # half of the channels do not turn
        tuple(1e-4 / (i + 1) for i in range(32)),  # all within a few powers
        tuple(1.0 / (i + 1) for i in range(32)),  # none
        (1.0, 0.3, 0.004),  # too few slow ones to gain
        (0.001, 1.0, 0.002, 0.001, 0.0005, 0.0001),  # a fast one among slow ones
    ],
)
def test_means_that_turn(inv_freq, isa) -> None:
    mean = 3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(79))
    for pairs in ("half", "interleaved"):
        for name in ("fisher2", "fisher2-post"):
            check(filled(name, rope=Rope(inv_freq, pairs=pairs), mean=mean), 4, isa)


def test_softcap_and_sink_logits() -> None:
    check(filled("kivi4-g32"), 4, softcap=5.0, sink_logits=torch.randn(8))


def test_the_same_bits_on_any_number_of_threads() -> None:
    view = filled("fisher2", chunks=(1500, 1))
    q = torch.randn(2, 8, 1, 64)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(cpu.attend(q, view, scaling=0.125))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(*found, atol=1e-6)


def test_slabs_that_moved_are_found() -> None:
    """As many as before, in other places: a cache that was copied to another device and back."""
    view = filled("int8")
    check(view, 4)
    for i, slab in enumerate(view.store.pool.slabs):
        view.store.pool.slabs[i] = slab.clone()
        slab.zero_()
    check(view, 4)
