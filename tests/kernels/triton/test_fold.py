"""Folding kernels, in Triton's interpreter, against the reference packer and encoders."""

import os
import subprocess
import sys

import pytest
import torch

import kvfold
from kvfold.codec import Site
from kvfold.codecs.fisher import Fisher
from kvfold.codecs.kivi import Kivi
from kvfold.packing import DigitPlan
from kvfold.transforms.rope import Rope

fold = pytest.importorskip("kvfold.kernels.triton.fold")
ROPE = Rope(tuple(10_000.0 ** -(i / 16) for i in range(16)))


def mixed(heads, dim):
    return tuple(tuple((5 * h + 3 * c) % 9 for c in range(dim)) for h in range(heads))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(("heads", "dim", "block"), [(3, 40, 128), (2, 64, 256), (1, 16, 48)])
def test_words_are_the_reference_packers(axis, heads, dim, block):
    plan = DigitPlan(mixed(heads, dim), block, axis)
    top = 2 ** torch.tensor(plan.bits)[None, :, None]
    codes = (torch.rand(3, heads, block, dim) * top).to(torch.int16)
    wanted = plan.pack(codes)
    found = fold.pack(plan, codes)
    assert list(found) == list(wanted)
    for name, words in wanted.items():
        assert torch.equal(found[name], words), name


def bound(side, dim=32, block=64, bits=2.5, **knobs):
    codec = Fisher(bits=bits, **knobs)
    site = Site(side, 2, dim, block, rope=ROPE)
    tables = codec.example(site).at(0, side)
    generator = torch.Generator().manual_seed(3)
    for name, table in tables.items():
        if name == "mean":
            tables[name] = torch.randn(table.shape, generator=generator)
        if name.endswith("codes"):
            widths = table[0].clone()
            widths[0, :8], widths[0, -8:], widths[1, 0] = 6, 0, 0
            tables[name] = torch.stack((widths, table[1].clamp_min(0.02), table[2]))
        if name.endswith("scales"):
            tables[name] = table * torch.rand(table.shape, generator=generator).add(0.5)
    return codec.bind(site, kvfold.codec.ExampleTables(tables))


@pytest.mark.parametrize(
    ("side", "knobs"),
    [
        ("key", {"form": "tile"}),
        ("key", {"form": "tile", "tile": 32}),
        ("key", {"form": "post"}),
        ("key", {"form": "pre"}),
        ("value", {}),
        ("value", {"search": 0}),
    ],
)
def test_bytes_are_the_references_but_for_ties(side, knobs):
    made = bound(side, **knobs)
    assert fold.serves(made)
    x = torch.randn(3, 64, 2, 32, generator=torch.Generator().manual_seed(4)).transpose(1, 2)
    x = x * torch.rand(3, 2, 64, 1).mul(4)
    x[0, 0, 5], x[1, 1] = 0, x[1, 1] * 1e-4
    positions = torch.arange(3)[:, None] * 700 + torch.arange(64) + 9
    wanted = made.layout.join(made.encode(x, positions))
    found = fold.encoded(made, x, positions)
    assert found.shape == wanted.shape
    share = (found != wanted).float().mean().item()
    assert share < 0.001, share


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(("bits", "group", "dim"), [(4, 32, 64), (2, 16, 80), (3, 64, 128)])
def test_groups_are_the_references(axis, bits, group, dim):
    if axis == "channel" and dim % group:
        pytest.skip(f"groups of {group} do not divide {dim} channels")
    side = "key" if axis == "token" else "value"
    made = Kivi(bits, group, axis).bind(Site(side, 3, dim, 64))
    assert fold.serves(made)
    x = torch.randn(2, 64, 3, dim, generator=torch.Generator().manual_seed(5)).transpose(1, 2)
    x[0, 0], x[1, 1], x[1, 2, :, 3] = 0.25, x[1, 1] * 1e-7, 1e5  # constant, tiny, beyond float16
    positions = torch.arange(64).expand(2, -1)
    assert torch.equal(
        fold.encoded(made, x, positions), made.layout.join(made.encode(x, positions))
    )


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvfold.kernels.triton import fold

def built(kernel, types, constants, warps):
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

types = dict.fromkeys(("matrix_ptr", "mean_ptr", "turn_ptr", "tables_ptr", "gains_ptr"), "*fp32")
types |= {"x_ptr": "*bf16", "mate_ptr": "*i32", "codes_ptr": "*u8", "bytes_ptr": "*u8"}
types |= dict.fromkeys(("x_block", "x_head", "x_token", "byte_block"), "i32") | {"scaling": "fp32"}
order = {name: types[name] for name in fold.quantise_kernel.arg_names if name in types}
for turn, mean, run in ((True, False, 128), (False, True, 1), (False, False, 1)):
    constants = dict(HEADS=8, B=128, D=128, P_D=128, T=fold.TOKENS, K=16, RUN=run, TURN=turn,
                     TURN_MEAN=mean, SEARCH=4)
    made = built(fold.quantise_kernel, order, constants, 4)
    assert made.metadata.shared < 64 << 10, made.metadata.shared
types = {"codes_ptr": "*u8", "columns_ptr": "*i32", "about_ptr": "*i32", "out_ptr": "*i16"}
constants = dict(HEADS=8, B=128, D=128, P_D=128, U=32)
built(fold.pack_kernel, types | {"out_words": "i32"}, constants, 4)
types = {"x_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*fp16", "zero_ptr": "*fp16"}
types |= dict.fromkeys(("x_block", "x_head", "x_token", "scale_block"), "i32")
for along, tokens, channels in ((0, 64, 32), (1, 32, 64)):
    constants = dict(HEADS=8, B=128, D=128, T=tokens, N=channels, ALONG=along, TOP=15.0)
    built(fold.group_kernel, types, constants, 4)
print("built")
"""


def test_kernels_are_built_for_hopper_without_one():
    """Down to machine code, by the assembler that comes with Triton."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip().endswith("built"), run.stderr[-2000:]
