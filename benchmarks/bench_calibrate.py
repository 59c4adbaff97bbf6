"""Time and memory of `kvfold calibrate --preset fisher2`, and its memory by arithmetic.

    python benchmarks/bench_calibrate.py --text wiki.valid.tokens --out calibrate_gpu.json

Measured: seconds of the collection and of the fit of 18 codecs, and the peak of allocated memory
(CUDA: `max_memory_allocated`; CPU: the process's `ru_maxrss`, libraries and statistics included).
By arithmetic (`collect_fisher.expected_bytes`): the demo model as it ran here, and a model shaped
like Llama 3.1 8B in bfloat16 on a GPU.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import transformers

from kvfold.evaluation.perplexity import environment
from kvfold.integrations import collect_fisher, models
from kvfold.integrations.describe import describe

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Measure, compute, write."""
    make = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    make.add_argument("--model", default="smollm2-135m")
    make.add_argument("--text", type=Path, required=True)
    make.add_argument("--tokens", type=int, default=32_768)
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = make.parse_args()
    model, tokenizer = models.load(args.model, dtype=torch.float32, device=args.device)
    text = args.text.read_text(encoding="utf-8")
    device = torch.device(args.device)
    windows = collect_fisher.windows_of(model, tokenizer, [text], args.tokens, 2048, 68)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.time()
    found = collect_fisher.collect(model, windows)
    collected = time.time()
    codecs = collect_fisher.codecs_for(collect_fisher.TARGETS)
    collect_fisher.artefact(found, codecs, device=device)
    end = time.time()
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    with torch.device("meta"):
        config = transformers.LlamaConfig(**LLAMA_8B, dtype="bfloat16")
        large = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    report = {
        "model": "smollm2-135m",
        "tokens": windows.numel(),
        "context": windows.shape[1],
        "collect_s": collected - start,
        "fit_s": end - collected,
        "codecs": len(codecs),
        "peak_bytes": peak,
        "expected": total(collect_fisher.expected_bytes(model, windows.shape[1], device.type)),
        "expected_8b_bfloat16_cuda": total(collect_fisher.expected_bytes(large, 2048, "cuda")),
        # on the host: residuals and gradients of the sampled tokens, in two bytes each
        "samples_8b_bytes": collect_fisher.samples_for(large, windows.numel())
        * sum(2 * 2 * i.num_kv_heads * (i.key_dim + i.value_dim) for i in describe(large)),
        **environment(device),
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def total(parts: dict[str, int]) -> dict[str, int]:
    """The parts and their sum."""
    return {**parts, "sum": sum(parts.values())}


if __name__ == "__main__":
    main()
