"""Attention of new queries over a packed layer: pages are walked with an online softmax.

Portable torch in float32. The history is never decoded at once: extra memory is one group of
pages, and codes that attention can read (see `kvfold.codec`) are not decoded at all.
"""

import torch
from torch import Tensor

from kvfold.attention import workspace
from kvfold.cache.store import Pages, View
from kvfold.codec import BoundCodec, Query, Reading, Total, exact_math

#: elements of scores at a time: long passes over packed history go in chunks of queries.
SCORE_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
#: queries a row up to which reading codes is less work than decoding pages for them.
LONG = 16


def score(query: Query, reading: Reading) -> Tensor:
    """Scores `[pages, heads, queries, block_len]` of prepared queries against a reading of keys."""
    block_len, width = reading.columns.shape[2:]
    segments = query.columns.shape[2]
    columns = reading.columns.unflatten(2, (segments, block_len // segments)).mT
    groups = 1 if reading.gain is None else reading.gain.shape[-1]
    parts = []  # [n, H, segments, queries, tokens], a slice of columns for each group
    for g in range(groups):
        part = slice(g * width // groups, (g + 1) * width // groups)
        s = query.columns[..., part] @ columns[..., part, :]
        if query.gain is not None:
            s = s + query.gain[..., g : g + 1]
        if reading.gain is not None:
            s = s * reading.gain[..., g].unflatten(-1, (segments, -1)).unsqueeze(-2)
        parts.append(s)
    total = parts[0] if groups == 1 else torch.stack(parts).sum(0)
    out = total.transpose(2, 3).flatten(-2)
    if query.offset is not None and reading.offset is not None:
        out = out + query.offset @ reading.offset.mT
    return out if query.mean is None else out + query.mean


def accumulate(p: Tensor, reading: Reading) -> Total:
    """Weighted sums over tokens of a reading of values; p `[pages, heads, queries, block_len]`."""
    one = p.sum(-1, keepdim=True)
    if reading.gain is None:
        columns, gain = p @ reading.columns, one
    else:
        groups = reading.gain.shape[-1]
        weighted = p.unsqueeze(-2) * reading.gain.mT.unsqueeze(2)  # [n, H, queries, groups, B]
        gain = weighted.sum(-1)
        columns = torch.cat(
            [
                weighted[..., g, :] @ part
                for g, part in enumerate(reading.columns.chunk(groups, -1))
            ],
            -1,
        )
    offset = torch.zeros_like(gain) if reading.offset is None else p @ reading.offset
    return Total(columns, gain, offset, one)


@exact_math
def attend(
    q: Tensor,
    view: View,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention output `[rows, query_heads, queries, value_dim]` in float32, without gradients.

    Args:
        q: post-RoPE queries `[rows, query_heads, queries, key_dim]`.
        view: what the queries may see; they attend causally by token index.
        scaling: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sink_logits: `[query_heads]` logits that take part in the softmax and carry no value
            (GPT-OSS).
    """
    rows, query_heads, queries, _ = q.shape
    budget = SCORE_ELEMENTS.get(q.device.type, 1 << 23)
    chunk = max(1, budget // (rows * query_heads * max(view.tokens.shape[1], view.store.ring_len)))
    cold = None
    if workspace.serves(q, view, softcap, LONG):
        cold = workspace.attend(q, view, scaling)
    out = [
        _attend(q[:, :, a : a + chunk], view, a, scaling, softcap, sink_logits, budget, cold)
        for a in range(0, queries, chunk)
    ]
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _attend(
    q: Tensor,
    view: View,
    start: int,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    budget: int,
    cold: "workspace.Cold | None",
) -> Tensor:
    """`attend` for the queries from `start` on, as many as `q` has; `cold` has been read before."""
    store = view.store
    rows, query_heads, queries, _ = q.shape
    query_tokens = view.query_tokens[:, start : start + queries]
    heads = store.key.site.num_kv_heads
    group = query_heads // heads
    # [rows, heads, group * queries, dim]: a group's query heads share their key/value head
    q = q.float().reshape(rows, heads, group * queries, -1) * scaling

    def cap(s: Tensor) -> Tensor:
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    seen = (view.tokens[:, None, :] >= 0) & (view.tokens[:, None, :] <= query_tokens[:, :, None])
    window = store.sliding_window
    if window is not None:
        seen &= view.tokens[:, None, :] > query_tokens[:, :, None] - window
    seen = seen.repeat(1, group, 1)[:, None]  # [rows, 1, group * queries, exact]
    s = cap(q @ view.keys.float().mT).masked_fill(~seen, -torch.inf)
    top = s.amax(-1, keepdim=True)
    extra = None
    if sink_logits is not None:
        extra = sink_logits.float().reshape(heads, group, 1).expand(-1, -1, queries)
        extra = extra.reshape(1, heads, group * queries, 1)
        top = torch.maximum(top, extra)
    # a padding query sees nothing: its top stays finite so that it gives zeros, not NaN
    top = top.clamp_min(torch.finfo(torch.float32).min)
    p = (s - top).exp()
    norm = p.sum(-1, keepdim=True)
    if extra is not None:
        norm = norm + (extra - top).exp()
    out = p @ view.values.float()

    is_query = (query_tokens >= 0).repeat(1, group)[:, None, :, None]
    if cold is not None:
        found, lse = cold.of(start, start + queries)
        lse = lse.masked_fill(~is_query, -torch.inf)
        higher = torch.maximum(top, lse)
        shrink, weight = (top - higher).exp(), (lse - higher).exp()
        out, norm, top = out * shrink + found * weight, norm * shrink + weight, higher
    done = 0 if cold is None else cold.pages
    most = view.on(q.device).table.shape[1] if any(view.folded) else 0
    seen_by: list[tuple[Tensor, Tensor]] = []  # weights of pages, and the top they are below
    if most > done:
        fitting = budget // (s[..., 0].numel() * store.timeline.block)
        step = max(1, min(store.group_blocks(rows), fitting))
        total: Total | None = None
        first = torch.tensor(view.step.first, device=q.device)
        shared = None if store.key.page_query else store.key.query(q, {}, view.tokens[:0])
        for pages in store.pages(view, step, done):
            s = cap(page_scores(q, shared, store.key, pages))  # [rows, blocks, heads, M, B]
            s = s.masked_fill(~pages.valid[:, :, None, None, None], -torch.inf)
            s = s.masked_fill(~is_query[:, None], -torch.inf)
            if window is not None:
                tokens = pages.positions.unflatten(0, (rows, -1)) - first[:, None, None]
                behind = tokens[:, :, None] <= (query_tokens - window)[:, None, :, None]
                s = s.masked_fill(behind.repeat(1, 1, group, 1)[:, :, None], -torch.inf)
            higher = torch.maximum(top, s.amax((1, 4)).unsqueeze(-1))
            p = (s - higher[:, None]).exp()
            if store.mass is not None:
                seen_by.append((p.sum(-1), higher))
            sums = accumulate(p.flatten(0, 1), store.value.read(pages.values, pages.positions))
            sums = _map(sums, lambda t: t.unflatten(0, (rows, -1)).sum(1))
            shrink = (top - higher).exp()
            if total is not None:
                sums = Total(
                    sums.columns + total.columns * shrink,
                    sums.gain + total.gain * shrink,
                    sums.offset + total.offset * shrink,
                    sums.one + total.one * shrink,
                )
            total, out, norm, top = sums, out * shrink, norm * shrink, higher
        assert total is not None
        out = out + store.value.output(total)
        norm = norm + total.one
    norm = torch.where(norm > 0, norm, 1.0)
    if seen_by:
        store.observe(view, _mass(seen_by, top, norm, query_heads, query_tokens >= 0))
    out = out / norm
    return out.reshape(rows, query_heads, queries, -1)


def _mass(
    parts: list[tuple[Tensor, Tensor]], top: Tensor, norm: Tensor, query_heads: int, real: Tensor
) -> Tensor:
    """`[rows, pages, 2]` mean over query heads of the weight of each page, and queries.

    Args:
        parts: for each group of pages, weights `[rows, pages, heads, M]` below a top
            `[rows, heads, M, 1]`.
        top: the last one.
        norm: sum of all weights below it, likewise.
        query_heads: over which the mean is taken.
        real: `[rows, queries]` False where a query is padding.
    """
    share = [(p.unsqueeze(-1) * ((t - top).exp() / norm)[:, None]).sum((2, 3, 4)) for p, t in parts]
    mass = torch.cat(share, 1) / query_heads
    return torch.stack((mass, real.sum(1, keepdim=True).expand_as(mass)), -1)


def page_scores(q: Tensor, shared: Query | None, key: BoundCodec, pages: Pages) -> Tensor:
    """Scores `[rows, blocks, heads, queries, block_len]` of a group of pages."""
    rows, blocks = pages.valid.shape
    if shared is None:
        query = key.query(q.repeat_interleave(blocks, 0), pages.keys, pages.positions)
    else:
        query = _map(shared, lambda t: t.repeat_interleave(blocks, 0))
    return score(query, key.read(pages.keys, pages.positions)).unflatten(0, (rows, blocks))


def _map(record, function):
    return type(record)(*(None if t is None else function(t) for t in vars(record).values()))
