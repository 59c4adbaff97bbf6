"""Fidelity of `fisher` and `spectral` and of their ingredients, in one run on a GPU.

    PYTHONPATH=src python benchmarks/fisher_gpu.py --model FOLDER --valid wiki.valid.tokens \
        --test wiki.test.raw --out DIR [--stages base,variants,context,domain,calibration]

Calibrates on the first 16 windows of 2048 tokens of `valid` (without `<unk>`), writes the artefact,
and scores on `test`: 40 windows of 2048, 4 sinks, window 64, streaming semantics with blocks of one
token, stored bytes counted. Variants are chosen by their KL on windows of `valid` that were not
calibrated on (`kl_tune`), never by `test`. Rows are appended to DIR/fisher_gpu.jsonl as they come.
"""

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.streaming import compressed_share
from kvfold.cache.config import CacheConfig
from kvfold.calibration.artefact import Artefact
from kvfold.calibration.fisher import Recipe, Statistics
from kvfold.calibration.fit import Fit
from kvfold.codec import BoundCodec, Preset, Site, get, presets
from kvfold.codecs.fisher import FORMS, Fisher, preset_of
from kvfold.codecs.spectral import Spectral
from kvfold.evaluation.metrics import perplexity_delta, quantile, token_scores
from kvfold.evaluation.perplexity import environment
from kvfold.integrations import collect, collect_fisher, models
from kvfold.integrations.describe import LayerInfo, describe, model_hash
from kvfold.integrations.streaming import Session

SINKS, WINDOW = 4, 64
METHOD = Recipe()
TARGETS = (4.0, 3.0, 2.5, 2.0, 1.5, 1.0)
#: what design.md section 6 measured with prototypes: KL by form and code bits.
BARS = {
    "pre": dict(zip(TARGETS, (0.0013, 0.0030, 0.0064, 0.0116, 0.028, 0.082), strict=True)),
    "tile": dict(zip(TARGETS, (0.0017, 0.0038, 0.0077, 0.0161, 0.0365, 0.100), strict=True)),
    "post": dict(zip(TARGETS, (0.0020, 0.0053, 0.0109, 0.0238, 0.050, 0.136), strict=True)),
}


# --- measuring -----------------------------------------------------------------------------------


class Windows:
    """Windows of a text with the uncompressed model's logits at hand."""

    def __init__(self, model: Any, ids: Tensor, rows: int) -> None:
        self.model, self.rows = model, rows
        self.device = next(model.parameters()).device
        self.ids = ids.to(self.device)
        first = SINKS + WINDOW
        self.targets = self.ids[:, first + 1 :]
        with torch.no_grad():
            self.reference = [self._logits(batch) for batch in self.ids.split(rows)]

    def _logits(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, use_cache=False).logits[:, SINKS + WINDOW : -1]

    @torch.no_grad()
    def score(self, preset: Preset, artefact: Artefact | None) -> dict[str, float]:
        """Figures of one preset."""
        config = CacheConfig(preset, sinks=SINKS, window=WINDOW, artefact=artefact)
        session = Session(self.model, config, 1)
        parts = []
        batches = zip(
            self.ids.split(self.rows), self.reference, self.targets.split(self.rows), strict=True
        )
        for batch, reference, targets in batches:
            with session:
                logits = self._logits(batch)
            parts.append(
                token_scores(reference.flatten(0, 1), logits.flatten(0, 1), targets.flatten())
            )
        kl, agree, nll, base = (
            torch.cat([getattr(part, name) for part in parts]).cpu()
            for name in ("kl", "agree", "nll", "nll_reference")
        )
        windows = len(self.ids)
        ppl, delta, error, _ = perplexity_delta(nll.view(windows, -1), base.view(windows, -1))
        return {
            "bits": session.bits_per_element(),
            "kl": float(kl.double().mean()),
            "kl_p99": quantile(kl, 0.99),
            "top1": float(agree.double().mean()),
            "ppl": ppl,
            "ppl_delta": delta,
            "ppl_delta_se": error,
            "ppl_reference": float(base.double().mean().exp()),
            "share": compressed_share(self.ids.shape[1], SINKS, WINDOW, 1),
        }


