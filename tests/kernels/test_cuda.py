"""The CUDA sources compile for sm_90 without a GPU, in the registers that launches count on."""

import ctypes
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

import kvfold
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import Site
from kvfold.kernels import cuda
from kvfold.kernels.cuda import before_rope, build
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


def layer(name, dim=128, block=128, heads=8):
    preset, made = kvfold.get(name), []
    rope = Rope(tuple(5e5 ** (-2 * i / dim) for i in range(dim // 2)))
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, heads, dim, block, dtype=torch.bfloat16, rope=rope)
        made.append(codec.bind(site, codec.example(site)))
    return decode.lowered(LayerStore(*made, Timeline(4, 64, block)))


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
    jobs = {"attend": cuda.macros(made, 4, 4, False, torch.bfloat16)}
    if cuda.whole_keys(made):
        jobs["prepare"] = cuda.prepare_macros(made, 4, 4, torch.bfloat16)
    for kernel, macros in jobs.items():
        registers, loops = compiled(kernel, macros, tmp_path)
        products = [sum("MMA" in line for line in loop) for loop in loops]
        inner = min(
            (x for x, n in zip(loops, products, strict=True) if n == max(products)), key=len
        )
        few = 0 if made.decoder is None else 12
        assert kernel == "prepare" or dim == 64 or len(spilled(inner)) <= few, spilled(inner)
        warps = cut.programs * cut.warps if kernel == "attend" else cuda.PREPARE_WARPS
        warps += before_rope.BRINGERS if made.decoder is not None else 0
        assert registers * 32 * warps <= 65_536, (kernel, registers)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_shapes_compile(m, dtype, tmp_path):
    made = layer("fisher2", 96)
    mean_n = 2 if m == 1 else 4
    compiled("attend", cuda.macros(made, m, mean_n, True, dtype), tmp_path)
    compiled("prepare", cuda.prepare_macros(made, m, mean_n, dtype), tmp_path)
    for per in {1, m}:
        macros = cuda.merge_macros(made, m, per, True, dtype)
        registers, _ = compiled("merge", macros, tmp_path)
        assert registers * cuda.MERGE_THREADS <= 65_536


def test_what_the_compiler_says_is_passed_on():
    with pytest.raises(RuntimeError, match=r"NVRTC refused a kernel for sm_90: .*undefined"):
        build.cubin("__global__ void f() { missing(); }", "sm_90", [], library())


def test_what_is_not_read_is_refused():
    assert cuda.refuses(layer("int8", block=256)) == "pages of 256 tokens"


def test_operands_lie_as_a_warp_reads_them():
    """Lane (g, c), register r: channels of rows 4 (g / 2) + g % 2, and that + 2."""
    rows = torch.arange(2 * 32 * 64).view(2, 32, 64)
    found = cuda.operands(rows.float() % 1024).view(2, 2, 4, 32, 4, 2)
    for lane, register in ((0, 0), (13, 1), (22, 2), (31, 3)):
        g, c = lane // 4, lane % 4
        row = 16 + 4 * (g // 2) + g % 2 + 2 * (register % 2)
        channel = 2 * 16 + 4 * c + 2 * (register // 2)
        wanted = rows[1, row, channel : channel + 2] % 1024
        assert torch.equal(found[1, 1, 2, lane, register].long(), wanted)
