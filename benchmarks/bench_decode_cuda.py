"""Decode attention on packed pages against the best bfloat16 attention of the same run.

One layer of Llama 3 8B's shape: 32 query and 8 KV heads, head_dim 128, bfloat16; whole attention
to as many tokens as bfloat16 has, of which 4 sinks and a window of 124 in 192 slots are exact, with
the merge. Every time is a CUDA graph of launches on
buffers that together exceed the L2 cache. Correctness against the page walk comes first: a row
whose error is too large gets no time. Pages hold encoded random states, drawn with repetition;
`fisher` has the mixed widths of `mixed_widths.py`.

    PYTHONPATH=src python benchmarks/bench_decode_cuda.py --out decode_cuda.csv --seconds 200
"""

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mixed_widths
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvfold
from kvfold.attention import paged
from kvfold.cache.pool import Pool
from kvfold.cache.store import LayerStore, View
from kvfold.cache.timeline import Located, Timeline
from kvfold.codec import Site
from kvfold.codecs.fisher import Fisher
from kvfold.evaluation.perplexity import environment
from kvfold.kernels import cuda
from kvfold.kernels.triton import decode
from kvfold.transforms.rope import Rope

HEADS, GROUP, DIM, BLOCK = 8, 4, 128, 128
EXACT = 4 + 64 + BLOCK  # slots of sinks and window
DEVICE = torch.device("cuda", 0)
ROPE = Rope(tuple(5e5 ** (-i / 64) for i in range(64)))
SHAPES = (
    (1, 32_768), (8, 32_768), (1, 131_072), (32, 8192), (1, 4096), (64, 4096),
    (4, 4096), (16, 4096),
)  # fmt: skip
PRESETS = (
    "turboquant4-uniform", "turboquant2-uniform", "kivi4-g64", "kivi2-g64", "fisher2",
    "fisher2-post", "fisher2-pre", "fisher4", "turboquant4", "int8",
)  # fmt: skip
L2, CALLS = 600e6, 12
#: others' kernels, and why they are no rows
PEERS = (
    "FlashInfer decode, bfloat16",
    "FlashInfer decode, fp8",
    "vLLM int4 decode",
    "vLLM TurboQuant decode",
    "xformers triton_splitk int4",
)
NOT_RUN = "no wheel of it on the measuring machine, which takes no packages"


