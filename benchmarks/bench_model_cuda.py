"""A whole model on one CUDA device: tokens/s and memory, packed against the stock static cache.

    python benchmarks/bench_model_cuda.py --seconds 150

Llama-3-8B's shape with random bfloat16 weights, built on the device. Long caches are filled with
random bytes that are valid codes (`filled=synthetic` in the row): speed does not depend on them.
Every row is a median over replays of a decode step with its 20/80 % quantiles; the stock step is
captured in a CUDA graph by hand, once as transformers runs it and once without its mask, which lets
torch's fastest attention kernels in. A part that fails is a row with its error.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import RESULTS, write
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama import modeling_llama

import kvfold
from kvfold.attention import dispatch, paged
from kvfold.cache.store import LayerStore

SHAPES = ((1, 32_768), (8, 32_768), (1, 131_072), (8, 131_072))
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}


def config(small: bool) -> LlamaConfig:
    """Llama-3-8B, or a few layers of its attention."""
    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    more = SMALL if small else {**wide, "vocab_size": 128_256}
    heads = (8, 2) if small else (32, 8)
    return LlamaConfig(
        **more,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=32 if small else 128,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )


def timed(run: Callable[[], Any], device: str, budget: float = 2.0) -> dict[str, float]:
    """Milliseconds of `run`: median and quantiles over at most 40 runs or `budget` seconds."""
    found = []
    began = time.perf_counter()
    while len(found) < 3 or (len(found) < 40 and time.perf_counter() - began < budget):
        if device == "cpu":
            start = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - start))
            continue
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        run()
        b.record()
        b.synchronize()
        found.append(a.elapsed_time(b))
    low, middle, high = torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"median_ms": middle, "q20_ms": low, "q80_ms": high}


def peak(device: str) -> int:
    """Most bytes allocated since the last reset."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def fresh(device: str) -> None:
    """Give back what the last part held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- the stock cache -------------------------------------------------------------------------


def stock(model: Any, rows: int, tokens: int, masked: bool, graphs: bool, device: str) -> dict:
    """The static cache, filled to `tokens - 1`; without a mask every slot is attended to."""
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    ids = torch.randint(0, model.config.vocab_size, (rows, 1), device=device)
    shape = (rows, model.config.num_key_value_heads, 1, model.config.head_dim)
    for layer in cache.layers:
        one = torch.zeros(shape, dtype=model.dtype, device=device)
        layer.lazy_initialization(one, one)
        layer.keys.normal_()
        layer.values.normal_()
    position = torch.full((rows, 1), tokens - 1, device=device)
    base = model.model

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(tokens - 1)
        out = base(ids, position_ids=position, past_key_values=cache, use_cache=True)
        return model.lm_head(out.last_hidden_state)

    make = modeling_llama.create_causal_mask
    if not masked:  # the last slot is the step's own, so that all are attended to anyway
        modeling_llama.create_causal_mask = lambda *_, **__: None
    try:
        run = captured(step) if graphs else step
        row = timed(run, device)
    finally:
        modeling_llama.create_causal_mask = make
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return row | {"cache_bytes": held}


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# --- packed ----------------------------------------------------------------------------------


def artefact(model: Any, preset: str, device: str) -> Any:
    """Made-up tables with the widths of a calibration at these bits: 0 to 6, mixed within heads."""
    chosen = kvfold.get(preset)
    if "required" not in (chosen.keys.artefact, chosen.values.artefact):
        return None
    return Tables(chosen)


class Tables:
    """Stands for an artefact: white tables, widths spread as water-filling spreads them."""

    def __init__(self, preset: Any) -> None:
        self.preset = preset

    def check(self, *_: Any) -> None:
        """It fits every model."""

    def at(self, layer: int, side: Any) -> dict[str, torch.Tensor]:
        """The codec's example tables, their widths spread about the same mean."""
        from kvfold.codec import Site
        from kvfold.transforms.rope import Rope

        codec = self.preset.keys if side == "key" else self.preset.values
        site = Site(side, self.heads, self.dim, layer=layer, rope=Rope((1.0,)))
        tables = codec.example(site).at(layer, side)
        for name, table in tables.items():
            if name.endswith("codes"):
                tables[name] = spread(table)
        tables["mean"] = torch.randn(self.heads, self.dim)  # a mean of zeros would be left out
        return tables

    heads, dim = 8, 128


