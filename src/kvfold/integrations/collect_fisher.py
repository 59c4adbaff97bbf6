"""Statistics for `fisher` from a model: residual moments, and gradients of the loss.

For each window one forward without gradients (means, the first round), then one forward and one
backward. The loss is the sum of token cross-entropies with labels drawn from the model's own
distribution (the true Fisher). A key or value gets gradients only through attention to it while
cold, in streaming semantics with blocks of one token: query i reads key n from codes if
`sinks <= n <= i - window`. What earlier layers get is the whole gradient.

One attention function is registered with transformers and does nothing until a model's config
names it; the config does so only while this module's forwards run.
"""

import datetime
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import kvfold
from kvfold.attention.streaming import cold_mask
from kvfold.calibration.artefact import FORMAT, Artefact, CalibrationError, commit
from kvfold.calibration.fisher import (
    Fit,
    Recipe,
    SideStatistics,
    Statistics,
    codecs_for,
)
from kvfold.codec import Preset, Side, get
from kvfold.codecs.fisher import FORMS, Fisher
from kvfold.integrations.collect import visit_states
from kvfold.integrations.describe import (
    LayerInfo,
    UnsupportedError,
    decoder,
    describe,
    model_hash,
    text_config,
)
from kvfold.transforms.rope import Rope

NAME = "kvfold_fisher"
#: score elements of one chunk of queries, by device type.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
#: activations of one window's graph beyond which layers are recomputed in the backward pass.
ACTIVATION_BYTES = 4 << 30
#: host memory for sampled residuals and gradients; an 8B model keeps 16,384 tokens in it.
SAMPLE_BYTES = 4 << 30
#: code bits that every artefact has tables for.
TARGETS = (4.0, 3.0, 2.5, 2.0, 1.5, 1.0)

Progress = Callable[[int, int], None]


# --- attention with gradients of its own for cold pairs ------------------------------------------


class _Run:
    """One window's backward pass: takes each layer's cold gradients as they appear."""

    def __init__(
        self,
        layers: dict[int, LayerInfo],
        sinks: int,
        window: int,
        take: Callable[[LayerInfo, Tensor, Tensor, Tensor, Tensor], None],
    ) -> None:
        self.layers = {id(info.module): info for info in layers.values()}
        self.sinks, self.window, self.take = sinks, window, take
        self.seen: set[int] = set()


class _ColdAttention(torch.autograd.Function):
    """Causal attention in float32, chunk by chunk; its backward recomputes the weights.

    The gradients of cold pairs alone go to `run.take`, those of all pairs to the graph.
    """

    @staticmethod
    def forward(ctx, q, k, v, run, info, scaling, softcap, sink_logits):
        ctx.save_for_backward(q, k, v)
        ctx.rest = (run, info, scaling, softcap, sink_logits)
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float32, device=q.device)
        for a, b in _chunks(q):
            weights, _ = _weights(q, k, a, b, scaling, softcap, sink_logits)
            out[:, :, a:b] = _ungroup(weights @ v[:, :, :b].float(), q.shape[1])
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        run, info, scaling, softcap, sink_logits = ctx.rest
        kv_heads = k.shape[1]
        index = torch.arange(q.shape[2], device=q.device)
        dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        dk, dv, cold_k, cold_v = (
            torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v, k, v)
        )
        kf, vf = k.float(), v.float()
        for a, b in _chunks(q):
            weights, slope = _weights(q, k, a, b, scaling, softcap, sink_logits)
            do = _group(grad[:, :, a:b].float(), kv_heads)
            dp = do @ vf[:, :, :b].mT
            ds = weights * (dp - (weights * dp).sum(-1, keepdim=True))
            if slope is not None:
                ds = ds * slope
            ds = ds * scaling
            part = _group(q[:, :, a:b].float(), kv_heads)
            dq[:, :, a:b] = _ungroup(ds @ kf[:, :, :b], q.shape[1])
            dk[:, :, :b] += ds.mT @ part
            dv[:, :, :b] += weights.mT @ do
            # the queries of a group follow one another, head after head
            cold = cold_mask(index[a:b], index[:b], sinks=run.sinks, window=run.window)
            cold = cold.repeat(q.shape[1] // kv_heads, 1)
            cold_k[:, :, :b] += (ds * cold).mT @ part
            cold_v[:, :, :b] += (weights * cold).mT @ do
        run.seen.add(info.index)
        run.take(info, k, v, cold_k, cold_v)
        return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None)


