"""The CUDA sources compile for sm_90 without a GPU, in the registers that launches count on."""

import ctypes
import importlib.util
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kvfold
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import ExampleTables, Site
from kvfold.kernels import cuda
from kvfold.kernels.cuda import before_rope, build
from kvfold.kernels.cuda import decode as cuda_decode
from kvfold.quantizers.uniform import gaussian_affine
from kvfold.transforms.rope import Rope

decode = pytest.importorskip("kvfold.kernels.triton.decode")


def library():
    """NVRTC of the package nvidia-cuda-nvrtc."""
    found = importlib.util.find_spec("nvidia")
    for folder in () if found is None else found.submodule_search_locations or ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    pytest.skip("nvidia-cuda-nvrtc is not installed")


def compiled(name, macros, tmp_path):
    """Registers of a kernel, and its instructions with where each branch back goes to."""
    code = build.cubin(cuda.source(name), build.HOPPER, cuda.options(macros), library())
    file = tmp_path / f"{name}.cubin"
    file.write_bytes(code)
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def text(*command):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    registers = re.search(r"REG:(\d+)", text(tools / "cuobjdump", "-res-usage", file))
    lines, labels = [], {}
    for line in text(tools / "nvdisasm", "-c", file).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(found[1])
    loops = []
    for end, line in enumerate(lines):
        label = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if label and labels[label[1]] <= end:
            loops.append(lines[labels[label[1]] : end + 1])
    return int(registers[1]), loops


def spilled(loop):
    return [line for line in loop if re.search(r"\b(LDL|STL)\b", line)]


@pytest.fixture(autouse=True)
def kernels_are_there(monkeypatch):
    """As on a device: keys before RoPE are read by these kernels alone."""
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)


def example(codec, site):
    return codec.example(site)


