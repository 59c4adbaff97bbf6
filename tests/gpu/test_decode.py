"""The decode kernel on the device: every code it reads, against the float32 oracle."""

from types import SimpleNamespace

import pytest
import torch

import kvfold
from kvfold.attention.oracle import oracle
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import ExampleTables, Site
from kvfold.codecs.fisher import group_len
from kvfold.kernels import cuda
from kvfold.kernels.cuda import decode as cuda_decode
from kvfold.quantizers.uniform import gaussian_affine
from kvfold.transforms.orthogonal import random_rotation
from kvfold.transforms.rope import Rope
from tests.cache.test_store import feed

pytestmark = pytest.mark.gpu
decode = pytest.importorskip("kvfold.kernels.triton.decode")


def mixed(codec, site):
    """Widths of 0 to 6 bits that differ between heads, and a mean."""
    heads, dim = site.num_kv_heads, site.head_dim
    generator = torch.Generator().manual_seed(dim + (site.side == "key"))
    widths = torch.randint(0, 7, (heads, dim // group_len(dim)), generator=generator)
    widths = widths.repeat_interleave(group_len(dim), 1)
    step, offset = (torch.stack(part) for part in zip(*map(gaussian_affine, widths), strict=True))
    prefix = f"{codec.form}_" if site.side == "key" else ""
    return ExampleTables(
        {
            "mean": torch.randn(heads, dim, generator=generator) * (site.side == "key"),
            f"{prefix}basis": random_rotation(dim, 5).expand(heads, -1, -1),
            f"{prefix}scales": torch.ones(2, heads, dim),
            codec.table("codes"): torch.stack((widths, step, offset)),
        }
    )


def plain(codec, site):
    """The codec's own made-up tables."""
    return codec.example(site)


def mixed_if_fisher(name):
    return mixed if name.startswith("fisher") else plain


def case(name, heads, group, dim, dtype, chunks, rows=2, padded=True, tables=plain):
    generator = torch.Generator(device="cuda").manual_seed(41)
    preset, made = kvfold.get(name), []
    rope = Rope(tuple(1e4 ** (-2 * i / dim) for i in range(dim // 2)))
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, heads, dim, dtype=dtype, device=torch.device("cuda"), rope=rope)
        made.append(codec.bind(site, tables(codec, site)))
    store, length = LayerStore(*made, Timeline(4, 64, 128)), sum(chunks)
    shape = (2, rows, heads, length, dim)
    keys, values = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    valid = None
    if padded:
        valid = torch.ones(rows, length, dtype=torch.bool)
        valid[-1, :131] = False
    view = feed(store, keys, values, chunks, valid)
    q = torch.randn(rows, heads * group, chunks[-1], dim, device="cuda", generator=generator)
    return q.to(dtype), view


def check(q, view, **more):
    """Errors up to twice what rounding the output alone costs, and 1e-3."""
    reason = decode.refuses(q, view)
    if reason is not None:
        pytest.skip(reason)
    more = {"scaling": q.shape[3] ** -0.5, **more}
    wanted = oracle(q, view, **more)
    found = decode.attend(q, view, **more)
    assert torch.equal(found, decode.attend(q, view, **more))
    size = wanted.norm()
    error = float((found.float() - wanted).norm() / size)
    rounding = float((wanted.to(q.dtype).float() - wanted).norm() / size)
    assert error <= 2 * rounding + 1e-3, (error, rounding)


@pytest.mark.parametrize("name", kvfold.presets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_code(name, dtype):
    check(*case(name, 2, 4, 128, dtype, (900, 1)))


#: heads, group, dim, chunks
SHAPES = (
    (3, 3, 64, (700, 1)),
    (2, 2, 128, (700, 1)),
    (40, 1, 64, (460, 1)),
    (1, 1, 80, (330, 1)),
    (2, 8, 96, (460, 5)),
    (2, 4, 128, (4000, 8)),
    (2, 4, 128, (63, 1)),
    (1, 16, 256, (460, 2)),
)


@pytest.mark.parametrize(("heads", "group", "dim", "chunks"), SHAPES)
@pytest.mark.parametrize("name", ["fisher2", "fisher2-pre"])
def test_shapes(name, heads, group, dim, chunks):
    check(*case(name, heads, group, dim, torch.bfloat16, chunks, padded=chunks[0] > 300))


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("name", ["fisher2", "fisher2-post", "fisher2-pre"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widths_that_differ_between_heads(name, dim, dtype):
    check(*case(name, 3, 4, dim, dtype, (900, 1), tables=mixed))


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *(("kivi4-g64", dim) for dim in (64, 128, 256)),
        *(("kivi2-g32", dim) for dim in (64, 96, 128)),
        *(("turboquant4", dim) for dim in (80, 128)),
        *(("turboquant4-uniform", dim) for dim in (64, 80, 96, 128, 256)),
        *(("turboquant3-uniform", dim) for dim in (64, 128)),
        *(("int8", dim) for dim in (64, 80, 128, 256)),
    ],
)
@pytest.mark.parametrize("chunks", [(700, 1), (460, 3)])
def test_programs_that_make_their_own_queries(name, dim, chunks, monkeypatch):
    """As those of many rows do: here also where a launch before them would."""
    monkeypatch.setattr(cuda, "sends", lambda layer, places, sms: False)
    monkeypatch.setattr(cuda_decode, "_WORK", {})
    group = 256 // dim + 1
    check(*case(name, 3, group, dim, torch.bfloat16, chunks))


@pytest.fixture
def makers(monkeypatch):
    """Warps of a program make what pages have of their own wherever they can."""
    monkeypatch.setattr(cuda, "MADE_WORTH", 0.0)
    monkeypatch.setattr(cuda, "MADE_PAGES", 0)
    monkeypatch.setattr(cuda_decode, "_WORK", {})


def check_made(q, view, **more):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("made for sm_90")
    assert decode.lowered(view.store).served is not None
    check(q, view, **more)


@pytest.mark.usefixtures("makers")
@pytest.mark.parametrize("name", ["fisher1", "fisher2", "fisher4"])
@pytest.mark.parametrize(("heads", "group", "dim", "chunks"), SHAPES[:6])
def test_programs_that_make_what_pages_have(name, heads, group, dim, chunks):
    check_made(*case(name, heads, group, dim, torch.bfloat16, chunks, padded=chunks[0] > 300))


@pytest.mark.usefixtures("makers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "dim", "group", "length"),
    [(2, 64, 4, 900), (2, 96, 4, 900), (2, 128, 4, 900), (70, 64, 4, 420), (18, 64, 3, 420)],
)
def test_programs_that_make_it_for_heads_that_differ(rows, dim, group, length, dtype):
    chunks = length, 1
    check_made(*case("fisher2", 3, group, dim, dtype, chunks, rows=rows, tables=mixed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["fisher2", "kivi4-g64", "fisher2-pre"])
@pytest.mark.parametrize(("rows", "group"), [(70, 4), (18, 4), (18, 3)])
def test_many_rows(name, dtype, rows, group):
    """Programs go on from row to row; most of the window's slots are empty."""
    check(*case(name, 3, group, 64, dtype, (420, 1), rows=rows, tables=mixed_if_fisher(name)))


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """As if the device had one."""
    found = torch.cuda.get_device_properties(0)
    one = SimpleNamespace(
        multi_processor_count=1,
        shared_memory_per_block_optin=found.shared_memory_per_block_optin,
        major=found.major,
        minor=found.minor,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: one)
    monkeypatch.setattr(cuda_decode, "_WORK", {})


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("name", ["fisher2", "fisher2-post", "fisher2-pre", "kivi4-g64"])
@pytest.mark.parametrize("group", [2, 4, 7])
def test_few_programs_walk_many_heads(name, group):
    """Queries of 64 pages are made ready at once, too."""
    check(*case(name, 3, group, 128, torch.bfloat16, (4700, 1), tables=mixed_if_fisher(name)))


@pytest.mark.usefixtures("one_multiprocessor", "makers")
@pytest.mark.parametrize("group", [2, 4, 7])
def test_few_programs_make_what_pages_of_many_heads_have(group):
    check_made(*case("fisher2", 3, group, 128, torch.bfloat16, (4700, 1), tables=mixed))


def test_codes_of_as_many_columns_one_after_another():
    """Their queries are of other sizes, and a workspace is shared by layers."""
    for name in ("turboquant4", "fisher4-post", "turboquant2", "fisher4"):
        check(*case(name, 2, 4, 128, torch.float16, (900, 1)))


def test_the_cuda_kernels_read_what_is_measured():
    """On Hopper no row of the benchmarks falls back to Triton's kernels unseen."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("made for sm_90")
    names = "fisher2", "fisher2-post", "fisher2-pre", "fisher4", "kivi4-g64", "turboquant4"
    for name in names:
        _, view = case(name, 8, 4, 128, torch.bfloat16, (300, 1))
        assert decode.lowered(view.store).native is not None, name


def test_softcap_and_sink_logits():
    q, view = case("kivi4-g32", 2, 4, 128, torch.bfloat16, (900, 1))
    check(q, view, softcap=20.0, sink_logits=torch.randn(8, device="cuda"))


def test_a_replayed_launch_follows_the_numbers_on_the_device():
    """Recorded once with 7 pages a row, replayed with what the device says then."""
    q, view = case("fisher2", 2, 4, 128, torch.bfloat16, (1000, 1), padded=False)
    decode.attend(q, view, scaling=0.1)
    graph = torch.cuda.CUDAGraph()
    at = view.on(q.device)
    with torch.cuda.graph(graph):
        found = decode.attend(q, view, scaling=0.1)
    at.folded[1] = 3
    graph.replay()
    wanted = decode.attend(q, view, scaling=0.1)
    assert torch.equal(found, wanted)
    at.folded[1] = 7
    graph.replay()
    assert not torch.equal(found, wanted)
