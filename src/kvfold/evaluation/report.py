"""A report: rows of figures beside the conditions that they hold under, as JSON and as a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from kvfold.codec import CodecError, Preset, presets
from kvfold.sealed import write_whole

#: below this share of cold reads a fidelity figure says little about the code.
QUOTABLE_SHARE = 0.9


@dataclass(frozen=True)
class Row:
    """The figures of one preset; fractions and nats.

    Args:
        preset: its name.
        bits_per_element: stored bits of full pages over K and V elements, metadata included.
        kl_mean: mean KL(reference || compressed) of the next-token distributions.
        kl_p99: its 99th percentile over tokens.
        top1: share of tokens whose likeliest next token is the reference's.
        ppl: perplexity.
        ppl_delta: its change against the reference's, as a fraction.
        ppl_delta_se: paired standard error of the change.
        compressed_share: share of the causal pairs that were read from codes.
    """

    preset: str
    bits_per_element: float
    kl_mean: float
    kl_p99: float
    top1: float
    ppl: float
    ppl_delta: float
    ppl_delta_se: float
    compressed_share: float


@dataclass(frozen=True)
class Report:
    """Conditions and rows of one evaluation."""

    conditions: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Conditions beside `rows`, plain values."""
        return {**self.conditions, "rows": [asdict(row) for row in self.rows]}

    def save(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all."""
        write_json(path, self.to_json())

    def table(self) -> Table:
        """For a terminal."""
        c = self.conditions
        title = (
            f"{c['model']}, {c['text']}: {c['windows']} windows of {c['context']}, {c['sinks']} "
            f"sinks, window {c['window']}, block {c['block']}, {c['dtype']}; "
            f"uncompressed perplexity {c['ppl']:.3f}"
        )
        table = Table(title=title, caption=_caption(self), caption_justify="left")
        table.add_column("preset")
        for name in ("bits", "KL (nats)", "KL p99", "top-1", "PPL", "ΔPPL", "compressed"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                row.preset,
                f"{row.bits_per_element:.2f}",
                f"{row.kl_mean:.2g}",
                f"{row.kl_p99:.2g}",
                f"{row.top1:.1%}",
                f"{row.ppl:.3f}",
                f"{row.ppl_delta:+.2%} ± {row.ppl_delta_se:.2%}",
                f"{row.compressed_share:.1%}",
            )
        return table


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON beside its place and move it there, so that a file is whole or absent."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_whole(Path(path), text.encode())


def _caption(report: Report) -> str:
    text = (
        "KL(uncompressed || compressed) per token; bits per element with metadata; ± is the paired "
        f"standard error over {report.conditions['se_over']}"
    )
    if any(row.compressed_share < QUOTABLE_SHARE for row in report.rows):
        text += (
            f"\nless than {QUOTABLE_SHARE:.0%} of the reads came from codes: take a longer context "
            "before quoting these figures"
        )
    return text


def catalogue(
    *, head_dim: int = 128, num_kv_heads: int = 8, block_len: int = 128
) -> list[dict[str, Any]]:
    """One entry a preset: name, bits per element, papers, what it needs, a summary.

    `bits_per_element` is computed from the layout at this shape; where widths come from calibration
    it is that of the codec's example. It is None, and `misfit` says why, where a preset does not
    fit the shape.
    """
    shape = {"head_dim": head_dim, "num_kv_heads": num_kv_heads, "block_len": block_len}
    entries = []
    for preset in presets().values():
        bits, misfit = None, ""
        try:
            bits = preset.bits_per_element(**shape)
        except CodecError as error:
            misfit = str(error)
        papers = [codec.paper for codec in (preset.keys, preset.values) if codec.paper]
        entries.append(
            {
                "preset": preset.name,
                "bits_per_element": bits,
                "misfit": misfit,
                "paper": "; ".join(dict.fromkeys(papers)),
                "needs": _needs(preset),
                "summary": preset.summary,
            }
        )
    return entries


def catalogue_table(entries: list[dict[str, Any]], title: str) -> Table:
    """The catalogue for a terminal."""
    table = Table(title=title)
    table.add_column("preset", no_wrap=True)
    table.add_column("bits", justify="right")
    for name in ("paper", "needs", "summary"):
        table.add_column(name)
    for entry in entries:
        table.add_row(
            entry["preset"],
            "-" if entry["misfit"] else f"{entry['bits_per_element']:.2f}",
            entry["paper"],
            ", ".join(entry["needs"]),
            f"does not fit: {entry['misfit']}" if entry["misfit"] else entry["summary"],
        )
    return table


def _needs(preset: Preset) -> list[str]:
    codecs = (preset.keys, preset.values)
    needs = []
    if any(codec.artefact == "required" for codec in codecs):
        needs.append("calibration")
    elif any(codec.artefact == "optional" for codec in codecs):
        needs.append("calibration (optional)")
    if preset.keys.pre_rope:
        needs.append("known RoPE")
    group = max(codec.group_len for codec in codecs)
    if group > 1:
        needs.append(f"window >= {group}")
    return needs
