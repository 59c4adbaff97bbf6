"""The long check: every preset on three versions of transformers, and random operations at length.

    make nightly     # or: python benchmarks/nightly.py --steps 10000

Each version is installed into a folder of its own under build/ and put before the environment's in
PYTHONPATH; what it needs beside (tokenizers) goes there too. The suites are those of CI with
KVFOLD_NIGHTLY=1. The summary goes to benchmarks/results/nightly.json and nightly.md.
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
    "test_states",
    "test_unsupported",
    "test_describe",
)
STATEFUL = "test_stateful"


def installed(version: str, more: list[str]) -> Path:
    """The folder that holds one version of transformers, made once."""
    folder = ROOT / "build" / "nightly" / version
    if not (folder / "transformers").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"transformers=={version}", *more], check=True)
    return folder


def run(suites: list[str], folder: Path, out: Path, steps: int, extra: list[str]) -> dict[str, Any]:
    """Pytest on suites with a version of transformers; what its report says."""
    environ = {**os.environ, "KVFOLD_NIGHTLY": "1", "KVFOLD_STEPS": str(steps)}
    environ |= {"OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT / "src")])
    report = out / f"{folder.name}-{suites[0]}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o"]
    command += ["junit_family=xunit1", f"--junitxml={report}", *extra]
    command += [f"tests/integrations/{suite}.py" for suite in suites]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    (out / f"{folder.name}-{suites[0]}.log").write_text(done.stdout + done.stderr)
    if not report.is_file():
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return {**read(report), "seconds": round(seconds), "command_ok": done.returncode == 0}


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
    where = data["environment"]
    lines = ["# The last nightly run", ""]
    machine = ", ".join(f"{k} {v}" for k, v in where.items() if k != "transformers")
    lines += [f"Written by `make nightly`: {machine}."]
    for version, result in data["versions"].items():
        lines += ["", f"transformers {version}: {result.get('ran', 'every preset')}."]
    lines += ["", "| transformers | suite | passed | failed | skipped |", "|---|---|---|---|---|"]
    for version, result in data["versions"].items():
        for suite, n in sorted(result["suites"].items()):
            lines.append(
                f"| {version} | {suite} | {n['passed']} | {n['failed']} | {n['skipped']} |"
            )
    failed = [f"{v}: {name}" for v, r in data["versions"].items() for name in r["failed"]]
    lines += ["", "Failed: " + ("; ".join(failed) if failed else "none") + "."]
    lines += [
        "",
        f"Random operations (hypothesis), of {data['asked_steps']} asked for a preset:",
        "",
    ]
    if data["stateful"]["recorded"]:
        lines += ["| preset | steps |", "|---|---|"]
        for row in data["stateful"]["recorded"]:
            lines.append(f"| {row['test'].split('[')[-1].rstrip(']')} | {row['steps']} |")
        wrong = data["stateful"]["failed"]
        lines += ["", "Failed: " + ("; ".join(wrong) if wrong else "none") + ".", ""]
    else:
        lines += ["Not run.", ""]
    lines += [
        "Models: compressed layers, and the largest relative error of a layer's attention",
        "",
    ]
    lines += ["against SDPA on the decoded states, over all presets and decode steps:", ""]
    head = " | ".join(f"error, {v}" for v in data["versions"])
    lines += [
        f"| model | compressed of layers | {head} |",
        "|---" * (2 + len(data["versions"])) + "|",
    ]
    names: dict[str, str] = {}
    worst: dict[tuple[str, str], float] = {}
    for version, result in data["versions"].items():
        for row in result["recorded"]:
            if "compressed" in row:
                names[row["model"]] = f"{row['compressed']} of {row['layers']}"
            elif "error" in row:
                at = (row["model"], version)
                worst[at] = max(worst.get(at, 0.0), float(row["error"]))
    for name, layers in names.items():
        errors = " | ".join(
            f"{worst[name, v]:.1e}" if (name, v) in worst else "-" for v in data["versions"]
        )
        lines.append(f"| {name} | {layers} | {errors} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Install, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="random operations a preset")
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args()
    logs = ROOT / "build" / "nightly"
    logs.mkdir(parents=True, exist_ok=True)
    folders = {v: installed(v, VERSIONS[v]) for v in options.versions.split(",")}
    data: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "asked_steps": options.steps,
        "versions": {},
    }
    for version, folder in folders.items():
        data["versions"][version] = run(list(SUITES), folder, logs, options.steps, options.pytest)
        print(version, data["versions"][version]["suites"], flush=True)
    newest = list(folders.values())[-1]
    data["stateful"] = run([STATEFUL], newest, logs, options.steps, options.pytest)
    (options.out / "nightly.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "nightly.md").write_text(summary(data))
    print(summary(data))
    wrong = [
        *data["stateful"]["failed"],
        *(f for r in data["versions"].values() for f in r["failed"]),
    ]
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
