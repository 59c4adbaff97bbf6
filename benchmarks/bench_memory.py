"""Bytes that a cache really holds, and the peak while it fills, against the stock cache.

    python benchmarks/bench_memory.py --dtype bfloat16 --tokens 500,2000,8000

Each row is a process of its own: prefill in one call, then 16 decode steps. `share` is every
allocated byte over the same tokens in bfloat16, window, sinks, tables and unused pool included.
The peak is the allocator's on CUDA (beyond the weights), the resident set's elsewhere.
"""

import json
import resource
import subprocess
import sys

import torch
from common import load, parser, write

import kvfold


def measure(args, preset: str, tokens: int) -> dict:
    """One row: fill a cache with `tokens` random tokens, decode 16 more, count."""
    model, _ = load(args)
    on_gpu = args.device.startswith("cuda")
    ids = torch.randint(100, 40_000, (1, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(args.device)
    before = torch.cuda.memory_allocated() if on_gpu else rss()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    cache = None if preset == "stock" else kvfold.FoldedCache(model, preset, strict=True)
    with torch.no_grad():
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        for _ in range(16):
            out = model(ids[:, :1], past_key_values=cache, use_cache=True)
    peak = (torch.cuda.max_memory_allocated() if on_gpu else rss()) - before
    parts = {"pages": 0, "pool_unused": 0, "window": 0, "sinks": 0, "tables": 0, "exact_layers": 0}
    if preset == "stock":
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        held = sum(t.untyped_storage().nbytes() for t in tensors)
        whole = sum(t.numel() * 2 for t in tensors)
    else:
        parts = cache.nbytes()
        held, whole = sum(parts.values()), cache.uncompressed_nbytes()
    row = {"what": "memory", "preset": preset, "tokens": tokens, "held_bytes": held}
    return row | {"bfloat16_bytes": whole, "share": held / whole, **parts, "peak_bytes": peak}


def rss() -> int:
    """Largest resident set so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Start a process for each preset and length, and collect their rows."""
    make = parser(__doc__, "memory.csv")
    make.add_argument("--tokens", default="500,2000,8000")
    make.add_argument("--one", nargs=2, metavar=("PRESET", "TOKENS"), help="measure this, as JSON")
    args = make.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.one[0], int(args.one[1]))))
        return
    rows = []
    for tokens in args.tokens.split(","):
        for preset in ["stock", *args.presets.split(",")]:
            more = ["--model", args.model, "--device", args.device, "--dtype", args.dtype]
            command = [sys.executable, __file__, *more, "--one", preset, tokens]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    write(args.out, rows, args)


if __name__ == "__main__":
    main()