def timed(run: Callable[[Any], object], sets: Sequence[Any], repeats: int = 20) -> list[float]:
    """Quantiles 20, 50 and 80 % of microseconds of one call, over replays of all sets in turn.

    A graph holds at least `CALLS` of them: what launching it costs is not the call's.
    """
    sets = list(sets) * -(-CALLS // len(sets))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for item in sets:
            run(item)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in sets:
            run(item)
    for _ in range(3):
        graph.replay()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / len(sets))
    return torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def copy_rate() -> float:
    """Bytes per second of a device-to-device copy, read and written bytes counted."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2e6 * x.numel() / timed(lambda _: y.copy_(x), [0])[1]


def store_of(name: str) -> LayerStore:
    """A layer of a preset, whose first 16 pages are encoded random states."""
    preset, made = kvfold.get(name), []
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, HEADS, DIM, BLOCK, dtype=torch.bfloat16, device=DEVICE, rope=ROPE)  # type: ignore[arg-type]
        fisher = isinstance(codec, Fisher)
        tables = mixed_widths.tables(codec, site) if fisher else codec.example(site)
        made.append(codec.bind(site, tables))
    store = LayerStore(*made, Timeline(4, 64, BLOCK))
    length = 16 * BLOCK + 68
    keys, values = torch.randn(2, 1, HEADS, length + 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    for part in (slice(0, length), slice(length, length + 1)):
        step = store.timeline.plan(1, part.stop - part.start, None, None)
        store.view = store.append(keys[:, :, part], values[:, :, part], step)  # type: ignore[attr-defined]
        store.timeline.commit(step)
    return store


def error_of(store: LayerStore) -> float:
    """Of the kernels against the page walk in float32, over the output's size.

    The larger one, where many pages have kernels of their own (`cuda.served`).
    """
    view: View = store.view  # type: ignore[attr-defined]
    q = torch.randn(1, HEADS * GROUP, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    reason = decode.refuses(q, view)
    if reason is not None:
        raise NotImplementedError(reason)
    wanted = paged.attend(q, view, scaling=DIM**-0.5)
    errors, many = [], cuda.MADE_PAGES
    try:
        for cuda.MADE_PAGES in (many, 0):
            found = decode.attend(q, view, scaling=DIM**-0.5).float()
            errors.append((found - wanted).norm() / wanted.norm())
    finally:
        cuda.MADE_PAGES = many
    return float(torch.stack(errors).max())


def folded(tokens: int) -> int:
    """Pages of a context: sinks and a window of 64 at least stay exact."""
    return (tokens - 4 - 64) // BLOCK


def filled(store: LayerStore, rows: int, tokens: int) -> list[Located]:
    """Enough random pages that sets of them exceed the L2 cache; the numbers of each set."""
    pages = store.pool.gather(range(16)).clone()
    each = folded(tokens)
    sets = max(1, int(L2 / (rows * each * store.layout.nbytes)) + 1)
    total = rows * each * sets
    store.pool = Pool(store.layout.nbytes, total, DEVICE)
    store.pool.reserve(total)
    store.pool.slabs[0].copy_(pages[torch.randint(0, 16, (total,), device=DEVICE)])
    table = torch.arange(total).view(sets, each, rows).mT.contiguous()
    return [
        Located(
            numbers([tokens] * rows),
            numbers([each] * rows),
            numbers([0] * rows),
            numbers(part),
            numbers(torch.arange(each).expand(rows, -1)),
        )
        for part in table
    ]


def numbers(x: Any) -> Tensor:
    """As int32 on the device."""
    return torch.as_tensor(x).to(DEVICE, torch.int32).contiguous()


def packed(store: LayerStore, rows: int, tokens: int) -> list[float]:
    """Microseconds of one layer's attention."""
    sets = filled(store, rows, tokens)
    layer = decode.lowered(store)
    shape = (2, rows, HEADS, EXACT, DIM)
    keys, values = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(rows, HEADS * GROUP, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    places = torch.arange(EXACT)
    places[tokens - BLOCK * folded(tokens) :] = -1
    places = numbers(places.expand(rows, -1))
    last = numbers([[EXACT - 1]] * rows)

    def run(at: Located) -> None:
        decode.decode(q, layer, keys, values, places, last, at, scaling=DIM**-0.5)

    return timed(run, sets)


def uncompressed(rows: int, tokens: int) -> dict[str, list[float]]:
    """Microseconds of torch's kernels, query heads of a group as queries of their KV head."""
    found = {}
    sets = max(1, int(L2 / (rows * tokens * HEADS * DIM * 4)) + 1)
    states = [
        torch.randn(2, rows, HEADS, tokens, DIM, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(sets)
    ]
    q = torch.randn(rows, HEADS, GROUP, DIM, device=DEVICE, dtype=torch.bfloat16)
    wide = q.reshape(rows, HEADS * GROUP, 1, DIM)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "grouped": lambda kv: sdpa(q, kv[0], kv[1]),
        "enable_gqa": lambda kv: sdpa(wide, kv[0], kv[1], enable_gqa=True),
    }
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for way, run in ways.items():
            try:
                with sdpa_kernel(backend):
                    found[f"{backend.name.split('_')[0].lower()}, {way}"] = timed(run, states)
            except RuntimeError:  # the backend does not take this form
                continue
    try:
        flex = torch.compile(flex_attention, dynamic=False)
        off = flex(wide, *states[0], enable_gqa=True) - sdpa(wide, *states[0], enable_gqa=True)
        if off.abs().max() < 1e-2:
            run = lambda kv: flex(wide, kv[0], kv[1], enable_gqa=True)  # noqa: E731
            found["FlexAttention, compiled"] = timed(run, states)
    except RuntimeError as error:
        print("FlexAttention:", str(error)[:200])
    return found


def main() -> None:
    """Measure until time is up; a part that fails is a row with its error."""
    make = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--seconds", type=float, default=200)
    make.add_argument("--presets", default=",".join(PRESETS))
    args = make.parse_args()
    begin, rows_out = time.time(), []
    torch.manual_seed(0)
    rate = copy_rate()
    stores: dict[str, LayerStore | str] = {}
    errors: dict[str, float] = {}
    for name in args.presets.split(","):
        try:
            stores[name] = store_of(name)
            errors[name] = error_of(stores[name])  # type: ignore[arg-type]
        except Exception as error:
            stores[name] = repr(error)[:300]
        print(name, errors.get(name, stores[name]), f"{time.time() - begin:.0f} s", flush=True)
    for rows, tokens in SHAPES:
        best = None
        for what, us in uncompressed(rows, tokens).items():
            best = us[1] if best is None else min(best, us[1])
            nbytes = 4 * rows * tokens * HEADS * DIM
            add(rows_out, "bfloat16", what, rows, tokens, us, nbytes, rate, None)
        torch.cuda.empty_cache()
        for name, store in stores.items():
            if isinstance(store, str) or not errors[name] <= 5e-3:  # not a number is too large
                note = store if isinstance(store, str) else f"error {errors[name]:.3g}"
                rows_out.append({"what": name, "rows": rows, "tokens": tokens, "note": note})
                continue
            if time.time() - begin > args.seconds:
                rows_out.append({"what": name, "rows": rows, "tokens": tokens, "note": "not run"})
                continue
            how = "CUDA kernels" if decode.lowered(store).native is not None else "Triton kernels"
            try:
                us = packed(store, rows, tokens)
            except Exception as error:
                rows_out.append({"what": name, "how": how, "rows": rows, "tokens": tokens,
                                 "note": repr(error)[:300]})  # fmt: skip
                continue
            nbytes = rows * folded(tokens) * store.layout.nbytes
            add(rows_out, name, how, rows, tokens, us, nbytes, rate, best)
            rows_out[-1] |= {"bits": store.layout.bits_per_element, "error": errors[name]}
    rows_out += [{"what": name, "note": f"not run: {NOT_RUN}"} for name in PEERS]
    where = environment(DEVICE)
    columns = list(dict.fromkeys(key for row in rows_out for key in row))
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, "copy_tb_per_s", *where], restval="")
        writer.writeheader()
        writer.writerows({**row, "copy_tb_per_s": rate / 1e12, **where} for row in rows_out)


def add(out: list[dict], what: str, how: str, rows: int, tokens: int, us: list[float],
        nbytes: int, rate: float, best: float | None) -> None:  # fmt: skip
    """One row, printed too; `nbytes` of pages or states are read."""
    out.append(
        {
            "what": what,
            "how": how,
            "rows": rows,
            "tokens": tokens,
            "us_20": us[0],
            "us": us[1],
            "us_80": us[2],
            "bytes": nbytes,
            "of_copy": nbytes / us[1] * 1e6 / rate,
            "speedup": None if best is None else best / us[1],
            "note": "",
        }
    )
    print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in out[-1].items()}, flush=True)


if __name__ == "__main__":
    main()
