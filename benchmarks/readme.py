"""Fill the README's tables and draw its figure from the catalogue and from benchmarks/results.

    python benchmarks/readme.py            # rewrite README.md and docs/fidelity.svg
    python benchmarks/readme.py --check    # fail if the README's tables are not what they should be

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import kvfold
from kvfold.evaluation.report import catalogue

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def presets() -> str:
    """The catalogue: preset, paper, bits per element at two shapes."""
    wide = {e["preset"]: e for e in catalogue(head_dim=128, num_kv_heads=8)}
    narrow = {e["preset"]: e for e in catalogue(head_dim=64, num_kv_heads=3)}
    lines = ["| preset | bits at head_dim 128 / 64 | what | paper |", "|---|---|---|---|"]
    for name, preset in kvfold.presets().items():
        found = [e[name]["bits_per_element"] for e in (wide, narrow)]
        bits = ["-" if b is None else f"{b:.3g}" for b in found]
        paper = preset.keys.paper or "-"
        lines.append(f"| `{name}` | {bits[0]} / {bits[1]} | {preset.summary} | {paper} |")
    return "\n".join(lines)


def fidelity_rows(name: str = "wikitext2_smollm2.json") -> tuple[dict, list[dict]]:
    """Conditions and rows of a committed evaluation, by bits."""
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    rows = found.pop("rows")
    return found, sorted(rows, key=lambda row: -row["bits_per_element"])


def calibrated() -> str:
    """The same of the presets that are calibrated."""
    return fidelity("wikitext2_smollm2_calibrated.json")


def fidelity(name: str = "wikitext2_smollm2.json") -> str:
    """KL, agreement and perplexity of every preset, conditions above them."""
    c, rows = fidelity_rows(name)
    text = (
        f"SmolLM2-135M, {c['dtype']}, WikiText-2 test, {c['windows']} windows of {c['context']} "
        f"tokens, {c['sinks']} sinks and {c['window']} recent tokens exact; every query reads codes"
        f" ({rows[0]['compressed_share']:.1%} of all pairs), uncompressed perplexity "
        f"{c['ppl']:.3f}, {c['device']}, commit `{(c['commit'] or '')[:10]}`.\n\n"
    )
    lines = ["| preset | bits | KL (nats) | KL p99 | top-1 | ΔPPL |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["preset"] == "identity":
            continue
        lines.append(
            f"| `{row['preset']}` | {row['bits_per_element']:.3g} | {row['kl_mean']:.2g} | "
            f"{row['kl_p99']:.2g} | {row['top1']:.1%} | {row['ppl_delta']:+.2%} ± "
            f"{row['ppl_delta_se']:.2%} |"
        )
    return text + "\n".join(lines)


def memory() -> str:
    """Allocated bytes against bfloat16."""
    with (RESULTS / "memory.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [
        f"SmolLM2-135M in {rows[0]['dtype']}, {rows[0]['device']}; every allocated byte counted.\n",
        "| preset | tokens | held / bf16 | pages | window | unused pool | peak while filling |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mb = {k: f"{int(row[k]) / 1e6:.2f} MB" for k in ("pages", "window", "pool_unused")}
        lines.append(
            f"| `{row['preset']}` | {int(row['tokens']):,} | {float(row['share']):.3f} | "
            f"{mb['pages']} | {mb['window']} | {mb['pool_unused']} | "
            f"{int(row['peak_bytes']) / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def lines_of(name: str, /, **wanted: object) -> list[dict]:
    """The measurements of a file of `fisher_gpu.py` whose entries are as wanted."""
    text = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def ablation() -> str:
    """`fisher2`, one ingredient at a time, on held-out windows of `valid` and on `test`."""
    rows = lines_of("fisher_ablation", what="variant", form="tile", code_bits=2.0)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["on"]] = row["kl"]
    texts = {"tune": "held-out `valid`", "test": "test"}
    shown = [on for on in texts if any(row["on"] == on for row in rows)]
    lines = [
        f"| `fisher2` | {' | '.join('KL, ' + texts[on] for on in shown)} |",
        "|---" * (1 + len(shown)) + "|",
    ]
    for name, kl in found.items():
        cells = [f"{kl[on]:.5f}" if on in kl else "not run" for on in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def robustness() -> str:
    """`fisher2` away from what it was calibrated on."""
    forms = ("tile", "post", "pre")
    lines = ["| KL at 2.13 bits | tile | post | pre |", "|---|---|---|---|"]

    def add(what: str, rows: list[dict]) -> None:
        if not rows:
            return
        kl = {row["form"]: row["kl"] for row in rows}
        cells = [f"{kl[form]:.4f}" if form in kl else "-" for form in forms]
        lines.append(f"| {what} | {' | '.join(cells)} |")

    for context, name in ((2048, "_calibrated"), (4096, "_4096"), (8192, "_8192")):
        _, rows = fidelity_rows(f"wikitext2_smollm2{name}.json")
        names = {"fisher2": "tile", "fisher2-post": "post", "fisher2-pre": "pre"}
        rows = [
            {"form": names[row["preset"]], "kl": row["kl_mean"]}
            for row in rows
            if row["preset"] in names
        ]
        add(f"WikiText-2 test, context {context}, calibrated at 2048", rows)
    for name, what in (("base", "WikiText"), ("python", "Python"), ("both", "half of each")):
        for on, text in (("python", "Python source"), ("test", "WikiText-2 test")):
            rows = lines_of("fisher_robustness", what="domain", name=name, on=on)
            add(f"{text}, calibrated on {what}", rows)
    for name in ("set 0", "set 1", "set 2"):
        rows = lines_of("fisher_robustness", what="calibration", name=name)
        add(f"WikiText-2 test, calibration {name} of three disjoint ones", rows)
    rows = lines_of("fisher_few_tokens", what="calibration", name="2048 tokens")
    add("WikiText-2 test, calibrated on 2,048 tokens", rows)
    return "\n".join(lines)


def calibration() -> str:
    """Time and memory of a calibration, measured and by arithmetic."""
    c = json.loads((RESULTS / "calibrate_gpu.json").read_text(encoding="utf-8"))
    large, small = c["expected_8b_bfloat16_cuda"], c["expected"]
    return (
        f"{c['tokens']:,} tokens of the demo model on one {c['device']}: {c['collect_s']:.1f} s "
        f"for the statistics and {c['fit_s']:.1f} s for the tables of {c['codecs']} codes, at a "
        f"peak of {c['peak_bytes'] / 2**30:.1f} GiB (`collect_fisher.expected_bytes` puts it at "
        f"{small['sum'] / 2**30:.1f}). By the same arithmetic a model shaped like Llama 3.1 8B in "
        f"bfloat16 peaks at {large['sum'] / 2**30:.1f} GiB, {large['weights'] / 2**30:.1f} of them "
        f"weights, and keeps {c['samples_8b_bytes'] / 2**30:.1f} GiB of samples on the host."
    )


def csv_rows(name: str) -> list[dict]:
    """The rows of a CSV file of results."""
    with (RESULTS / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decode_cuda() -> str:
    """Decode attention against the best bfloat16 kernel of the run."""
    found = csv_rows("decode_cuda.csv")
    rows = [r for r in found if r["rows"]]
    missing = [r["what"] for r in found if not r["rows"]]
    shapes = list(dict.fromkeys((r["rows"], r["tokens"]) for r in rows))
    best = {
        shape: min(
            float(r["us"])
            for r in rows
            if r["what"] == "bfloat16" and (r["rows"], r["tokens"]) == shape
        )
        for shape in shapes
    }
    head = [f"{n} × {int(t) // 1024}k" for n, t in shapes]
    out = [
        f"One layer, 32 query and 8 KV heads of 128, bfloat16, {rows[0]['device']}, µs of the "
        "whole attention and times faster than the best bfloat16 kernel (flash, cuDNN, "
        "FlexAttention) of the same run; a copy reads and writes "
        f"{float(rows[0]['copy_tb_per_s']):.2f} TB/s there; "
        f"commit `{rows[0]['commit']}`.",
        "",
        "| | bits | " + " | ".join(head) + " |",
        "|---" * (2 + len(head)) + "|",
        "| bfloat16 | 16 | " + " | ".join(f"{best[s]:.1f}" for s in shapes) + " |",
    ]
    for name in dict.fromkeys(r["what"] for r in rows if r["what"] != "bfloat16"):
        mine = {(r["rows"], r["tokens"]): r for r in rows if r["what"] == name}
        bits = next(float(r["bits"]) for r in mine.values() if r["bits"])
        cells = [f"{float(mine[s]['us']):.1f} ({float(mine[s]['speedup']):.2f}×)" for s in shapes]
        out.append(f"| `{name}` | {bits:.2f} | " + " | ".join(cells) + " |")
    if missing:
        out += ["", f"Not run, for want of packages on that machine: {', '.join(missing)}."]
    return "\n".join(out)


def model_cuda() -> str:
    """Whole decode steps of a model with random weights."""
    rows = csv_rows("model_cuda.csv")
    names = {"stock": "static cache", "stock_unmasked": "static cache, no mask built"}
    out = [
        f"Llama 3 8B's shape, random weights, bfloat16, caches filled synthetically, `fisher2` "
        f"with made-up tables of uniform widths, "
        f"{rows[0]['device']}, commit `{rows[0]['commit']}`:",
        "",
        "| cache | rows × tokens | CUDA graphs | ms a step | tokens/s | cache | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["what"] not in (*names, "packed"):
            continue
        name = names.get(r["what"]) or f"`{r['preset']}`"
        where = (
            f"| {name} | {r['rows']} × {int(r['tokens']) // 1024}k | "
            f"{'yes' if r['graphs'] == 'True' else 'no'} | "
        )
        if r["error"]:
            why = "out of memory" if "OutOfMemory" in r["error"] else r["error"]
            out.append(f"{where}{why} | | | |")
            continue
        out.append(
            f"{where}{float(r['median_ms']):.1f} | {float(r['tokens_per_s']):.0f} | "
            f"{float(r['cache_bytes']) / 1e9:.2f} GB | {float(r['peak_bytes']) / 1e9:.1f} GB |"
        )
    filled = csv_rows("prefill_cuda.csv")
    shown = ", ".join(
        f"`{r['preset']}` {float(r['median_ms']):.0f} ms ({float(r['fold_share']):.1%} folding)"
        for r in filled
    )
    if filled:
        base = float(filled[0]["stock_ms"])
        out += [
            "",
            f"A prefill of {int(filled[0]['tokens']):,} tokens takes {base:.0f} ms with the stock "
            f"cache, and with {shown}; commit `{filled[0]['commit']}`.",
        ]
    return "\n".join(out)


def cpu() -> str:
    """Decode steps of the demo model, and the kernel alone, on a CPU."""
    rows = csv_rows("cpu_step.csv")
    timed = [r for r in rows if r["median_ms"]]
    lengths = list(dict.fromkeys(r["tokens"] for r in rows))
    out = [
        f"SmolLM2-135M, milliseconds a decode step, {timed[0]['device']}, "
        f"all caches in turn in one process, commit `{timed[0]['commit']}`:",
        "",
        "| cache | " + " | ".join(f"bfloat16, {int(n):,}" for n in lengths)
        + " | " + " | ".join(f"float32, {int(n):,}" for n in lengths) + " |",
        "|---" * (1 + 2 * len(lengths)) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(r["preset"] for r in timed):
        found = {
            (r["type"], r["tokens"]): float(r["median_ms"]) for r in timed if r["preset"] == name
        }
        cells = [f"{found[t, n]:.1f}" for t in ("bfloat16", "float32") for n in lengths]
        out.append(f"| `{name}` | " + " | ".join(cells) + " |")
    kernel = {(r["what"], r["type"]): r for r in csv_rows("cpu_kernel.csv")}
    base = float(kernel["SDPA, group as rows", "bfloat16"]["median_ms"])
    names = ("kivi4-g64", "fisher2-post", "fisher2", "fisher4-post", "turboquant4", "fisher2-pre")
    shown = ", ".join(
        f"`{n}` {float(kernel[n, 'bfloat16']['median_ms']):.1f} ms "
        f"({float(kernel[n, 'bfloat16']['speedup_over_bfloat16']):.2f} times as fast)"
        for n in names
    )
    one = kernel["kivi4-g64", "bfloat16"]
    alone = (
        f"The kernel alone, {int(one['tokens']):,} tokens, {one['heads']} heads of "
        f"{one['head_dim']}: torch's SDPA in its best arrangement takes {base:.1f} ms in bfloat16; "
        f"{shown}."
    )
    return "\n".join((*out, "", alone, "", _cpu_fold()))


def _cpu_fold() -> str:
    """What folding a prompt's blocks takes in torch, and as the cache does it."""
    folded = [r for r in csv_rows("cpu_fold.csv") if r["blocks"] != "1"]
    took = {(r["preset"], r["path"]): float(r["median_ms"]) for r in folded if r["median_ms"]}
    shown = ", ".join(
        f"`{name}` {took[name, 'cache']:.1f} ms ({took[name, 'torch']:.0f} in torch)"
        for name in ("fisher2", "fisher4", "spectral2")
    )
    return (
        f"Folding {folded[0]['blocks']} blocks of a layer of {folded[0]['heads']} heads of "
        f"{folded[0]['head_dim']} (`benchmarks/bench_cpu_fold.py`): {shown}."
    )


