"""The long check: every preset on three versions of transformers, and random operations at length.

    make nightly     # or: python benchmarks/nightly.py --steps 10000

Each version is installed into a folder of its own under build/ and put before the environment's in
PYTHONPATH; what it needs beside (tokenizers) goes there too. The suites are those of CI with
KVFOLD_NIGHTLY=1, one piece of work for each version and suite and for each preset's operations.
A piece's result is kept under build/ with the commit it ran at, so that a run that was stopped goes
on where it was (`--fresh` begins anew, `--seconds` stops between pieces). The summary of all pieces
goes to benchmarks/results/nightly.json and nightly.md each time, and names what has not run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

import kvfold
from kvfold.calibration.artefact import commit
from kvfold.evaluation.perplexity import environment

ROOT = Path(__file__).parent.parent
#: transformers and what must be older or newer than the environment's for it
VERSIONS = {"5.10.4": ["tokenizers==0.22.2"], "5.17.0": [], "5.23.0": []}
SUITES = (
    "test_conformance_generate",
    "test_hybrid_models",
    "test_folded_cache",
    "test_around_a_pass",
    "test_interception",
    "test_routes",
    "test_compiled",
    "test_states",
    "test_unsupported",
    "test_describe",
)
#: of a piece that has not run
NONE: dict[str, Any] = {"failed": [], "recorded": [], "asked_steps": "", "commit": ""}
STATEFUL, OPERATIONS = "test_stateful", "test_operations_in_any_order"


def installed(version: str, more: list[str]) -> Path:
    """The folder that holds one version of transformers, made once."""
    folder = ROOT / "build" / "nightly" / version
    if not (folder / "transformers").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"transformers=={version}", *more], check=True)
    return folder


def run(suite: str, only: str | None, folder: Path, steps: int, extra: list[str]) -> dict[str, Any]:
    """Pytest on a suite, or one preset of it, with a version of transformers; what it reports."""
    environ = {**os.environ, "KVFOLD_NIGHTLY": "1", "KVFOLD_STEPS": str(steps)}
    environ |= {"OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT / "src")])
    report = folder / f"{suite}-{only}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o"]
    command += ["junit_family=xunit1", f"--junitxml={report}", *extra]
    command += [f"tests/integrations/{suite}.py" + (f"::{OPERATIONS}[{only}]" if only else "")]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    report.with_suffix(".log").write_text(done.stdout + done.stderr)
    if not report.is_file():
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    ran = {"seconds": round(seconds), "commit": commit(), "asked_steps": steps}
    return {**read(report), **ran, "command_ok": done.returncode == 0}


def read(report: Path) -> dict[str, Any]:
    """Counts of a junit report by suite, what tests recorded, and which failed."""
    suites: dict[str, dict[str, int]] = {}
    recorded, failed = [], []
    for case in ElementTree.parse(report).iter("testcase"):
        suite = Path(case.get("file", "")).stem
        counts = suites.setdefault(suite, {"passed": 0, "failed": 0, "skipped": 0})
        outcome = "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
            failed.append(f"{suite}::{case.get('name')}")
        elif case.find("skipped") is not None:
            outcome = "skipped"
        counts[outcome] += 1
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        if properties:
            recorded.append({"test": case.get("name"), **properties})
    return {"suites": suites, "failed": failed, "recorded": recorded}


def summary(data: dict[str, Any]) -> str:
    """The results as a page."""
    machine = ", ".join(
        f"{k} {v}" for k, v in data["environment"].items() if k not in ("transformers", "commit")
    )
    lines = ["# The last nightly run", "", f"Written by `make nightly`: {machine}.", ""]
    lines += ["Every suite below ran with every preset of the catalogue.", ""]
    lines += ["| transformers | suite | passed | failed | skipped | commit |", "|---" * 6 + "|"]
    conformance = [p for p in data["pieces"] if p["suite"] != STATEFUL]
    for piece in conformance:
        name = f"| {piece['version']} | {piece['suite']} |"
        if "result" not in piece:
            lines.append(f"{name} not run | | | |")
            continue
        found = piece["result"]
        n = next(iter(found["suites"].values()))
        at = str(found["commit"])[:12]
        lines.append(f"{name} {n['passed']} | {n['failed']} | {n['skipped']} | {at} |")
    failed = [
        f"{p['version']}: {name}"
        for p in data["pieces"]
        for name in p.get("result", NONE)["failed"]
    ]
    lines += ["", "Failed: " + ("; ".join(failed) if failed else "none") + ".", ""]
    lines += ["Random operations on each preset (hypothesis), against a plain-tensor model:", ""]
    lines += ["| preset | steps asked | steps taken | commit |", "|---" * 4 + "|"]
    for piece in data["pieces"]:
        if piece["suite"] != STATEFUL:
            continue
        found = piece.get("result", NONE)
        taken = [row["steps"] for row in found["recorded"] if "steps" in row]
        cells = (found["asked_steps"], taken[0] if taken else "failed", str(found["commit"])[:12])
        text = " | ".join(map(str, cells)) if "result" in piece else "not run | | "
        lines.append(f"| {piece['only']} | {text} |")
    versions = list(dict.fromkeys(p["version"] for p in conformance))
    lines += [
        "",
        "Models: compressed layers, and the largest relative error of a layer's attention",
    ]
    lines += ["against SDPA on the decoded states, over all presets and decode steps:", ""]
    head = " | ".join(f"error, {v}" for v in versions)
    lines += [f"| model | compressed of layers | {head} |", "|---" * (2 + len(versions)) + "|"]
    names: dict[str, str] = {}
    worst: dict[tuple[str, str], float] = {}
    for piece in conformance:
        for row in piece.get("result", NONE)["recorded"]:
            if "compressed" in row:
                names[row["model"]] = f"{row['compressed']} of {row['layers']}"
            elif "error" in row:
                at = (row["model"], piece["version"])
                worst[at] = max(worst.get(at, 0.0), float(row["error"]))
    for name, layers in names.items():
        errors = " | ".join(
            f"{worst[name, v]:.1e}" if (name, v) in worst else "-" for v in versions
        )
        lines.append(f"| {name} | {layers} | {errors} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Install, run what has not run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="random operations a preset")
    parser.add_argument("--fresh", action="store_true", help="forget the pieces that have run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no piece after")
    parser.add_argument("--only", default="", help="of pieces, those whose name has this in it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args()
    newest = list(VERSIONS)[-1]
    pieces: list[dict[str, Any]] = [
        *({"version": v, "suite": s, "only": None} for s in SUITES for v in VERSIONS),
        *({"version": newest, "suite": STATEFUL, "only": name} for name in kvfold.presets()),
    ]
    begin = time.perf_counter()
    for piece in pieces:
        name = f"{piece['version']}-{piece['suite']}-{piece['only']}"
        kept = ROOT / "build" / "nightly" / f"{name}.json"
        if options.fresh:
            kept.unlink(missing_ok=True)
        wanted = options.only in name and time.perf_counter() - begin < options.seconds
        if wanted and not kept.is_file():
            folder = installed(piece["version"], VERSIONS[piece["version"]])
            found = run(piece["suite"], piece["only"], folder, options.steps, options.pytest)
            kept.write_text(json.dumps(found))
            print(name, found["suites"], f"{found['seconds']} s", flush=True)
        if kept.is_file():
            piece["result"] = json.loads(kept.read_text())
    data = {"environment": environment(torch.device("cpu")), "pieces": pieces}
    (options.out / "nightly.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "nightly.md").write_text(summary(data))
    print(summary(data))
    missing = [p for p in pieces if "result" not in p]
    raise SystemExit(1 if missing or any(p["result"]["failed"] for p in pieces) else 0)


if __name__ == "__main__":
    main()
