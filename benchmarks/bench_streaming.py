"""The packed cache fed token by token against the parallel streaming evaluation, end to end.

    python benchmarks/bench_streaming.py --text FILE --tokens 600

Both at blocks of 128 tokens: mean KL to the uncompressed model of the same teacher-forced tokens.
Float noise flips single codes, so the two means agree within about 2 %, not to the last digit.
"""

from pathlib import Path

import torch
from common import load, parser, write

import kvfold
from kvfold.evaluation.metrics import token_scores
from kvfold.integrations.streaming import streaming


def main() -> None:
    """One row a preset: KL of the cache, KL of the parallel evaluation, and their ratio."""
    make = parser(__doc__, "streaming.csv")
    make.add_argument("--text", type=Path, required=True)
    make.add_argument("--tokens", type=int, default=600)
    make.add_argument("--rows", type=int, default=4, help="texts side by side")
    make.add_argument("--artefact", default=None)
    make.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = make.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args)
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids[: args.rows * args.tokens]).view(args.rows, -1).to(args.device)
    names = args.presets.split(",")
    if names == ["all"]:
        names = [n for n, p in kvfold.presets().items() if p.keys.artefact != "required"]
    artefact = kvfold.Artefact.load(args.artefact) if args.artefact else None
    exact = 68  # sinks and window: nothing is cold before
    rows = []
    with torch.no_grad():
        reference = model(ids, use_cache=False).logits[:, exact:-1].flatten(0, 1)
        targets = ids[:, exact + 1 :].flatten()

        def kl(logits: torch.Tensor) -> float:
            return float(token_scores(reference, logits, targets).kl.double().mean())

        for name in names:
            uses = artefact if kvfold.get(name).keys.artefact != "none" else None
            with streaming(model, name, block=128, artefact=uses):
                whole = kl(model(ids, use_cache=False).logits[:, exact:-1].flatten(0, 1))
            cache = kvfold.FoldedCache(model, name, strict=True, artefact=uses)
            found = [model(ids[:, :exact], past_key_values=cache, logits_to_keep=1).logits[:, :0]]
            for t in range(exact, args.tokens - 1):
                found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
            fed = kl(torch.cat(found, 1).flatten(0, 1))
            row = {"what": "streaming", "preset": name, "tokens": args.tokens, "rows": args.rows}
            row |= {"kl_cache": fed, "kl_parallel": whole, "ratio": fed / whole}
            rows.append(row | {"compressed_share": cache.compressed_share()})
            write(args.out, rows, args)  # after each preset: a long run may be stopped


if __name__ == "__main__":
    main()