def eviction() -> str:
    """Retrieval for presets and budgets, the loaded prefix, the soak: from their results."""

    def rows(name: str) -> list[dict]:
        with (RESULTS / name).open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    found, soak = rows("retrieval.csv"), rows("soak.csv")[0]
    prefixes = rows("prefix.csv") if (RESULTS / "prefix.csv").exists() else []
    first = found[0]
    lengths = list(dict.fromkeys(row["tokens"] for row in found))
    filler = {row["tokens"]: int(row["filler"]) for row in found}
    titles = [f"{int(n):,} tokens" + (", fewer pairs" if filler[n] else "") for n in lengths]
    cells: dict[tuple[str, str, float], dict[str, float]] = {}
    for row in found:
        key = (row["preset"], row["mode"], float(row["budget"]))
        cells.setdefault(key, {})[row["tokens"]] = float(row["digits"])
    whole = {preset: by for (preset, mode, _), by in cells.items() if mode == "all"}
    base = whole.pop("uncompressed")
    kept = [p for p, by in whole.items() if all(by[n] > base[n] - 0.03 for n in lengths)]
    lines = [
        "Digits of random key-value pairs given back from beyond the window "
        f"({first['questions']} questions a length, `benchmarks/bench_retrieval.py`, "
        f"{first['device']}). As many as uncompressed, within 3 points at each length: "
        + ", ".join(f"`{p}`" for p in kept)
        + ". The others:",
        "",
        f"| preset | {' | '.join(titles)} |",
        f"|---|{'---|' * len(lengths)}",
    ]
    for preset, by in {"uncompressed": base, **whole}.items():
        if preset not in kept:
            lines.append(f"| `{preset}` | {' | '.join(f'{by[n]:.0%}' for n in lengths)} |")
    lines += [
        "",
        "The same with a part of the cold tokens kept or read: trim does not know the question, "
        "prune has read it (a cache a question), top-k chooses for each token:",
        "",
        f"| preset | what is kept or read | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(lengths)}",
    ]
    for (preset, mode, budget), by in cells.items():
        if mode != "all":
            values = " | ".join(f"{by[n]:.0%}" for n in lengths)
            lines.append(f"| `{preset}` | {mode} {budget:.0%} | {values} |")
    for p in prefixes:
        lines += [
            "",
            f"A saved prefix of {int(p['tokens']):,} tokens (`{p['preset']}`) loads in "
            f"{float(p['load_s']):.2f} s, checksum included; prefilling it takes "
            f"{float(p['prefill_s']):.0f} s, {p['speedup']} times as long ({p['device']}); the "
            "tokens after it are the same.",
        ]
    held = f"{int(soak['bytes_least']):,} to {int(soak['bytes_most']):,} bytes"
    lines += [
        "",
        f"{int(soak['steps']):,} decode steps with `trim={soak['trim']}`: {held} held from token "
        f"1,000 on, {soak['positions']} positions, same tokens from two processes: "
        f"{soak['same_output']} (`benchmarks/bench_soak.py`).",
    ]
    return "\n".join(lines)


