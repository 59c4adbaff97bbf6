"""A decode step of the demo model on a CPU: packed caches against the stock ones, interleaved.

    python benchmarks/bench_cpu_step.py                   # 512, 1k, 4k and 8k tokens, both dtypes
    python benchmarks/bench_cpu_step.py --lengths 4096 --dtypes bfloat16

Correctness first: the first step's logits of `identity` equal the stock cache's. Each cache takes
the same tokens in turn, so that all see the same machine: median and 20/80 % quantiles over the
steps, milliseconds.
`over_bfloat16` and `over_float32` divide by the stock cache's median in the same run.
"""

import copy
import time
from typing import Any

import torch
from common import parser, write
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache

import kvfold
from kvfold.integrations import models

PRESETS = "fisher2,fisher2-post,fisher2-pre,turboquant4,kivi4-g64"


def main() -> None:
    """Prefill once a length and dtype, fold copies, step them in turn."""
    make = parser(__doc__, "cpu_step.csv")
    make.set_defaults(presets=PRESETS, device="cpu")
    make.add_argument("--lengths", default="512,1024,4096,8192")
    make.add_argument("--dtypes", default="bfloat16,float32")
    make.add_argument("--steps", type=int, default=32)
    make.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = make.parse_args()
    torch.set_num_threads(args.threads)
    args.dtype, rows = "as stated", []
    loaded = {name: models.load(args.model, dtype=_dtype(name))[0] for name in _list(args.dtypes)}
    for length in map(int, _list(args.lengths)):
        rows += measured(loaded, length, args)
    write(args.out, rows, args)


def measured(loaded: dict[str, Any], length: int, args: Any) -> list[dict[str, Any]]:
    """Rows of one length, all dtypes and caches interleaved."""
    ids = torch.randint(100, 40_000, (1, length), generator=torch.Generator().manual_seed(1))
    cases: dict[tuple[str, str], tuple[Any, Any]] = {}
    missing: dict[tuple[str, str], str] = {}
    for dtype, model in loaded.items():
        stock = DynamicCache(config=model.config)
        with torch.no_grad():
            for part in ids.split(1024, 1):
                model(part, past_key_values=stock, logits_to_keep=1)
        cases["stock", dtype] = model, stock
        for preset in ["identity", *_list(args.presets)]:
            folded = kvfold.FoldedCache.from_cache(model, copy.deepcopy(stock), preset, strict=True)
            cases[preset, dtype] = model, folded
        try:
            quantized = QuantizedCache("quanto", model.config, nbits=4)
        except ImportError as error:
            missing["quanto 4-bit", dtype] = str(error).split("\n")[0]
        else:
            with torch.no_grad():
                for part in ids.split(1024, 1):
                    model(part, past_key_values=quantized, logits_to_keep=1)
            cases["quanto 4-bit", dtype] = model, quantized
    times: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    logits: dict[tuple[str, str], torch.Tensor] = {}
    with torch.no_grad():
        for step in range(args.steps + 2):
            for key, (model, cache) in cases.items():
                start = time.perf_counter()
                out = model(ids[:, :1], past_key_values=cache).logits
                if step >= 2:  # the first two warm up
                    times[key].append(1e3 * (time.perf_counter() - start))
                elif step == 0:
                    logits[key] = out.float()
    for dtype in loaded:
        off = (logits["identity", dtype] - logits["stock", dtype]).abs().max().item()
        limit = 1e-2 if dtype == "float32" else 1.0
        assert off < limit, f"identity differs from the stock cache in {dtype} by {off:.3g}"
    median = {key: torch.tensor(found).median().item() for key, found in times.items()}
    rows = []
    for (preset, dtype), found in times.items():
        low, middle, high = torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row = {"preset": preset, "type": dtype, "tokens": length, "threads": args.threads}
        row |= {"median_ms": middle, "q20_ms": low, "q80_ms": high}
        row |= {f"over_{d}": middle / median["stock", d] for d in loaded}
        rows.append(row | {"note": ""})
    rows += [
        dict.fromkeys(rows[0], "")
        | {"preset": preset, "type": dtype, "tokens": length, "note": f"not run: {reason}"}
        for (preset, dtype), reason in missing.items()
    ]
    return [{k: f"{x:.5g}" if isinstance(x, float) else x for k, x in r.items()} for r in rows]


def _list(names: str) -> list[str]:
    return names.split(",")


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


if __name__ == "__main__":
    main()
