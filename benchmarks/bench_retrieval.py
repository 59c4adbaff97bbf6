"""Retrieval beyond the window, and KL, for presets and for trim, prune and top-k at budgets.

    python benchmarks/bench_retrieval.py                          # CPU: 2k tokens, few questions
    python benchmarks/bench_retrieval.py --full --device cuda     # 2k, 4k and 8k, every preset

A prompt of random key-value lines (`kvfold.evaluation.retrieval`) is prefilled once with the stock
cache and folded into each preset. Gate: the uncompressed model has to give back `--gate` of the
digits, else a length is not measured: at 8k it does where text that says nothing lies between the
pairs. Modes are measured on exact pages (identity) and on `--with`, at 50, 25 and 10 % of the cold
tokens: trim does not know the question, `prune` is called when the question has been read, `top_k`
chooses again for each token. `text_kl` is KL(uncompressed || mode) on `--text` behind a prompt of
the same length, step by step.
On a GPU codes without a kernel are read in plain torch, with a warning.
Presets that need a calibration which is not at hand are named and left out.
"""

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import load, parser, write
from transformers import DynamicCache

import kvfold
from kvfold.evaluation.retrieval import Pairs, Score, ask, pairs

BUDGETS = "0.5,0.25,0.1"
#: a budget that keeps everything until prune() is called
ALL = 1 << 30


def prefilled(model, ids) -> DynamicCache:
    """The stock cache of a prompt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def text_kl(model, stock, folded, steps) -> float:
    """Mean KL of the tokens `steps` `[1, n]` after a prompt, fed one at a time."""
    stock = copy.deepcopy(stock)
    kl = []
    with torch.no_grad():
        for step in steps.split(1, 1):
            p, q = (
                model(step, past_key_values=cache).logits[0, -1].float().log_softmax(-1)
                for cache in (stock, folded)
            )
            kl.append((p.exp() * (p - q)).sum().item())
    return sum(kl) / len(kl)


def alone(model, cache, asked: Pairs, reference: Score, prune: int) -> tuple[Score, int]:
    """Each question asked of a cache of its own, pruned when it has been read; and its bytes.

    Rows that share pages share the attention that these get, so questions of one batch would be
    pruned for all of them together: what is kept would then be what none of them needs most.
    """
    found, held = [], 0
    for i in range(len(asked.questions)):
        one, its = copy.deepcopy(cache), slice(i, i + 1)
        question = replace(asked, questions=asked.questions[its], answers=asked.answers[its])
        found.append(
            ask(model, one, question, replace(reference, logits=reference.logits[its]), prune)
        )
        held = one.nbytes()["pages"]
    digits, rows, kl = (
        sum(getattr(score, name) for score in found) / len(found)
        for name in ("digits", "pairs", "kl")
    )
    return Score(digits, rows, kl, torch.cat([score.logits for score in found])), held


def variants(presets: list[str], composed: str, budgets: list[float], cold: int, block: int):
    """(preset, mode, budget, options of the cache, tokens to prune to)."""
    for preset in dict.fromkeys(("identity", composed, *presets)):
        yield preset, "all", 1.0, {}, None
        if preset not in ("identity", composed):
            continue
        for budget in budgets:
            tokens = max(block, int(budget * cold) // block * block)
            yield preset, "top_k", budget, {"top_k": tokens}, None
            yield preset, "prune", budget, {"prune": ALL}, tokens
            yield preset, "trim", budget, {"trim": tokens}, None


def measure(model, args, asked: Pairs, filler: int, stock, text, presets: list[str]):
    """The rows of one prompt length; first the uncompressed one."""
    tokens = asked.prompt.shape[1]
    reference = ask(model, copy.deepcopy(stock), asked)
    base = {"what": "retrieval", "tokens": tokens, "filler": filler}
    base["questions"] = len(asked.questions)

    def row(preset: str, mode: str, budget: float, score: Score, kl: float | str, held: int):
        return base | {
            "preset": preset,
            "mode": mode,
            "budget": budget,
            "digits": round(score.digits, 4),
            "pairs": round(score.pairs, 4),
            "answer_kl": round(score.kl, 5),
            "text_kl": kl,
            "page_bytes": held,
        }

    yield row("uncompressed", "all", 1.0, reference, 0.0, 0)
    if reference.digits < args.gate:
        print(f"gate: {reference.digits:.3f} of the digits uncompressed, below {args.gate}")
        return
    block = 128
    cold = max(0, tokens - 64 - 4) // block * block
    budgets = [float(x) for x in args.budgets.split(",") if x]
    for preset, mode, budget, options, prune in variants(
        presets, args.composed, budgets, cold, block
    ):
        try:
            cache = kvfold.FoldedCache.from_cache(
                model, stock, preset, strict=args.device == "cpu", **options
            )
        except (kvfold.CodecError, kvfold.CalibrationError) as error:
            print(f"left out: {preset}: {str(error)[:90]}")
            continue
        if prune is None:
            score = ask(model, cache, asked, reference)
            held = cache.nbytes()["pages"]
        else:
            score, held = alone(model, cache, asked, reference, prune)
        kl: float | str = ""
        if text is not None and (mode != "all" or preset in ("identity", args.composed)):
            behind, steps = text
            if prune is not None:  # as decoding does it: at the next fold, from what it has seen
                options = {"prune": prune}
            folded = kvfold.FoldedCache.from_cache(model, behind, preset, **options)
            kl = round(text_kl(model, behind, folded, steps), 5)
        yield row(preset, mode, budget, score, kl, held)


def main() -> None:
    """Measure each length, and write what there is after each row."""
    make = parser(__doc__, "retrieval.csv")
    make.add_argument("--full", action="store_true", help="all lengths and every preset")
    make.add_argument(
        "--tokens", help="prompt lengths, comma separated; with filler after each pair: 8000:10"
    )
    make.add_argument("--questions", type=int, help="of a prompt; 8, or 32 with --full on a GPU")
    make.add_argument("--with", dest="composed", default="fisher3", help="preset beside identity")
    make.add_argument("--budgets", default=BUDGETS, help="of trim, prune and top_k; '' for none")
    make.add_argument("--gate", type=float, default=0.8)
    make.add_argument("--text", type=Path, help="a text for text_kl; none without")
    make.add_argument("--steps", type=int, default=160, help="of the text, scored one by one")
    args = make.parse_args()
    lengths = args.tokens or ("2000,4000,8000:10" if args.full else "2000")
    presets = list(kvfold.presets()) if args.full else [*args.presets.split(","), "fisher3"]
    model, tokenizer = load(args)
    rows, start = [], time.perf_counter()
    for length in lengths.split(","):
        tokens, filler = map(int, (length if ":" in length else f"{length}:0").split(":"))
        count = args.questions or (32 if args.full and args.device != "cpu" else 8)
        asked = pairs(tokenizer, tokens, count, filler=filler)
        stock = prefilled(model, asked.prompt.to(args.device))
        text = None
        if args.text is not None:
            ids = tokenizer(args.text.read_text(), return_tensors="pt", verbose=False)["input_ids"]
            ids = ids[:, : tokens + args.steps].to(args.device)
            text = prefilled(model, ids[:, : -args.steps]), ids[:, -args.steps :]
        for row in measure(model, args, asked, filler, stock, text, presets):
            rows.append(row)
            write(
                args.out, rows, args, len(rows) - 1
            )  # each time: what there is counts if the time is up
        print(f"{tokens} tokens: {time.perf_counter() - start:.0f} s so far")


if __name__ == "__main__":
    main()
