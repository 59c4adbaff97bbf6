"""A long prompt folded once and loaded again, against prefilling it: seconds, bytes, same tokens.

    python benchmarks/bench_prefix.py --tokens 8000 --presets turboquant4,fisher3

Gate: greedy decoding behind the loaded cache gives the tokens that it gives behind the cache that
was saved. Loading includes the checksum over the whole file; the median of five is given.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import load, parser, write

import kvfold


def greedy(model, cache, token, count: int) -> list[int]:
    """The next `count` tokens behind a cache."""
    out = []
    with torch.no_grad():
        for _ in range(count):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            out.append(int(token))
    return out


def main() -> None:
    """Prefill, save, load, and go on from both, for each preset."""
    make = parser(__doc__, "prefix.csv")
    make.set_defaults(presets="turboquant4,fisher3")
    make.add_argument("--tokens", type=int, default=8000)
    args = make.parse_args()
    model, _ = load(args)
    ids = torch.randint(100, 40_000, (1, args.tokens), generator=torch.Generator().manual_seed(3))
    ids = ids.to(args.device)
    rows = []
    for preset in args.presets.split(","):
        cache = kvfold.FoldedCache(model, preset, strict=True)
        start = time.perf_counter()
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        prefill = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prefix.safetensors"
            start = time.perf_counter()
            cache.save(path)
            saving = time.perf_counter() - start
            loads = []
            for _ in range(5):
                start = time.perf_counter()
                loaded = kvfold.FoldedCache.load(model, path)
                loads.append(time.perf_counter() - start)
            size = path.stat().st_size
        found, wanted = (greedy(model, copy.deepcopy(c), ids[:, :1], 16) for c in (loaded, cache))
        if found != wanted:
            raise SystemExit(f"gate: {preset} goes on as {found}, the saved cache as {wanted}")
        seconds = statistics.median(loads)
        rows.append(
            {
                "what": "prefix",
                "preset": preset,
                "tokens": args.tokens,
                "prefill_s": round(prefill, 3),
                "save_s": round(saving, 3),
                "load_s": round(seconds, 4),
                "speedup": round(prefill / seconds, 1),
                "file_bytes": size,
                "bfloat16_bytes": cache.uncompressed_nbytes(),
                "same_tokens": 16,
            }
        )
    write(args.out, rows, args)


if __name__ == "__main__":
    main()