class Log:
    """Rows as JSON lines and as they come on the screen, until time is up."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.file, self.start, self.seconds = path.open("a"), time.time(), seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.time() - self.start

    @property
    def over(self) -> bool:
        """Whether no new measurement should start."""
        return self.spent > self.seconds

    def row(self, **found: Any) -> None:
        """Write one row."""
        found["at"] = round(self.spent, 1)
        self.file.write(json.dumps(found) + "\n")
        self.file.flush()
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in found.items()}
        print("  ".join(f"{k}={v}" for k, v in shown.items()), flush=True)


# --- variants ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoGain(Fisher):
    """`fisher` with every gain 1, for the ablation; the byte is stored all the same."""

    def bind(self, site: Site, artefact: Any = None) -> BoundCodec:
        """The codec with its gain bytes replaced."""
        bound = super().bind(site, artefact)
        bound.gain_bytes = lambda y: torch.full(y.shape[:-1], 128, device=y.device).short()
        return bound


@dataclass(frozen=True)
class Variant:
    """One change of the method.

    Args:
        name: for the row.
        recipe: of the fit.
        knobs: of the codec.
        codec: its class.
        collect: options of the collection that differ, for a variant that needs its own.
    """

    name: str
    recipe: Recipe = METHOD
    knobs: dict[str, Any] = field(default_factory=dict)
    codec: type[Fisher] = Fisher
    collect: dict[str, Any] = field(default_factory=dict)

    def preset(self, bits: float, form: str) -> Preset:
        """The variant at some bits in some form."""
        made = self.codec(float(bits), form, **self.knobs)
        return replace(preset_of(bits, form), keys=made, values=made)


def variants() -> list[Variant]:
    """The method, what might be better, and the ablation; cheap to add to."""
    return [
        Variant("method"),
        # one ingredient removed at a time
        Variant("-gain search", knobs={"search": 0}),
        Variant("-ridge 3e-2: 1e-3", Recipe(ridge=1e-3)),
        Variant("-uncentred values", Recipe(centred_values=True)),
        Variant("-key mean", Recipe(centred_keys=False)),
        Variant("-Fisher metric", Recipe(metric="plain")),
        Variant("-one budget: per layer", Recipe(scope="layer")),
        Variant("-one budget: per head", Recipe(scope="head")),
        Variant("-6 bits: at most 4", Recipe(max_bits=4)),
        Variant("-fitted levels", Recipe(fitted=False)),
        Variant("-gain", Recipe(gain=False), codec=NoGain),
        Variant("-reweighing by gains", Recipe(reweigh=0)),
        # what else might be better
        Variant("gain search 8", knobs={"search": 8}),
        Variant("measured errors", Recipe(measured=True)),
        Variant("importance-weighted levels", Recipe(weighted=True)),
        Variant("keys' costs twice", Recipe(side_scale=(2.0, 1.0))),
        Variant("fewer columns", Recipe(slack=0.04)),
        Variant("tile 32", knobs={"tile": 32}, collect={"tile": 32}),
    ]


# --- stages --------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all stages share."""

    model: Any
    tokenizer: Any
    valid: str
    test: str
    log: Log
    out: Path
    args: argparse.Namespace
    found: dict[str, Statistics] = field(default_factory=dict)
    texts: dict[tuple, Windows] = field(default_factory=dict)

    def ids(self, text: str, context: int) -> Tensor:
        """All whole windows of a text."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)[: len(ids) // context * context].view(-1, context)

    def windows(self, what: str, context: int = 2048) -> Windows:
        """Windows to score on: `test`, `tune` (valid, behind what is calibrated on), `python`."""
        if (what, context) not in self.texts:
            if what == "test":
                ids = self.ids(self.test, context)[: self.args.windows * 2048 // context]
            elif what == "tune":
                start = self.args.calibration + 32
                ids = self.ids(self.valid, context)[start : start + self.args.tune]
            else:
                ids = self.ids(stdlib(), context)[: min(16, self.args.windows)]
            self.texts.clear()  # reference logits are large
            self.texts[what, context] = Windows(
                self.model, ids, max(1, self.args.rows * 2048 // context)
            )
        return self.texts[what, context]

    def statistics(
        self, name: str = "base", windows: Tensor | None = None, **options: Any
    ) -> Statistics:
        """Collected once for each name, samples on the device."""
        if name not in self.found:
            if windows is None:
                windows = self.ids(self.valid, self.args.context)[: self.args.calibration]
            if self.model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.time()
            found = collect_fisher.collect(
                self.model,
                windows,
                sinks=SINKS,
                window=WINDOW,
                **{"samples": windows.numel(), **options},
                conditions={
                    "model": Path(self.args.model).name,
                    "tokens": windows.numel(),
                    "context": windows.shape[1],
                    "data": Path(self.args.valid).name,
                    "data_sha256": "",
                },
            )
            device = self.model.device
            for side in found.sides.values():
                residuals, gradients = side.sample()
                side.residuals, side.gradients = [residuals.to(device)], [gradients.to(device)]
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
            self.log.row(
                what="collect",
                name=name,
                tokens=windows.numel(),
                seconds=time.time() - start,
                peak_gib=peak,
            )
            self.found[name] = found
        return self.found[name]

    def artefact(
        self, statistics: Statistics, codecs: list[Fisher], recipe: Recipe = METHOD
    ) -> Artefact:
        """Tables of some codecs."""
        return collect_fisher.artefact(statistics, codecs, "fisher2", recipe, self.model.device)

    def score(self, stage: str, name: str, preset: Preset, artefact: Artefact, **more: Any) -> None:
        """Measure and log one preset."""
        where = more.pop("windows", None) or self.windows("test")
        found = where.score(preset, artefact)
        codec = preset.keys
        if isinstance(codec, Fisher):
            more = {"form": codec.form, "code_bits": codec.bits, **more}
            bar = BARS[codec.form].get(codec.bits)
            if bar and stage == "base":
                more["of_bar"] = found["kl"] / bar
        self.log.row(what=stage, name=name, preset=preset.name, **more, **found)


def base(bench: Bench) -> None:
    """Every preset of the catalogue of both methods."""
    statistics = bench.statistics()
    start = time.time()
    codecs = [Fisher(b, form) for form in FORMS for b in TARGETS]
    made = bench.artefact(statistics, codecs)
    bench.log.row(what="fit", name="base", codecs=len(codecs), seconds=time.time() - start)
    made.save(bench.out / "fisher.safetensors")
    for form in FORMS:
        for bits in TARGETS:
            bench.score("base", "fisher", preset_of(bits, form), made)
    for name, preset in presets().items():
        if name.startswith("spectral"):
            made = Spectra(bench, Spectral()).artefact(preset)
            bench.score("base", "spectral", preset, made)


class Spectra:
    """Moments for `spectral`, collected once; every variant is fitted to them."""

    def __init__(self, bench: Bench, codec: Spectral) -> None:
        self.bench = bench
        device = bench.model.device
        sites = [
            Site(side, i.num_kv_heads, dim, 128, i.index, torch.float32, device, i.rope)
            for i in describe(bench.model)
            if i.kind == "full_attention"
            for side, dim in (("key", i.key_dim), ("value", i.value_dim))
        ]
        self.fit = Fit(spectral_of("spectral", codec, codec), sites, SINKS)

        def visit(info: LayerInfo, keys: Tensor, values: Tensor, positions: Tensor) -> None:
            self.fit.add(info.index, "key", keys, positions)
            self.fit.add(info.index, "value", values, positions)

        start = time.time()
        windows = bench.ids(bench.valid, bench.args.context)[: bench.args.calibration]
        collect.visit_states(bench.model, windows, visit)
        bench.log.row(what="collect", name="spectral", seconds=time.time() - start)

    def artefact(self, preset: Preset) -> Artefact:
        """Tables of one preset."""

        def tables(item: tuple) -> dict[str, Tensor]:
            (layer, side), calibrator = item
            calibrator.codec = preset.keys if side == "key" else preset.values
            found = calibrator.tables()
            return {f"layers.{layer}.{side}.{name}": t.cpu() for name, t in found.items()}

        # one thread each: many small parallel regions on one another's cores take for ever
        with ThreadPool(self.bench.args.threads, torch.set_num_threads, (1,)) as pool:
            parts = pool.map(tables, self.fit.calibrators.items())
        tensors = {name: t.contiguous() for part in parts for name, t in part.items()}
        header = {
            "model_hash": model_hash(self.bench.model),
            "codecs": [preset.keys.to_json(), preset.values.to_json()],
            "preset": preset.name,
        }
        return Artefact(header, tensors)


def spectral_of(name: str, keys: Spectral, values: Spectral) -> Preset:
    """A preset of two codecs."""
    return replace(get("spectral3"), name=name, keys=keys, values=values)


def spectral_variants(bits: float) -> dict[str, Preset]:
    """`spectral` at a total of `bits`, and what the method leaves open."""

    def of(more: float = 0.0, values: dict | None = None, **knobs: Any) -> Preset:
        """Keys have `more` bits above the average, values as many below."""
        return spectral_of(
            f"spectral{bits:g}",
            Spectral(bits + more, **knobs),
            Spectral(bits - more, **(knobs | (values or {}))),
        )

    gain = {"gain": True, "scope": "layer"}
    return {
        "plain": of(),
        "keys +1/4 bit": of(0.25),
        "keys +1/2 bit": of(0.5),
        "keys -1/4 bit": of(-0.25),
        "one budget for a layer's heads": of(scope="layer"),
        "noise_bits 1": of(noise_bits=1, value_noise_bits=1),
        "value_noise_bits 0": of(value_noise_bits=0, coverage=0.95),
        "participation, noise_bits 1": of(
            effective="participation", noise_bits=1, value_noise_bits=1
        ),
        "gain, no search": of(gain=True, search=0),
        "gain": of(gain=True),
        "gain of keys": of(gain=True, values={"gain": False}),
        "gain of values": of(values={"gain": True}),
        "gain, layer": of(**gain),
        "gain, layer, search 4": of(search=4, **gain),
        "gain, layer, keys +1/4 bit": of(0.25, **gain),
        "gain, layer, keys -1/8 bit": of(-0.125, **gain),
        "gain, layer, keys -1/4 bit": of(-0.25, **gain),
        "gain, layer, keys -1/2 bit": of(-0.5, **gain),
        "sketch (QJL)": of(qjl=True),
    }


def spectra(bench: Bench) -> None:
    """`spectral` and its variants."""
    found = Spectra(bench, Spectral())
    for where in bench.args.on.split(","):
        windows = bench.windows(where)
        for bits in map(float, bench.args.spectral.split(",")):
            for name, preset in spectral_variants(bits).items():
                if bench.log.over or (bench.args.only and name not in bench.args.only.split(";")):
                    continue
                made = found.artefact(preset)
                bench.score("spectral", name, preset, made, windows=windows, on=where)


def ablation(bench: Bench) -> None:
    """Each variant at the given bits and forms, on held-out `valid` and on `test`."""
    wanted = [v for v in variants() if not bench.args.only or v.name in bench.args.only.split(";")]
    cases = [(f, float(b)) for f in bench.args.forms.split(",") for b in bench.args.bits.split(",")]
    made: dict[tuple, Artefact] = {}
    for where in bench.args.on.split(","):
        windows = bench.windows(where)
        for variant in wanted:
            if bench.log.over:
                return
            for form, bits in cases:
                preset = variant.preset(bits, form)
                key = (variant.name, form, bits)
                if key not in made:
                    name = json.dumps(variant.collect) if variant.collect else "base"
                    statistics = bench.statistics(name, **variant.collect)
                    made[key] = bench.artefact(statistics, [preset.keys], variant.recipe)
                more = {"on": where}
                bench.score("variant", variant.name, preset, made[key], windows=windows, **more)


def contexts(bench: Bench) -> None:
    """Longer contexts with the calibration of 2048."""
    codecs = [Fisher(2.0, form) for form in FORMS]
    made = bench.artefact(bench.statistics(), codecs)
    for context in (2048, 4096, 8192):
        for codec in codecs:
            if not bench.log.over:
                windows = bench.windows("test", context)
                preset = preset_of(2.0, codec.form)
                bench.score("context", "fisher", preset, made, windows=windows, context=context)


def domains(bench: Bench) -> None:
    """Python source: calibrated on the text, on Python, and on both."""
    context, count = bench.args.context, bench.args.calibration
    wiki = bench.ids(bench.valid, context)[:count]
    # the second half of the sources; the first is scored on
    code = bench.ids(stdlib(), context)
    code = code[len(code) // 2 :][:count]
    sets = {"base": wiki, "python": code, "both": torch.cat((wiki[::2], code[::2]))}
    codecs = [Fisher(2.0, form) for form in FORMS]
    made = {
        name: bench.artefact(bench.statistics(name, windows=ids), codecs)
        for name, ids in sets.items()
    }
    for where in ("python", "test"):
        windows = bench.windows(where)
        for name in sets:
            for codec in codecs:
                if not bench.log.over:
                    preset = preset_of(2.0, codec.form)
                    bench.score("domain", name, preset, made[name], windows=windows, on=where)


def calibrations(bench: Bench) -> None:
    """Disjoint calibration sets, few tokens, other seeds."""
    ids = bench.ids(bench.valid, bench.args.context)
    count = bench.args.calibration
    sets = {f"set {i}": ids[i * count : (i + 1) * count] for i in range(3)}
    sets |= {"2048 tokens": ids[:1], "8192 tokens": ids[:4]}
    for name, windows in sets.items():
        if bench.args.only and name not in bench.args.only.split(";"):
            continue
        made = bench.artefact(
            bench.statistics(name, windows=windows), [Fisher(2.0, f) for f in ("tile", "pre")]
        )
        bench.found.pop(name)
        for form in ("tile", "pre"):
            if not bench.log.over:
                bench.score("calibration", name, preset_of(2.0, form), made)


STAGES: dict[str, Callable[[Bench], None]] = {
    "base": base,
    "variants": ablation,
    "context": contexts,
    "domain": domains,
    "calibration": calibrations,
    "spectral": spectra,
}


def stdlib() -> str:
    """Python source of the standard library, tests left out, in the order of names."""
    return "\n".join(_sources())


def _sources() -> Iterator[str]:
    folder, size = Path(sysconfig.get_paths()["stdlib"]), 0
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        yield text
        if size > 1_500_000:
            return


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--model", required=True, help="model folder, or what kvfold.integrations.models.load takes"
    )
    add("--valid", required=True, help="wiki.valid.tokens")
    add("--test", required=True, help="wiki.test.raw")
    add("--out", required=True, type=Path)
    add("--stages", default="base,variants", help=", ".join(STAGES))
    add("--only", default="", help="names of variants or sets, semicolons between")
    add("--spectral", default="3,2", help="bits of the variants of spectral, commas between")
    add("--threads", type=int, default=8, help="layers of spectral fitted at once")
    add("--forms", default="tile", help="forms of the variants")
    add("--bits", default="2", help="code bits of the variants, commas between")
    add("--on", default="tune,test", help="texts that variants are scored on")
    add("--windows", type=int, default=40)
    add("--tune", type=int, default=16)
    add("--calibration", type=int, default=16, help="windows to calibrate on")
    add("--context", type=int, default=2048, help="tokens of a calibration window")
    add("--rows", type=int, default=4, help="windows of one forward")
    add("--seconds", type=float, default=420, help="no new measurement after so long")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    log = Log(args.out / "fisher_gpu.jsonl", args.seconds)
    model, tokenizer = models.load(args.model, dtype=torch.float32, device=args.device)
    valid = Path(args.valid).read_text(encoding="utf-8").replace("<unk>", "")
    test = Path(args.test).read_text(encoding="utf-8")
    log.row(what="start", **environment(torch.device(args.device)), args=repr(vars(args)))
    bench = Bench(model, tokenizer, valid, test, log, args.out, args)
    for stage in args.stages.split(","):
        STAGES[stage](bench)
    log.row(what="end", seconds=log.spent)


if __name__ == "__main__":
    sys.exit(main())