TABLES = {
    "presets": presets,
    "fidelity": fidelity,
    "calibrated": calibrated,
    "ablation": ablation,
    "robustness": robustness,
    "calibration": calibration,
    "memory": memory,
    "decode_cuda": decode_cuda,
    "model_cuda": model_cuda,
    "cpu": cpu,
    "eviction": eviction,
}


def draw(path: Path) -> None:
    """Quality against bits per element."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kvfold"
    import matplotlib.pyplot as plt

    rows = fidelity_rows()[1] + fidelity_rows("wikitext2_smollm2_calibrated.json")[1]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    families: dict[str, list[dict]] = {}
    for row in rows:
        if row["preset"] != "identity" and row["kl_mean"] < 1:
            families.setdefault(re.split(r"[\d-]", row["preset"])[0], []).append(row)
    for name, found in families.items():
        found.sort(key=lambda row: row["bits_per_element"])
        x = [row["bits_per_element"] for row in found]
        axes.plot(x, [row["kl_mean"] for row in found], "o", label=name)
        for row in found:
            at = (row["bits_per_element"], row["kl_mean"])
            axes.annotate(row["preset"], at, (4, 3), textcoords="offset points", fontsize=7)
    axes.set(yscale="log", xlabel="stored bits per element, all metadata included")
    axes.set_ylabel("KL to the uncompressed model, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def filled(text: str) -> str:
    """The README with its tables made anew."""
    for name, make in TABLES.items():
        found = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = make()
        text = found.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


def main() -> None:
    """Rewrite, or check."""
    make = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    make.add_argument("--check", action="store_true")
    args = make.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if args.check:
        sys.exit(0 if filled(text) == text else "README.md is not what benchmarks/readme.py writes")
    readme.write_text(filled(text), encoding="utf-8")
    draw(ROOT / "docs" / "fidelity.svg")


if __name__ == "__main__":
    main()