def layer(name, dim=128, block=128, heads=8, tables=example):
    preset, made = kvfold.get(name), []
    rope = Rope(tuple(5e5 ** (-2 * i / dim) for i in range(dim // 2)))
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, heads, dim, block, dtype=torch.bfloat16, rope=rope)
        made.append(codec.bind(site, tables(codec, site)))
    return decode.lowered(LayerStore(*made, Timeline(4, 64, block)))


def varied(codec, site):
    """Mixed widths, and a mean of keys."""
    shape = site.num_kv_heads, site.head_dim
    group = site.head_dim // 8
    widths = torch.full(shape, int(codec.bits))
    widths[:, : 2 * group] += 2
    widths[:, -2 * group :] -= 1 + (codec.bits > 2)
    codes = torch.stack((widths, *gaussian_affine(widths)))
    mean = torch.randn(shape) * (site.side == "key")
    return ExampleTables({**codec.example(site).tables, "mean": mean, codec.table("codes"): codes})


def with_mean(name, dim=128):
    return layer(name, dim, tables=varied)


MEASURED = [
    "fisher2", "fisher2-post", "fisher2-pre", "fisher4", "kivi4-g64", "kivi2-g32", "turboquant4",
    "int8",
]  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", MEASURED)
def test_all_warps_that_launches_count_on_have_registers(name, dim, tmp_path):
    """Of 65,536 of a multiprocessor.

    At head_dim 128 nothing spills in the loop over pages (the smallest with all products of
    digits): local memory would wait behind the copies of pages. Where keys are decoded, next to
    nothing.
    """
    made = layer(name, dim)
    assert cuda.refuses(made) is None
    cut = cuda.shared(made, 4, 4)
    assert cut.programs * cut.warps >= 4
    assert cut.warp - cut.sums_at >= 16 * 64 + 14 * 64  # read behind: a chunk, and most of one
    jobs = [
        (
            "attend",
            cuda.macros(made, 4, 4, False, torch.bfloat16, sent=cuda.sends(made, places, 132)),
        )
        for places in (8, 256)
    ]
    if cuda.prepares(made):
        jobs.append(("prepare", cuda.prepare_macros(made, 4, 4, torch.bfloat16, 64)))
    if cuda.sends(made, 8, 132):
        jobs.append(("send", cuda.send_macros(made, 4, torch.bfloat16)))
    for kernel, macros in jobs:
        registers, loops = compiled(kernel, macros, tmp_path)
        apart = [loop for loop in loops if not any("BAR.SYNC" in line for line in loop)]
        loops = apart or loops  # warps meet where a head ends
        products = [sum("MMA" in line for line in loop) for loop in loops]
        inner = min(
            (x for x, n in zip(loops, products, strict=True) if n == max(products)), key=len
        )
        few = 0 if made.decoder is None else 12
        assert kernel != "attend" or dim == 64 or len(spilled(inner)) <= few, spilled(inner)
        warps = {"attend": cut.programs * cut.warps, "prepare": cuda.PREPARE_WARPS, "send": 16}
        warps = warps[kernel]
        warps += before_rope.BRINGERS if made.decoder is not None else 0
        assert registers * 32 * warps <= 65_536, (kernel, registers)


@pytest.mark.parametrize(("name", "dim"), [("fisher4", 128), ("fisher2", 128), ("fisher2", 64)])
def test_makers_have_registers_beside_those_that_walk_pages(name, dim, tmp_path, monkeypatch):
    """They are moved to makers where 168 are too few; of what walks next to nothing spills."""
    monkeypatch.setattr(cuda, "MADE_WORTH", 0.0)
    made = with_mean(name, dim).served
    macros = cuda.macros(made, 4, 4, False, torch.bfloat16)
    registers, loops = compiled("attend", macros, tmp_path)
    assert registers * 32 * (8 + cuda.MAKERS) <= 65_536
    walks = [loop for loop in loops if sum("IMMA" in line for line in loop) > 20]
    inner = min((x for x in walks if not any("BAR.SYNC" in y for y in x)), key=len)
    assert len(spilled(inner)) <= 12, spilled(inner)
    makes = min((x for x in loops if any("HGMMA" in line for line in x)), key=len)
    assert len(spilled(makes)) <= 16, spilled(makes)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_shapes_compile(m, dtype, tmp_path):
    made = layer("fisher2", 96)
    mean_n = 2 if m == 1 else 4
    compiled("attend", cuda.macros(made, m, mean_n, True, dtype), tmp_path)
    compiled("prepare", cuda.prepare_macros(made, m, mean_n, dtype, 32), tmp_path)
    for per in {1, m}:
        macros = cuda.merge_macros(made, m, per, True, dtype)
        registers, _ = compiled("merge", macros, tmp_path)
        assert registers * cuda.MERGE_THREADS <= 65_536


def test_what_the_compiler_says_is_passed_on():
    with pytest.raises(RuntimeError, match=r"NVRTC refused a kernel for sm_90: .*undefined"):
        build.cubin("__global__ void f() { missing(); }", "sm_90", [], library())


def test_what_is_not_read_is_refused():
    assert cuda.refuses(layer("int8", block=256)) == "pages of 256 tokens"


def test_operands_lie_as_products_take_them():
    """Rows g and g + 8 of a tile are its columns 4 (g / 2) + g % 2, and that + 2."""
    made = layer("fisher2", 128)
    made.mean = torch.randn(made.heads, cuda.BLOCK, 128)
    found, key = cuda.operands(made), made.key
    assert key.chunks == (0, 8, 0)
    for tile, rows in (
        (3, made.mean[1, 48:64].half()),  # the mean's come first
        (8, key.matrix[1, :, :16].mT),
        (11, key.matrix[1, :, 48:64].mT),
    ):
        for row, channel in ((0, 0), (5, 23), (9, 77), (15, 127)):
            wanted = rows[4 * (row % 8 // 2) + row % 2 + 2 * (row // 8), channel]
            where = tile // 4, channel // 16, tile % 4 * 2 + row // 8, channel % 16 // 8
            assert found[(1, *where, row % 8, channel % 8)] == wanted, (tile, row)
    rows = found[1].permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 128)
    gain = rows[8 + 8, :2].double().sum(0)
    assert torch.allclose(gain, key.gain[1].double(), rtol=1e-6, atol=1e-7)


def test_own_operands_lie_as_lanes_take_them():
    """Of a product a lane (g, c) has rows g and g + 8 at channels 2c.., then at 2c + 8.."""
    made = layer("turboquant4-uniform", 128)
    found, key = cuda.own_operands(made), made.key
    assert found.shape == (made.heads, key.columns // 16 + 1, 8, 32, 8)
    for tile, step, g, c in ((0, 0, 0, 0), (3, 2, 5, 1), (7, 7, 7, 3)):
        column, channel = 16 * tile + 4 * (g // 2) + g % 2, 16 * step + 2 * c
        wanted = [
            key.matrix[1, channel + 8 * half + e, column + 2 * which]
            for half in (0, 1)
            for which in (0, 1)
            for e in (0, 1)
        ]
        assert found[1, tile, step, 4 * g + c].tolist() == [float(x) for x in wanted], tile
    gain = found[1, -1, 0, [0, 4], 0].double().sum()  # rows 0 and 1: its two float16 parts
    assert torch.allclose(gain, key.gain[1, 0].double(), rtol=1e-6, atol=1e-7)


def test_made_operands_lie_as_lanes_take_them(monkeypatch):
    """The mean's tiles, those of the columns and the gain's, as `own_operands` lie."""
    monkeypatch.setattr(cuda, "MADE_WORTH", 0.0)
    layer = with_mean("fisher2", 64).served
    found, key = layer.native.own, layer.key
    slots = cuda.slots_of(layer)[1]
    assert found.shape == (8, 8 + len(slots) // 16 + 1, 4, 32, 8)
    assert layer.native.tables is None
    for tile, step, g, c in ((0, 0, 0, 0), (7, 3, 5, 1), (8, 2, 2, 3), (9, 1, 7, 2)):
        rows = layer.mean[1].half() if tile < 8 else key.matrix[1, :, slots].mT
        row = 16 * (tile % 8) + 4 * (g // 2) + g % 2
        wanted = [
            rows[row + 2 * which, 16 * step + 2 * c + 8 * half + e]
            for half in (0, 1)
            for which in (0, 1)
            for e in (0, 1)
        ]
        assert found[1, tile, step, 4 * g + c].tolist() == [float(x) for x in wanted], tile
    gain = found[1, -1, 0, [0, 4], 0].double().sum()
    assert torch.allclose(gain, key.gain[1, 0].double(), rtol=1e-6, atol=1e-7)


def test_makers_serve_codes_that_would_leave_attention_few_warps(monkeypatch):
    """Of many pages, where these have queries of their own."""
    wide, few = with_mean("fisher4"), with_mean("fisher1.5")
    assert wide.served is not None
    assert few.served is None
    assert layer("fisher4-post").served is None
    assert layer("kivi4-g64").served is None
    made = wide.served
    assert cuda.made(made)
    assert not cuda.made(wide)
    assert cuda.prepares(wide)
    assert not cuda.prepares(made)
    assert not cuda.sends(made, 8, 132)
    cut = cuda.shared(made, 4, 4)
    assert (cut.warps, cut.programs) == (8, 1)
    assert cut.worth >= cuda.MADE_WORTH * cuda.shared(wide, 4, 4).worth
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(cuda_decode, "_WORK", {})
    cpu = torch.device("cpu")
    assert [cuda.many(8 * n, cpu) for n in (255, 791, 792, 1024)] == [False, False, True, True]
    work = cuda_decode._work(made, 2, 1, 4, 4, 7, 196, cpu)
    assert work.query.numel() == work.means.numel() == 0
    assert not work.sent


def test_makers_have_room_for_what_each_warp_reads(monkeypatch):
    """A page's queries twice, as they are made a page ahead, and the mean's scores."""
    monkeypatch.setattr(cuda, "MADE_WORTH", 0.0)
    for name in ("fisher2", "fisher4"):
        apart = with_mean(name)
        made = apart.served
        columns = max(map(len, cuda.slots_of(made)))
        assert cuda.query_bytes(made, 4) == 8 * columns + 96
        of_page = cuda.query_bytes(made, 4) + cuda.BLOCK * 8
        cut = cuda.shared(made, 4, 4)
        assert cut.sums_at - cut.room >= 128 + 128 + 2 * of_page
        assert (cut.sums_at - cut.room) % 128 == 0
        assert cut.total <= cuda.SHARED_OF_PROGRAM


def test_queries_come_from_the_launch_before_where_rows_are_few_or_the_mean_needs_it():
    kivi, post, pages = (layer(name, 128) for name in ("kivi4-g64", "fisher2-post", "fisher2"))
    assert [cuda.sends(kivi, places, 132) for places in (8, 16, 64)] == [True, True, False]
    post.constants = {**post.constants, "MEAN": True}
    assert all(cuda.sends(post, places, 132) for places in (8, 1024))
    assert not cuda.sends(pages, 8, 132)
    # its programs have room beside those of attention
    assert cuda.cut_for(kivi, 1, 256, 13, cuda.shared(kivi, 4, 4), 132)[0] <= 264 - kivi.heads


def test_each_code_has_a_workspace_that_it_fits_into(monkeypatch):
    """Codes of as many columns have queries of bytes, with a unit each, or of float16."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(cuda_decode, "_WORK", {})
    for name in ("turboquant4", "fisher4-post", "turboquant2", "int8", "kivi4-g64", "fisher2"):
        made = layer(name, 128)
        made.native = cuda.native(made)
        work = cuda_decode._work(made, 2, 1, 4, 4, 7, 196, torch.device("cpu"))
        assert work.query.shape[-1] * 2 == cuda.query_bytes(made, 4), name
        for m in (1, 2, 3, 4):  # lines of L2 that no other page has
            assert cuda.query_bytes(made, m) % 128 == 0, name
        assert work.sums.shape[-1] == made.value.columns


@pytest.mark.parametrize(
    ("lines", "programs"),
    [(1, 256), (8, 256), (9, 264), (17, 264), (32, 256), (64, 256), (67, 264)],
)
def test_programs_are_aligned_with_heads_where_few_are_lost(lines, programs):
    """Of 264: 8 heads a line, whose pages all take as long."""
    made = layer("kivi4-g64", 128)
    cut = cuda.shared(made, 4, 4)
    assert cut.programs == 2
    assert cuda.cut_for(made, lines, 256, 13, cut, 132)[:2] == (programs, (32,) * 8)


def test_programs_of_merge_share_queries_evenly():
    """What lies behind a place's last query is not its own to read."""
    found = {(m, n): cuda.queries_of_merge(m, n, 132) for m in (1, 2, 3, 4) for n in (8, 60, 256)}
    assert all(m % per == 0 for (m, _), per in found.items())
    assert [found[4, n] for n in (8, 60, 256)] == [1, 2, 4]
    assert [found[3, n] for n in (8, 60, 256)] == [1, 3, 3]


def test_counts_are_constants_where_all_heads_have_all_columns():
    made = layer("kivi4-g64", 128)
    assert cuda.full(made)
    assert cuda.macros(made, 4, 4, False, torch.bfloat16)["FULL"] == 1
    counts = made.value.operand.counts
    fewer = [*counts[:-1], (counts[-1][0] - 16, *counts[-1][1:])]
    value = SimpleNamespace(operand=SimpleNamespace(counts=fewer), chunks=made.value.chunks)
    assert not cuda.full(SimpleNamespace(key=made.key, value=value))
    assert not cuda.full(SimpleNamespace(key=value, value=made.value))


@pytest.mark.parametrize("name", ["fisher2", "fisher2-pre"])
def test_pages_whose_values_wait_for_room_cost_more(name, monkeypatch):
    made = layer(name, 128)
    cut = cuda.shared(made, 4, 4)
    monkeypatch.setattr(cuda, "shared", lambda *_: cut)
    monkeypatch.setattr(cuda, "room_of", lambda _: ([cut.room] * 7 + [cut.room + 1], 0))
    *others, last = cuda.columns(made)
    assert set(others) == {others[0]}
    wanted = others[0] + cuda.DECODED_WAIT if made.decoder else others[0] / cuda.OVER
    assert last == pytest.approx(wanted)


def test_programs_times_items_are_32_bits():
    made = layer("kivi4-g64", 128)
    cut = cuda.shared(made, 4, 4)
    programs, *_ = cuda.cut_for(made, 6000, 8, 400, cut, 132)
    assert programs * 6000 * made.heads * 400 < 2**32


@pytest.mark.parametrize(("lines", "aligned"), [(1, True), (4, True), (8, False), (32, False)])
def test_heads_have_whole_programs_where_many_are_a_line_s(lines, aligned):
    """Of 396; pages of heads take 23 to 48."""
    made = layer("fisher2", 128)
    made.cost = (27, 31, 47, 24, 23, 26, 30, 48)
    cut = replace(cuda.shared(made, 4, 4), warps=4, programs=3)
    programs, costs, start = cuda.cut_for(made, lines, 256, 13, cut, 132)
    assert start == (0 if aligned else round(cuda.START * 4 * sum(made.cost) / 8))
    assert programs == (lines * sum(costs) if aligned else 396)
    assert (costs != made.cost) == aligned
    assert programs >= 0.95 * 396
    wanted = [c * sum(costs) / sum(made.cost) for c in made.cost]
    assert all(abs(n / x - 1) < 0.07 for n, x in zip(costs, wanted, strict=True))
    assert 2 * cuda.exact_cost(costs) <= sum(costs) / len(costs)
    assert cuda.exact_cost(costs) < min(costs)
    assert cuda.exact_cost((2, 30)) == 1