def spread(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[3, heads, dim]` (widths, steps, offsets), a quarter of the widths moved by 2."""
    widths = codes[0].clone()
    quarter = widths.shape[1] // 4
    widths[:, :quarter] += 2
    widths[:, -quarter:] = (widths[:, -quarter:] - 2).clamp_min(0)
    return torch.stack((widths, codes[1], codes[2]))


def folded(model: Any, preset: str, rows: int, tokens: int, graphs: bool, device: str) -> Any:
    """A packed cache of `rows` x `tokens`, pages and ring filled without encoding."""
    made = artefact(model, preset, device)
    if made is not None:
        made.heads, made.dim = model.config.num_key_value_heads, model.config.head_dim
    block = kvfold.CacheConfig().block
    cache = kvfold.FoldedCache(
        model,
        kvfold.CacheConfig(
            preset=preset, slab_blocks=64, max_tokens=1 << 20, graphs=graphs, artefact=made
        ),
    )
    states = torch.zeros(
        rows, model.config.num_key_value_heads, 1, model.config.head_dim, device=device
    ).to(model.dtype)
    step = cache.timeline.plan(rows, tokens, None, None)
    for layer in cache.folded_layers:
        layer.lazy_initialization(states, states)
        store: LayerStore = layer.store
        store._allocate(states, states, step)
        store.exact_keys.normal_()
        store.exact_values.normal_()
        store.pool.reserve(step.num_pages)
        fill(store, block)
    cache.timeline.commit(step)
    return cache


def fill(store: LayerStore, block: int) -> None:
    """Pages of one encoded block of noise each way round: valid scales, other digits a page."""
    site = store.key.site
    shape = (4, site.num_kv_heads, block, site.head_dim)
    x = torch.randn(shape, device=site.device).to(site.dtype)
    at = torch.arange(4 * block, device=site.device).view(4, block)
    pages = torch.cat((store.encoded(store.key, x, at), store.encoded(store.value, x, at)), 1)
    for slab in store.pool.slabs:
        slab.copy_(pages.repeat(-(-len(slab) // 4), 1)[: len(slab)])


def packed(model: Any, preset: str, rows: int, tokens: int, graphs: bool, device: str) -> dict:
    """Decode steps through the model's own forward, with or without graphs."""
    cache = folded(model, preset, rows, tokens, graphs, device)
    ids = torch.randint(0, model.config.vocab_size, (rows, 1), device=device)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first = model(input_ids=ids, past_key_values=cache).logits
        assert bool(torch.isfinite(first).all()), "logits are not finite"
        row = gate(model, cache, device)

        def step() -> None:
            model(input_ids=ids, past_key_values=cache)

        step()
        row |= timed(step, device)
        parts = cache.nbytes()
        if graphs or device == "cpu":
            row |= fold_step(cache, step, row["median_ms"], device)
    held = sum(size for part, size in parts.items() if part != "tables")
    if cache.graphs is not None:
        row["path"] = cache.graphs.reason or f"graphs: {cache.graphs.captures} captures"
    row |= {"cache_bytes": held, "tables_bytes": parts["tables"]}
    return row | {
        "bits": cache.bits_per_element(),
        "notices": "; ".join(str(w.message) for w in said),
    }


def gate(model: Any, cache: Any, device: str) -> dict[str, Any]:
    """One layer's attention on the path that decoding takes, against the page walk in float32."""
    store: LayerStore = cache.folded_layers[-1].store
    now = cache.timeline.now()
    view = store._view(now, now.folded, now.start)
    asked = torch.tensor([[n - 1] for n in now.start], device=device)
    view = replace(view, query_tokens=asked)
    shape = (now.rows, model.config.num_attention_heads, 1, store.key.site.head_dim)
    q = torch.randn(shape, device=device).to(model.dtype)
    scaling = shape[-1] ** -0.5
    found = dispatch.attend(q, view, scaling=scaling).float()
    wanted = paged.attend(q, view, scaling=scaling)
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error < 0.02, f"attention is off by {error:.3g}"
    return {"gate_error": error, "kernel": dispatch.path(q, view)[1]}


def fold_step(cache: Any, step: Callable[[], Any], usual: float, device: str) -> dict[str, float]:
    """The step in which a block of every row is folded, against the others."""
    line = cache.timeline
    while line.folded_at(line.lengths[0] + 1) == line.folded[0]:
        step()
    found = timed_once(step, device)
    return {"fold_step_ms": found, "fold_share": (found - usual) / (line.block * usual + found)}


def timed_once(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run, from an idle device to an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


# --- folding ---------------------------------------------------------------------------------


def folding(model: Any, preset: str, rows: int, device: str) -> list[dict]:
    """Folding one block of every row in one layer: as torch runs it, and replayed."""
    cache = folded(model, preset, rows, 1024, False, device)
    store: LayerStore = cache.folded_layers[0].store
    site = store.key.site
    x = torch.randn(rows, site.num_kv_heads, site.block_len, site.head_dim, device=device)
    x = x.to(site.dtype)
    at = torch.arange(site.block_len, device=device).expand(rows, -1).contiguous()

    def fold() -> None:
        store.encoded(store.key, x, at)
        store.encoded(store.value, x, at)

    def reference() -> None:
        for bound in (store.key, store.value):
            bound.layout.join(bound.encode(x, at))

    found = []
    for name, run in (("fold_layer", fold), ("fold_layer_reference", reference)):
        run()
        found.append({"what": name, "graphs": False, **timed(run, device, 1.0)})
        if device == "cuda":
            found.append({"what": name, "graphs": True, **timed(captured(run), device, 1.0)})
    return found


def chunk(model: Any, preset: str, tokens: int, queries: int, device: str) -> dict:
    """A pass of `queries` tokens over packed history, and over the stock cache's."""
    ids = torch.randint(0, model.config.vocab_size, (1, queries), device=device)
    stock_cache = DynamicCache(config=model.config)
    shape = (1, model.config.num_key_value_heads, tokens, model.config.head_dim)
    for i in range(model.config.num_hidden_layers):
        states = torch.randn(shape, device=device).to(model.dtype)
        stock_cache.update(states, states, i)
    found = {}
    caches = {"stock_ms": stock_cache, "median_ms": folded(model, preset, 1, tokens, False, device)}
    with torch.inference_mode():
        for name, cache in caches.items():

            def run(cache: Any = cache) -> None:
                model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

            found[name] = sorted(timed_once(run, device) for _ in range(3))[1]
    return {**found, "queries": queries}


def prefill(model: Any, preset: str, tokens: int, device: str) -> dict:
    """The first pass of one row, with and without folding what it caches."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    made = artefact(model, preset, device)
    if made is not None:
        made.heads, made.dim = model.config.num_key_value_heads, model.config.head_dim
    chosen = kvfold.CacheConfig(preset=preset, artefact=made, max_tokens=1 << 20)

    def run(cache: Any) -> None:
        with torch.inference_mode():
            model(ids, past_key_values=cache, logits_to_keep=1)

    run(kvfold.FoldedCache(model, chosen))
    base = timed(lambda: run(DynamicCache(config=model.config)), device, 2.0)
    ours = timed(lambda: run(kvfold.FoldedCache(model, chosen)), device, 2.0)
    share = 1 - base["median_ms"] / ours["median_ms"]
    return {**ours, "stock_ms": base["median_ms"], "fold_share": share, "tokens": tokens}


# --- all of it -------------------------------------------------------------------------------


def main() -> None:
    """Run part after part, each within the time that is left."""
    make = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    make.add_argument("--presets", default="fisher2,turboquant4")
    make.add_argument("--shapes", default=",".join(f"{b}x{n}" for b, n in SHAPES))
    make.add_argument("--parts", default="fold,stock,packed,prefill,chunk")
    make.add_argument("--seconds", type=float, default=150.0, help="parts after it are not run")
    make.add_argument("--small", action="store_true", help="two narrow layers, to try it out")
    make.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    make.add_argument("--out", default=RESULTS / "model_cuda.csv", type=type(RESULTS))
    args = make.parse_args()
    args.dtype = "bfloat16"
    began = time.perf_counter()
    torch.manual_seed(1)
    with torch.device(args.device), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config(args.small), dtype=torch.bfloat16).eval()
        torch.set_default_dtype(torch.float32)
    print(f"model after {time.perf_counter() - began:.1f} s")
    rows: list[dict[str, Any]] = []

    def part(what: str, run: Callable[[], Any], **about: Any) -> None:
        made: dict[str, Any] = {"what": what, **about}
        if time.perf_counter() - began > args.seconds:
            rows.append(made | {"error": "not run: out of time"})
            return
        fresh(args.device)
        try:
            found = run()
            for one in found if isinstance(found, list) else [found]:
                rows.append({**made, **one, "peak_bytes": peak(args.device)})
        except Exception as error:
            rows.append(made | {"error": f"{type(error).__name__}: {error}"[:400]})
        last = {k: v for k, v in rows[-1].items() if v not in ("", None)}
        print(f"[{time.perf_counter() - began:6.1f} s]", last, flush=True)

    presets = args.presets.split(",")
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
    parts = args.parts.split(",")
    on = args.device
    with torch.no_grad():
        for graphs, n, t in [(True, *s) for s in shapes] + [(False, *s) for s in shapes[:2]]:
            if graphs and on == "cpu":
                continue
            about = {"rows": n, "tokens": t, "graphs": graphs, "filled": "synthetic"}
            for name in ("stock", "stock_unmasked") if "stock" in parts else ():
                masked = name == "stock"
                part(name, lambda a=(n, t, masked, graphs): stock(model, *a, on), **about)
            for p in presets if "packed" in parts else ():
                part("packed", lambda a=(p, n, t, graphs): packed(model, *a, on), preset=p, **about)
        for p in presets:
            if "fold" in parts:
                for n in (1, 8):
                    part("fold", lambda n=n, p=p: folding(model, p, n, on), preset=p, rows=n)
            if "prefill" in parts:
                t = 512 if args.small else 8192
                part("prefill", lambda p=p, t=t: prefill(model, p, t, on), preset=p, rows=1)
            if "chunk" in parts:
                t, n = (1024, 128) if args.small else (32_768, 2048)
                about = {"rows": 1, "tokens": t, "filled": "synthetic"}
                part("chunk", lambda a=(p, t, n): chunk(model, *a, on), preset=p, **about)
    base: dict[tuple[Any, ...], float] = {}
    c = model.config
    for row in rows:
        key = (row.get("rows"), row.get("tokens"), row.get("graphs"))
        if "median_ms" in row and row["what"] in ("stock", "stock_unmasked", "packed"):
            row["tokens_per_s"] = 1e3 * row["rows"] / row["median_ms"]
            base[(row["what"], *key)] = row["median_ms"]
        if row["what"] == "packed" and "median_ms" in row:
            whole = 4 * row["rows"] * row["tokens"] * c.num_key_value_heads * c.head_dim
            row["cache_over_bf16"] = row["cache_bytes"] / (whole * c.num_hidden_layers)
            for name, column in (("stock", "over_stock"), ("stock_unmasked", "over_unmasked")):
                if (name, *key) in base:
                    row[column] = base[(name, *key)] / row["median_ms"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write(args.out, [{name: row.get(name, "") for name in names} for row in rows], args)


if __name__ == "__main__":
    main()
