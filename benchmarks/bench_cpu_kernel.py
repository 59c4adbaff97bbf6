"""Attention of one query over packed pages on a CPU, against torch's SDPA, interleaved.

    python benchmarks/bench_cpu_kernel.py            # 32/8 heads, head_dim 128, 16k tokens
    python benchmarks/bench_cpu_kernel.py --scaling  # also 1 to all threads

Correctness first: on every instruction set the output's error against the float32 oracle over the
same pages is at most twice that of the page walk in the same dtype, and 1e-5 (1e-3). SDPA runs as
`enable_gqa=True`, and in its best arrangement: the query heads of a group as rows of one product.
`stream_gbs` is what all threads read from memory in the same run (the sum of 256 MB), and
`of_stream` the share of it that a call reaches in packed bytes (pages, sinks, window). `fisher` has
the mixed widths of `mixed_widths.py`.
"""

import argparse
import time
from pathlib import Path

import mixed_widths
import torch
from common import RESULTS, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvfold
from kvfold.attention import paged
from kvfold.attention.oracle import oracle
from kvfold.cache.store import LayerStore, View
from kvfold.cache.timeline import Timeline
from kvfold.codec import Codec, ExampleTables, Site
from kvfold.codecs.fisher import Fisher
from kvfold.kernels import cpu
from kvfold.transforms.rope import Rope

PRESETS = (
    "fisher4-post,fisher4,fisher4-pre,fisher2-post,fisher2,fisher2-pre,"
    "kivi4-g64,kivi2-g64,turboquant4,int8"
)


def tables(codec: Codec, site: Site) -> ExampleTables:
    """A real model's mixed widths for `fisher` at head_dim 128, else made-up tables."""
    if isinstance(codec, Fisher) and site.head_dim == 2 * mixed_widths.DIM:
        return mixed_widths.tables(codec, site)
    return codec.example(site)


