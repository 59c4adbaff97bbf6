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


def fisher() -> str:
    """The same of the calibrated presets, from a run of their own."""
    return fidelity("fisher_cpu.json")


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


TABLES = {"presets": presets, "fidelity": fidelity, "fisher": fisher, "memory": memory}


def draw(path: Path) -> None:
    """Quality against bits per element."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kvfold"
    import matplotlib.pyplot as plt

    _, rows = fidelity_rows()
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    families: dict[str, list[dict]] = {}
    for row in rows:
        if row["preset"] != "identity" and row["kl_mean"] < 1:
            families.setdefault(re.split(r"[\d-]", row["preset"])[0], []).append(row)
    for name, found in families.items():
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
