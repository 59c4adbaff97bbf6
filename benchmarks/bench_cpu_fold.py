"""Folding on a CPU: one block and a prompt's worth of them, in torch and as the cache does it.

    python benchmarks/bench_cpu_fold.py                       # every preset, 3 heads of 64 channels
    python benchmarks/bench_cpu_fold.py --presets fisher2 --heads 8 --head-dim 128

Correctness first: the bytes are those of `BoundCodec.encode`, but for one in a thousand. Both take
the same blocks in turn, so that they see the same machine: median and 20/80 % quantiles over the
repetitions, milliseconds for the keys and values of all blocks.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from torch import Tensor

import kvfold
from kvfold.cache.store import LayerStore
from kvfold.codec import BoundCodec, CodecError, Site, exact_math
from kvfold.transforms.rope import Rope

BLOCK = 128
NUMBERS = ("median_ms", "q20_ms", "q80_ms", "over_torch", "differing")


def main() -> None:
    """Presets, and blocks that are folded together."""
    make = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    make.add_argument("--presets", default=",".join(kvfold.presets()))
    make.add_argument("--blocks", default="1,15", help="15: what a prompt of 2,000 tokens folds")
    make.add_argument("--heads", type=int, default=3)
    make.add_argument("--head-dim", type=int, default=64)
    make.add_argument("--repeats", type=int, default=30)
    make.add_argument("--out", type=Path, default=RESULTS / "cpu_fold.csv")
    args = make.parse_args()
    args.device, args.dtype = "cpu", "bfloat16"
    rows = [
        row
        for preset in args.presets.split(",")
        for blocks in map(int, args.blocks.split(","))
        for row in measured(preset, blocks, args)
    ]
    write(args.out, rows, args)


def measured(preset: str, blocks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one preset and number of blocks: torch's and the cache's."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, blocks, BLOCK, args.heads, args.head_dim)
    states = torch.randn(shape, generator=generator).to(torch.bfloat16).transpose(2, 3)
    positions = torch.arange(blocks * BLOCK).view(blocks, BLOCK)
    about = {"preset": preset, "blocks": blocks, "heads": args.heads, "head_dim": args.head_dim}
    about |= {"threads": torch.get_num_threads()}
    try:
        sides = [bound(preset, side, args) for side in ("key", "value")]
    except CodecError as error:
        return [about | dict.fromkeys(NUMBERS, "") | {"path": "", "note": f"not run: {error}"}]

    def folded(path: Callable[..., Tensor]) -> Tensor:
        return torch.cat([path(b, x, positions) for b, x in zip(sides, states, strict=True)], 1)

    paths = {"torch": in_torch, "cache": LayerStore.encoded}
    wanted, found = (folded(path) for path in paths.values())
    differing = (found != wanted).float().mean().item()
    assert differing < 1e-3, f"{preset}: {differing:.2g} of the bytes differ"
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(args.repeats):
        for name, path in paths.items():
            start = time.perf_counter()
            folded(path)
            times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, spent in times.items():
        low, middle, high = torch.tensor(spent).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        over = middle / torch.tensor(times["torch"]).quantile(0.5).item()
        numbers = zip(NUMBERS, (middle, low, high, over, differing), strict=True)
        rows.append(about | {k: f"{x:.4g}" for k, x in numbers} | {"path": name, "note": ""})
    return rows


def bound(preset: str, side: str, args: argparse.Namespace) -> BoundCodec:
    """A preset's keys or values on its example tables."""
    codec = getattr(kvfold.get(preset), f"{side}s")
    rope = Rope(tuple(1e4 ** (-2 * i / args.head_dim) for i in range(args.head_dim // 2)))
    site = Site(side, args.heads, args.head_dim, BLOCK, dtype=torch.bfloat16, rope=rope)
    return codec.bind(site, codec.example(site))


@exact_math
def in_torch(code: BoundCodec, x: Tensor, positions: Tensor) -> Tensor:
    """The reference: what `LayerStore.encoded` gives without an encoder of its own."""
    return code.layout.join(code.encode(x, positions))


if __name__ == "__main__":
    main()
