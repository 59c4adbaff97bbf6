"""What the benchmarks share: rows with their conditions, and arguments that they all take."""

import argparse
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kvfold.evaluation.perplexity import environment
from kvfold.integrations import models

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark on a model takes."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--presets", default="identity,int8,kivi4-g64,kivi2-g64,turboquant4")
    made.add_argument("--out", type=Path, default=RESULTS / out)
    return made


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer that the arguments name."""
    return models.load(args.model, dtype=getattr(torch, args.dtype), device=args.device)


def write(
    path: Path, rows: Iterable[Mapping[str, Any]], args: argparse.Namespace, shown: int = 0
) -> None:
    """Write rows as CSV, each with the machine, the versions and the commit.

    They are printed, but for the first `shown` of them.
    """
    where = environment(torch.device(args.device))
    full = [{**row, "dtype": args.dtype, **where} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(full[0]))
        writer.writeheader()
        writer.writerows(full)
    for row in full[shown:]:
        print(*(f"{key}={value}" for key, value in row.items() if key not in where))
