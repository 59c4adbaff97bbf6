"""Time of one decode step on the torch path against the stock cache, interleaved in one process.

    python benchmarks/bench_decode_step.py --tokens 4096 --threads 2

Correctness first: the first step's logits of `identity` equal the stock cache's. Median and 20/80 %
quantiles over the steps, milliseconds.
"""

import copy
import time

import torch
from common import load, parser, write
from transformers import DynamicCache

import kvfold


def main() -> None:
    """Fill one stock cache, fold copies of it, and step them in turn."""
    make = parser(__doc__, "decode_step.csv")
    make.add_argument("--tokens", type=int, default=4096)
    make.add_argument("--steps", type=int, default=24)
    make.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = make.parse_args()
    torch.set_num_threads(args.threads)
    model, _ = load(args)
    ids = torch.randint(100, 40_000, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(args.device)
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in ids.split(1024, 1):
            model(part, past_key_values=stock, logits_to_keep=1)
        caches = {"stock": stock}
        for preset in dict.fromkeys(["identity", *args.presets.split(",")]):
            caches[preset] = kvfold.FoldedCache.from_cache(
                model, copy.deepcopy(stock), preset, strict=True
            )
        times: dict[str, list[float]] = {name: [] for name in caches}
        logits = {}
        for step in range(args.steps + 2):
            for name, cache in caches.items():
                start = _now(args.device)
                out = model(ids[:, :1], past_key_values=cache).logits
                if step >= 2:  # the first two warm up
                    times[name].append(1e3 * (_now(args.device) - start))
                else:
                    logits[name] = out
    worst = (logits["identity"] - logits["stock"]).abs().max().item()
    assert worst < 1e-2, f"identity differs from the stock cache by {worst}"
    base = torch.tensor(times["stock"]).median().item()
    rows = []
    for name, found in times.items():
        low, middle, high = torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row = {"what": "decode_step", "preset": name, "tokens": args.tokens}
        row |= {"threads": args.threads, "median_ms": middle, "q20_ms": low, "q80_ms": high}
        rows.append(row | {"over_stock": middle / base})
    write(args.out, rows, args)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