def _chunks(q: Tensor) -> Iterator[tuple[int, int]]:
    batch, heads, tokens, _ = q.shape
    step = max(16, CHUNK_ELEMENTS.get(q.device.type, 1 << 25) // (batch * heads * tokens))
    return ((a, min(a + step, tokens)) for a in range(0, tokens, step))


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """`[batch, heads, queries, dim]` to `[batch, kv_heads, group * queries, dim]`."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _ungroup(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)


def _weights(
    q: Tensor,
    k: Tensor,
    a: int,
    b: int,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax weights `[batch, kv_heads, group * queries, b]`, and the softcap's slope."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    scores = _group(q[:, :, a:b].float() * scaling, kv_heads) @ k[:, :, :b].float().mT
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent.square()
    rows, cols = torch.arange(a, b, device=q.device), torch.arange(b, device=q.device)
    hidden = (cols > rows[:, None]).repeat(groups, 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sink_logits is None:
        return scores.softmax(-1), slope
    column = sink_logits.detach().float().view(1, kv_heads, groups, 1, 1)
    column = column.expand(q.shape[0], -1, -1, b - a, 1).flatten(2, 3)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1], slope


#: the run in force; forwards of this module only happen inside one.
_RUN: list[_Run] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    run = _RUN[-1]
    info = run.layers.get(id(module))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if info is None:  # sliding and chunked layers are not compressed: they only pass gradients on
        out = _masked(query, key, value, attention_mask, factor, softcap, s_aux)
    else:
        out = _ColdAttention.apply(query, key, value, run, info, factor, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Ordinary attention under the mask that transformers made (None: causal)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    if mask is None:
        index = torch.arange(q.shape[2], device=q.device)
        mask = (index <= index[:, None])[None, None]
    if softcap is None and sink_logits is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    scores = q.float() @ k.float().mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sink_logits is not None:
        column = sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v.float()).to(q.dtype)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def _open(model: nn.Module, run: _Run, recompute: bool) -> Iterator[None]:
    """Our attention, frozen weights and a graph that starts at the embeddings; undone on exit."""
    configs = [text_config(model), decoder(model).config]
    configs += [c for i in run.layers.values() if (c := getattr(i.module, "config", None))]
    configs = list({id(c): c for c in configs}.values())
    before = [config._attn_implementation for config in configs]
    trainable = [p for p in model.parameters() if p.requires_grad]
    was_training, patched = model.training, []

    def start_graph(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    embeddings: nn.Module = cast(Any, decoder(model)).get_input_embeddings()
    handle = embeddings.register_forward_hook(start_graph)
    _RUN.append(run)
    try:
        model.eval()
        for p in trainable:
            p.requires_grad_(False)
        for config in configs:
            config._attn_implementation = NAME
        if recompute:
            for block in _blocks(model, run):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
                patched.append(block)
        yield
    finally:
        for block in patched:
            del block.forward
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        for p in trainable:
            p.requires_grad_(True)
        model.train(was_training)
        _RUN.remove(run)
        handle.remove()


def _blocks(model: nn.Module, run: _Run) -> list[nn.Module]:
    """The decoder's layers: the entries of module lists that hold an attention module."""
    inside = {id(info.module) for info in run.layers.values()}
    return [
        block
        for module in decoder(model).modules()
        if isinstance(module, nn.ModuleList)
        for block in module
        if any(id(m) in inside for m in block.modules()) and "forward" not in vars(block)
    ]


def samples_for(model: nn.Module, tokens: int) -> int:
    """Of `tokens`, how many are sampled: residuals and gradients take two bytes an element each."""
    elements = sum(
        i.num_kv_heads * (i.key_dim + i.value_dim)
        for i in describe(model)
        if i.kind == "full_attention"
    )
    return max(1, min(tokens, SAMPLE_BYTES // (4 * elements)))


# --- collection ----------------------------------------------------------------------------------


def collect(
    model: nn.Module,
    windows: Tensor,
    *,
    sinks: int = 4,
    window: int = 64,
    tile: int = 128,
    samples: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    conditions: dict[str, Any] | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of every full-attention layer, the same for the same seed and machine.

    Args:
        model: a decoder model; its weights get no gradients.
        windows: token ids `[windows, tokens]`; every window starts at position 0.
        sinks: first tokens of each window, which stay exact.
        window: most recent tokens of each query, likewise.
        tile: tokens of a run in the tile form.
        samples: tokens that are kept of all windows together, for moments in units of gains and for
            levels; by default as many as `SAMPLE_BYTES` of host memory hold.
        draws: sets of labels per window, each one backward pass; by default more than one where
            there are few tokens, see `draws_for`.
        seed: of labels and samples.
        conditions: for the header.
        resume: a file that is written after every window and continued from if it is there.
        progress: called with passes done and passes in all.

    Raises:
        UnsupportedError: a model without full-attention layers, windows beyond the length up to
            which its RoPE keeps its frequencies, or a model whose attention does not go through
            transformers' AttentionInterface.
        CalibrationError: windows that are no longer than sinks and window, or a file to resume
            from that is of another run.
    """
    layers = {i.index: i for i in describe(model) if i.kind == "full_attention"}
    _check(model, layers, windows, sinks + window)
    ids = hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()
    header = {
        **(conditions or {}),
        "model_hash": model_hash(model),
        "ids_sha256": ids,
        "sinks": sinks,
        "window": window,
        "tile": tile,
        "samples": samples_for(model, windows.numel()) if samples is None else samples,
        "draws": draws_for(windows.numel()) if draws is None else draws,
        "seed": seed,
    }
    total = 2 * len(windows)
    found = _resumed(resume, header, model)
    if found is None:
        means = _means(
            model, layers, windows, sinks, window, progress and _part(progress, 0, total)
        )
        found = Statistics({**header, "windows_done": 0}, means)
    for w in range(found.header["windows_done"], len(windows)):
        _one_window(model, layers, windows[w], w, len(windows), found)
        found.header["windows_done"] = w + 1
        if progress is not None:
            progress(len(windows) + w + 1, total)
        if resume is not None:
            found.save(resume)
    return found


def draws_for(tokens: int) -> int:
    """Sets of labels for a calibration of so many tokens: the metric of few tokens is noisy.

    >>> [draws_for(tokens) for tokens in (512, 2048, 8192, 32_768)]
    [8, 8, 2, 1]
    """
    return min(8, max(1, 16_384 // tokens))


def expected_bytes(model: nn.Module, context: int = 2048, device: str = "cuda") -> dict[str, int]:
    """About what a calibration holds at its peak, by part, from the model's shapes alone.

    The graph is that of one window: every layer's activations, or, where those are more than
    `ACTIVATION_BYTES`, every layer's input and one layer's activations. `moments` are sums over
    tokens for all layers in every frame. A model on the `meta` device will do.
    """
    config, layers = text_config(model), {i.index: i for i in describe(model)}
    full = {k: i for k, i in layers.items() if i.kind == "full_attention"}
    floats = [p for p in model.parameters() if p.is_floating_point()]
    size, depth = floats[0].itemsize, config.num_hidden_layers
    graph = _activation_bytes(model, full, context)
    if graph > ACTIVATION_BYTES:
        graph = graph // depth + depth * context * config.hidden_size * size
    heads = config.num_attention_heads
    chunk = min(context, max(16, CHUNK_ELEMENTS.get(device, 1 << 25) // (heads * context)))
    return {
        "weights": sum(p.numel() * p.itemsize for p in floats),
        "graph": graph,
        # the logits, and their gradient
        "logits": 2 * context * config.vocab_size * size,
        # weights, their gradients and masked copies of a chunk of queries, in float32
        "attention": 6 * 4 * chunk * heads * context,
        # covariance and metric of keys in the frames of all forms, and of values
        "moments": sum(
            2 * 4 * i.num_kv_heads * (len(FORMS) * i.key_dim**2 + i.value_dim**2)
            for i in full.values()
        ),
    }


def _check(model: nn.Module, layers: dict[int, LayerInfo], windows: Tensor, exact: int) -> None:
    kind = text_config(model).model_type
    if not layers:
        raise UnsupportedError(f"model type {kind!r} has no full-attention layer to calibrate")
    unknown = [i.index for i in layers.values() if i.rope is None]
    if unknown:
        raise UnsupportedError(
            f"model type {kind!r} has rotary embeddings in layers {unknown[:4]} that are unknown; "
            "fisher needs those of transformers (default, linear, yarn, llama3, dynamic, partial) "
            "or a model without RoPE"
        )
    for info in layers.values():
        info.check_length(windows.shape[-1], Fisher())
    if windows.ndim != 2 or windows.shape[1] <= exact + 1:
        raise CalibrationError(
            f"windows have shape {tuple(windows.shape)}; [windows, tokens] with more than "
            f"{exact + 1} tokens is expected: sinks and window stay exact"
        )


def _part(progress: Progress, start: int, total: int) -> Progress:
    return lambda done, _: progress(start + done, total)


def _resumed(
    path: str | Path | None, header: dict[str, Any], model: nn.Module
) -> Statistics | None:
    if path is None or not Path(path).is_file():
        return None
    found = Statistics.load(path)
    other = [key for key, value in header.items() if found.header.get(key) != value]
    if other:
        raise CalibrationError(
            f"{path} was written by a run with another {', '.join(other)}; remove it to start anew"
        )
    device = next(model.parameters()).device
    for side in found.sides.values():
        side.mean = side.mean.to(device)
        for sums in (side.covariance, side.metric):
            for frame in sums:
                sums[frame] = sums[frame].to(device)
    return found


def _means(
    model: nn.Module,
    layers: dict[int, LayerInfo],
    windows: Tensor,
    sinks: int,
    window: int,
    progress: Progress | None,
) -> dict[tuple[int, Side], SideStatistics]:
    sums: dict[Any, Tensor] = {}
    used = slice(sinks, windows.shape[1] - window)
    blank = {
        (index, side): SideStatistics(
            info.rope if side == "key" and info.rope else Rope(()), torch.zeros(0)
        )
        for index, info in layers.items()
        for side in ("key", "value")
    }

    def visit(info: LayerInfo, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        sides: tuple[tuple[Side, Tensor], ...] = (("key", keys), ("value", values))
        for side, x in sides:
            key: tuple[int, Side] = (info.index, side)
            total = blank[key].states(x[0, :, used], positions[0, used]).sum(1)
            sums[key] = sums[key] + total if key in sums else total

    visit_states(model, windows, visit, progress)
    count = len(windows) * (used.stop - used.start)
    for key, side in blank.items():
        side.mean = sums[key] / count
    return blank  # type: ignore[return-value]


def _one_window(
    model: nn.Module,
    layers: dict[int, LayerInfo],
    ids: Tensor,
    number: int,
    windows: int,
    found: Statistics,
) -> None:
    """Forward, draw labels, backward; each layer's cold gradients go into its moments."""
    header = found.header
    sinks, window, tile = header["sinks"], header["window"], header["tile"]
    device = next(model.parameters()).device
    tokens = len(ids)
    used = torch.arange(sinks, tokens - window)
    generator = torch.Generator().manual_seed(header["seed"] * 1_000_003 + number)
    share = header["samples"] * (number + 1) // windows - header["samples"] * number // windows
    kept = torch.randperm(len(used), generator=generator)[:share].sort().values
    positions, index = used.to(device), ((used - sinks) % tile).to(device)
    kept_there = kept.to(device)

    def take(info: LayerInfo, k: Tensor, v: Tensor, cold_k: Tensor, cold_v: Tensor) -> None:
        for side, x, g in (("key", k, cold_k), ("value", v, cold_v)):
            key: tuple[int, Side] = (info.index, side)  # type: ignore[assignment]
            first = draw == 0
            found.sides[key].add(
                x[0, :, sinks : tokens - window].detach(),
                g[0, :, sinks : tokens - window],
                positions,
                index,
                kept_there if first else kept_there[:0],
            )

    run = _Run(layers, sinks, window, take)
    recompute = _activation_bytes(model, layers, tokens) > ACTIVATION_BYTES
    with torch.enable_grad(), _open(model, run, recompute):
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
        for draw in range(header["draws"]):
            uniform = torch.rand(tokens, generator=generator)
            slope = _slope(logits.detach(), uniform.to(device))
            logits.backward(slope, retain_graph=draw + 1 < header["draws"])
            missed = sorted(set(layers) - run.seen)
            if missed:
                raise UnsupportedError(
                    f"model type {text_config(model).model_type!r} does not call attention through "
                    f"transformers' AttentionInterface (layers {missed[:4]}), so gradients with "
                    "respect to its keys cannot be taken"
                )
    found.positions.append(used[kept])
    found.index.append((used[kept] - sinks) % tile)


def _slope(logits: Tensor, uniform: Tensor) -> Tensor:
    """Gradient of the summed cross-entropies with respect to the logits, labels drawn: p - 1_y."""
    slope = torch.empty_like(logits)
    for a in range(0, len(logits), 256):
        p = logits[a : a + 256].float().softmax(-1)
        total = p.cumsum(-1)
        drawn = torch.searchsorted(total, uniform[a : a + 256, None] * total[:, -1:])
        drawn = drawn.clamp_(max=p.shape[-1] - 1)
        slope[a : a + 256] = p.scatter_add_(-1, drawn, torch.full_like(total[:, :1], -1.0))
    return slope


def _activation_bytes(model: nn.Module, layers: dict[int, LayerInfo], tokens: int) -> int:
    """About what the graph of one window keeps: norms, projections and the MLP of every layer."""
    config = text_config(model)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    size = next(p.dtype for p in model.parameters() if p.is_floating_point()).itemsize
    return config.num_hidden_layers * tokens * (8 * hidden + 4 * inner) * size


# --- from text to artefact -------------------------------------------------------------------


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Sequence[str],
    preset: str | Preset = "fisher2",
    *,
    tokens: int = 32_768,
    context: int = 2048,
    sinks: int = 4,
    window: int = 64,
    seed: int = 0,
    draws: int | None = None,
    targets: Sequence[float] = TARGETS,
    forms: Sequence[str] = FORMS,
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    statistics: str | Path | None = None,
    model_name: str | None = None,
    data_name: str = "text",
    progress: Progress | None = None,
) -> Artefact:
    """Fit `fisher` codes to a model on one or several texts.

    Args:
        model: a decoder model.
        tokenizer: its tokenizer.
        texts: what to read; windows are taken from them in turn.
        preset: whose bits and form are fitted besides `targets` and `forms`.
        tokens: how many to read at most, in whole windows.
        context: tokens of a window, cut to the model's limit and to `tokens`.
        sinks: first tokens of a sequence, which the cache keeps exact.
        window: most recent tokens, likewise.
        seed: of labels and samples.
        draws: sets of labels per window; by default `draws_for` the tokens.
        targets: code bits per element to fit tables for.
        forms: frames of the keys to fit them in.
        recipe: of the fit.
        statistics: a file for the statistics; a run that was stopped continues from it, and
            another fit starts from it at once.
        model_name: for the header, by default the config's.
        data_name: for the header.
        progress: called with passes done and passes in all.

    Raises:
        CalibrationError: too short a text, or nothing of `fisher` in the preset.
        UnsupportedError: see `collect`.
    """
    preset = get(preset)
    own = [c for c in (preset.keys, preset.values) if isinstance(c, Fisher)]
    if not own:
        raise CalibrationError(f"preset {preset.name!r} has no fisher codec to calibrate")
    texts = [texts] if isinstance(texts, str) else list(texts)
    windows = windows_of(model, tokenizer, texts, tokens, context, sinks + window)
    conditions = {
        "model": model_name or getattr(model.config, "_name_or_path", "") or "model",
        "tokens": windows.numel(),
        "context": windows.shape[1],
        "data": data_name,
        "data_sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
    }
    tile = own[0].tile
    found = collect(
        model,
        windows,
        sinks=sinks,
        window=window,
        tile=tile,
        draws=draws,
        seed=seed,
        conditions=conditions,
        resume=statistics,
        progress=progress,
    )
    codecs = list(dict.fromkeys([*own, *codecs_for(targets, forms, tile)]))
    device = next(model.parameters()).device
    return artefact(found, codecs, preset.name, recipe, device)


def artefact(
    statistics: Statistics,
    codecs: Sequence[Fisher],
    name: str = "fisher2",
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    device: torch.device | str = "cpu",
) -> Artefact:
    """Tables of several codecs from one set of statistics: seconds."""
    kept = ("model", "model_hash", "tokens", "context", "sinks", "window", "data", "data_sha256")
    header = {
        "format": FORMAT,
        "preset": name,
        "codecs": [codec.to_json() for codec in codecs],
        "kvfold": kvfold.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{key: statistics.header.get(key) for key in (*kept, "seed", "draws")},
    }
    return Artefact(header, Fit(statistics, recipe, device).tensors(codecs))


def windows_of(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    tokens: int,
    context: int,
    exact: int,
) -> Tensor:
    """`[windows, context]` token ids, from several texts in turn.

    Raises:
        CalibrationError: the texts have no whole window.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None) or context
    context = min(context, limit, tokens)
    rows = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        rows.append(ids[: len(ids) // context * context].view(-1, context))
    most = max(len(row) for row in rows)
    taken = [row[i] for i in range(most) for row in rows if i < len(row)][: tokens // context]
    if not taken or context <= exact + 1:
        raise CalibrationError(
            f"the text has no whole window of {context} tokens; calibration needs one at least, "
            f"longer than {exact + 1}"
        )
    return torch.stack(taken).long()