def filled(name: str, keys: Tensor, values: Tensor, heads: int, dim: int) -> View:
    """The view of one more token on a packed layer of these states."""
    preset, timeline = kvfold.get(name), Timeline(4, 64, 128)
    rope = Rope(tuple(5e5 ** (-i / (dim // 2)) for i in range(dim // 2)))
    key, value = (
        codec.bind(site, tables(codec, site))
        for codec, site in (
            (preset.keys, Site("key", heads, dim, 128, dtype=keys.dtype, rope=rope)),
            (preset.values, Site("value", heads, dim, 128, dtype=keys.dtype)),
        )
    )
    store = LayerStore(key, value, timeline)
    tokens = keys.shape[2]
    for part in (slice(0, tokens - 1), slice(tokens - 1, tokens)):
        step = timeline.plan(1, part.stop - part.start, None, None)
        view = store.append(keys[:, :, part], values[:, :, part], step)
        timeline.commit(step)
    assert view is not None
    return view


def off(found: Tensor, wanted: Tensor) -> float:
    """The error over the size of what was wanted."""
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def packed_bytes(view: View) -> int:
    """What a call must read."""
    pages = sum(view.folded) * view.store.layout.nbytes
    return pages + view.keys.nbytes + view.values.nbytes


def main() -> None:
    """Fill, check, time."""
    make = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    make.add_argument("--presets", default=PRESETS)
    make.add_argument("--tokens", type=int, default=16_384)
    make.add_argument("--query-heads", type=int, default=32)
    make.add_argument("--kv-heads", type=int, default=8)
    make.add_argument("--head-dim", type=int, default=128)
    make.add_argument("--rounds", type=int, default=60)
    make.add_argument("--threads", type=int, default=torch.get_num_threads())
    make.add_argument("--scaling", action="store_true")
    make.add_argument("--out", type=Path, default=RESULTS / "cpu_kernel.csv")
    args = make.parse_args()
    args.device, args.dtype = "cpu", "as stated"
    heads, dim, group = args.kv_heads, args.head_dim, args.query_heads // args.kv_heads
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, heads, args.tokens, dim, generator=generator).bfloat16()
    q = torch.randn(1, args.query_heads, 1, dim, generator=generator).bfloat16()
    scale, rows = dim**-0.5, []
    stream = torch.ones(64 << 20)
    cases = {("stream", "float32"): (lambda: stream.sum(), stream.nbytes)}
    for dtype in (torch.bfloat16, torch.float32):
        k, v, x = (t.to(dtype) for t in (keys, values, q))
        grouped = x.view(1, heads, group, dim)
        name = str(dtype).split(".")[1]
        cases["SDPA, enable_gqa", name] = (
            lambda x=x, k=k, v=v: sdpa(x, k, v, enable_gqa=True),
            k.nbytes + v.nbytes,
        )
        cases["SDPA, group as rows", name] = (
            lambda x=grouped, k=k, v=v: sdpa(x, k, v),
            k.nbytes + v.nbytes,
        )
    for preset in args.presets.split(","):
        view = filled(preset, keys, values, heads, dim)
        reason = cpu.refuses(q, view)
        assert reason is None, reason
        wanted = oracle(q.float(), view, scaling=scale)
        walked = paged.attend(q.float(), view, scaling=scale)
        for isa in cpu.instruction_sets():
            for dtype, floor in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
                found = cpu.attend(q.to(dtype), view, scaling=scale, isa=isa).float()
                limit = 2 * off(walked.to(dtype), wanted) + floor
                error = off(found, wanted)
                assert error < limit, f"{preset} on {isa} in {dtype}: off by {error:.2g}"
        for dtype in (torch.bfloat16, torch.float32):
            x, name = q.to(dtype), str(dtype).split(".")[1]
            cases[preset, name] = (
                lambda x=x, view=view: cpu.attend(x, view, scaling=scale),
                packed_bytes(view),
            )
        if preset == "fisher4-post":
            for isa in cpu.instruction_sets()[1:]:
                cases[f"{preset}, {isa}", "bfloat16"] = (
                    lambda view=view, isa=isa: cpu.attend(q, view, scaling=scale, isa=isa),
                    packed_bytes(view),
                )
            cases[f"{preset}, torch path", "bfloat16"] = (
                lambda view=view: paged.attend(q, view, scaling=scale),
                packed_bytes(view),
            )
    counts = range(1, args.threads + 1) if args.scaling else [args.threads]
    for threads in counts:
        torch.set_num_threads(threads)
        times = measured({key: case for key, (case, _) in cases.items()}, args.rounds)
        median = {key: torch.tensor(t).median().item() for key, t in times.items()}
        rate = cases["stream", "float32"][1] / median["stream", "float32"] / 1e6
        for (what, dtype), found in times.items():
            low, middle, high = torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            nbytes = cases[what, dtype][1]
            row = {"what": what, "type": dtype, "tokens": args.tokens}
            row |= {"heads": f"{args.query_heads}/{heads}", "head_dim": dim, "threads": threads}
            row |= {"median_ms": middle, "q20_ms": low, "q80_ms": high, "bytes": nbytes}
            gbs = nbytes / middle / 1e6
            row |= {"gbs": gbs, "stream_gbs": rate, "of_stream": gbs / rate}
            for other in ("bfloat16", "float32"):
                base = median["SDPA, group as rows", other]
                row[f"speedup_over_{other}"] = base / middle
            rows.append({k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()})
    write(args.out, rows, args)


def measured(cases: dict, rounds: int) -> dict:
    """Milliseconds of each case, in turn, so that all see the same machine."""
    times: dict = {key: [] for key in cases}
    slow: set = set()
    for i in range(rounds + 2):
        for key, case in cases.items():
            if key in slow and i % 10:
                continue
            start = time.perf_counter()
            case()
            took = 1e3 * (time.perf_counter() - start)
            if took > 30:
                slow.add(key)
            if i >= 2 or key in slow:
                times[key].append(took)
    return times


if __name__ == "__main__":
    main()
