"""Machine instructions per KV element of the CUDA decode loop, counted without a GPU.

Compiles `kvfold.kernels.triton.loop.decode_kernel` for sm_90 as the presets use it (8 KV heads, 4
query heads each, bfloat16 models), disassembles it and counts the loop over pages:

    instructions per element = loop instructions * warps * 32 / (page * (key_dim + value_dim))

that is, instructions issued per lane for each K or V element, chunks of columns that a head lacks
included. Nothing is launched.

    python benchmarks/count_instructions.py --out benchmarks/results/decode_loop.csv
    python benchmarks/count_instructions.py --uniform --json    # the uniform codes, a line each
"""

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kvfold
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.calibration.artefact import commit
from kvfold.codec import Site
from kvfold.kernels.triton import decode, loop, unpack
from kvfold.transforms.rope import Rope

HEADS, GROUP = 8, 4
#: uniform codes by bits: sections of K and of V, and what the loop may cost at most.
UNIFORM = {"4 bits": ((8, 0, 0), 3.4), "3 bits": ((0, 8, 8), 2.6), "2 bits": ((0, 8, 0), 1.8)}
PRESETS = ("fisher2", "fisher2-post", "fisher4", "turboquant4", "kivi4-g64", "kivi2-g64")
POINTERS = {
    "items_ptr": "*i32",
    "heads_ptr": "*i32",
    "folded_ptr": "*i32",
    "addresses_ptr": "*i64",
    "q_ptr": "*fp16",
    "mean_ptr": "*fp16",
    "raw_q_ptr": "*bf16",
    "keys_ptr": "*bf16",
    "values_ptr": "*bf16",
    "tokens_ptr": "*i32",
    "query_tokens_ptr": "*i32",
}
NUMBERS = {"scale": "fp32", "cap": "fp32"}


def constants_of(preset: str, head_dim: int, page: int) -> dict[str, object]:
    """The compile-time arguments that a layer of a preset gives."""
    made = []
    rope = Rope(tuple(5e5 ** (-2 * i / head_dim) for i in range(head_dim // 2)))
    chosen = kvfold.get(preset)
    for side, codec in (("key", chosen.keys), ("value", chosen.values)):
        site = Site(side, HEADS, head_dim, page, dtype=torch.bfloat16, rope=rope)
        made.append(codec.bind(site, codec.example(site)))
    return decode.lowered(LayerStore(*made, Timeline(4, 64, page))).constants


def uniform(chunks: tuple[int, int, int], page: int) -> dict[str, object]:
    """Uniform sections at head_dim 128 with a byte of gain a token, queries prepared once."""
    found = constants_of("fisher4-post", 128, page) | {"MEAN": False, "PAGED": False}
    found |= {"K_WHOLE": 2, "V_WHOLE": 2}
    for side, which in (("K", "key"), ("V", "value")):
        for width, count in zip((4, 2, 1), chunks, strict=True):
            found[f"{side}{width}"] = count
            text = unpack.assembly(width, page * width // 16, which) if count else ""
            found[f"ASM_{side}{width}"] = text
    return found


def source(constants: dict[str, object]) -> ASTSource:
    """The kernel with its constants, for four query heads of one token."""
    given = {
        **constants,
        "N": decode.TILE,
        "M": GROUP,
        "MEAN_N": GROUP,
        "CAP": False,
        "EXACT_TOKENS": decode.EXACT_TOKENS,
        "DTYPE": tl.bfloat16,
        "STAGES": decode.Tuning().stages,
    }
    given = {k: v.value if isinstance(v, tl.constexpr) else v for k, v in given.items()}
    signature = {}
    for name in loop.decode_kernel.arg_names:
        pointer = POINTERS.get(name, "*fp32") if name.endswith("_ptr") else None
        signature[name] = "constexpr" if name in given else pointer or NUMBERS.get(name, "i32")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if "*" in kind
    }
    return ASTSource(loop.decode_kernel, signature, given, aligned)


def tool(name: str, *arguments: str) -> str:
    """The output of a disassembler of Triton's package."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    command = [str(folder / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def hot_loop(sass: str) -> list[str]:
    """The instructions between the farthest backward branch and its target."""
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L\w+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
            target = re.search(r"BRA.*`\((\.L\w+)\)", found[1])
            if target and labels.get(target[1], len(code)) < len(code) - 1:
                loops.append((labels[target[1]], len(code)))
    start, end = max(loops, key=lambda found: found[1] - found[0])
    return code[start:end]


def measure(constants: dict[str, object]) -> dict[str, object]:
    """Compile one variant and count."""
    warps = int(constants["W"])  # type: ignore[call-overload]
    kernel = triton.compile(
        source(constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = hot_loop(tool("nvdisasm", "-c", file.name))
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    elements = int(constants["B"]) * (int(constants["D_K"]) + int(constants["D_V"]))  # type: ignore[call-overload]
    return {
        "instructions_per_element": round(len(code) * warps * 32 / elements, 2),
        "loop_instructions": len(code),
        "registers": int(found[1]),
        "spill_bytes": int(found[2]),
        "barriers_in_loop": sum("BAR." in i for i in code),
        "shared_bytes": kernel.metadata.shared,
    }


def main() -> None:
    """Count and write, or check."""
    make = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    make.add_argument("--out", type=Path, help="the CSV to write")
    make.add_argument("--uniform", action="store_true", help="only the uniform codes")
    make.add_argument("--json", action="store_true", help="print rows as JSON")
    args = make.parse_args()
    rows = []

    def add(what: str, page: int, budget: float | None, constants: dict[str, object]) -> None:
        rows.append({"what": what, "page": page, "budget": budget, **measure(constants)})
        print(json.dumps(rows[-1]) if args.json else rows[-1], flush=True)

    for name, (chunks, budget) in UNIFORM.items():
        add(name, 128, budget, uniform(chunks, 128))
    for preset in () if args.uniform else PRESETS:
        add(preset, 128, None, constants_of(preset, 128, 128))
    if args.out is not None:
        where = {"triton": triton.__version__, "commit": commit()}
        where |= {"date": datetime.date.today().isoformat()}
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *where])
            writer.writeheader()
            writer.writerows({**row, **where} for row in rows)


if __name__ == "__main__":
    main()
