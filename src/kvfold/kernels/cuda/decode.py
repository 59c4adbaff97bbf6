"""The launches of a layer's attention by the kernels here: prepare, send or none, attend, merge.

Their workspace holds, for each place (row, tile of queries and KV head), what the launches hand on:
queries in the units of columns, products with the mean, and a record for each program that has
pages of a place (`common.cuh` says which).
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.timeline import Located, upload
from kvfold.kernels import cuda
from kvfold.kernels.triton.prepare import power_of_two

LOG2E = 1.4426950408889634


@dataclass
class Work:
    """Device memory of the launches, shared by all layers that need the same."""

    programs: int  #: of `attend.cu`
    costs: Tensor  #: int32 `[heads + 1]` what pages of all heads before cost
    start_cost: int  #: to begin at a row and head
    exact_cost: int  #: of an item of exact tokens
    exact_splits: int
    sms: int  #: multiprocessors
    sent: bool  #: whether the launch before attention makes the queries that hold for all pages
    query: Tensor  #: `[places, pages, 1 or 0, ...]` 16-bit words
    means: Tensor
    sums: Tensor  #: `[programs + places, m, columns]`
    state: Tensor
    exact: Tensor
    exact_state: Tensor


_WORK: dict[tuple[object, ...], Work] = {}


def _work(
    layer: Any, rows: int, tiles: int, m: int, mean_n: int, capacity: int, exact: int,
    device: torch.device,
) -> Work:  # fmt: skip
    c = layer.constants
    held = power_of_two(capacity) if capacity else 0  # few sizes, not one a page
    cut, query_bytes = cuda.shared(layer, m, mean_n), cuda.query_bytes(layer, m)
    key = (
        device, rows, tiles, m, held, exact, layer.heads, layer.block, layer.value_dim, layer.cost,
        layer.decoder is None, cut, query_bytes, layer.value.columns, c["V_GROUPS"],
        c["PAGED"], c["MEAN"], cuda.made(layer),
    )  # fmt: skip
    if key in _WORK:
        return _WORK[key]
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    exact_splits, places = -(-exact // cuda.EXACT_TOKENS), rows * tiles * layer.heads
    sent = held > 0 and cuda.sends(layer, places, sms)
    programs, costs, start = cuda.cut_for(layer, rows * tiles, held, exact_splits, cut, sms)
    before = upload(torch.tensor([0, *accumulate(costs)], dtype=torch.int32), device)
    pages, groups = max(held, 1), int(c["V_GROUPS"])
    apart = cuda.prepares(layer)  # a launch that hands on what pages have of their own
    paged = apart and bool(c["PAGED"])

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    half = torch.float16
    with torch.inference_mode(False):
        _WORK[key] = Work(
            programs,
            before,
            start,
            cuda.exact_cost(costs),
            exact_splits,
            sms,
            sent,
            empty(places, pages if paged else int(sent), query_bytes // 2, dtype=half),
            empty(places, held if apart and c["MEAN"] else 0, layer.block, mean_n, dtype=half),
            empty(programs + places, m, layer.value.columns),
            empty(programs + places, 2 + 2 * groups, m),
            empty(places, exact_splits, m, layer.value_dim),
            empty(places, exact_splits, 2, m),
        )
    return _WORK[key]


def decode(
    q: Tensor, layer: Any, exact_keys: Tensor, exact_values: Tensor, tokens: Tensor,
    query_tokens: Tensor, located: Located, *, scaling: float, softcap: float | None,
    sink_logits: Tensor | None, out: Tensor,
) -> Tensor:  # fmt: skip
    """What `kvfold.kernels.triton.decode.decode` computes, with its arguments, into `out`."""
    if sink_logits is not None:  # here, as a launch between those below keeps them from overlapping
        sink_logits = sink_logits.to(q.dtype)
    rows, query_heads, queries, _ = q.shape
    group = query_heads // layer.heads
    m = min(cuda.TILE, group * queries)
    tiles = -(-group * queries // m)
    mean_n = max(2, power_of_two(m))
    exact, capacity = exact_keys.shape[2], located.table.shape[1]
    if layer.served is not None and cuda.many(rows * tiles * layer.heads * capacity, q.device):
        layer = layer.served
    work = _work(layer, rows, tiles, m, mean_n, capacity, exact, q.device)
    places = rows * tiles * layer.heads
    key, value, none = layer.key, layer.value, layer.table
    scale = float(scaling) * LOG2E
    turn = layer.rope if layer.rope is not None else none
    if capacity and cuda.prepares(layer):
        arguments = (
            q, layer.table, layer.native.tables, *tables(layer),
            turn, located.block, located.folded, located.first, work.query, work.means,
            capacity, query_heads, queries, group, tiles, layer.sinks,
        )  # fmt: skip
        cuda.prepare(
            layer, places, capacity, work.sms, arguments, (scale, 2.0**-key.exponent),
            m=m, mean_n=mean_n, dtype=q.dtype,
        )  # fmt: skip
    elif work.sent:
        arguments = q, layer.table, *tables(layer), work.query, query_heads, queries, group, tiles
        factors = scale, 2.0**-key.exponent
        cuda.send(layer, places, arguments, factors, m=m, dtype=q.dtype)
    turns = (turn,) if cuda.made(layer) else ()
    arguments = (
        layer.table, work.costs, located.folded, located.table, layer.pool.addresses, capacity,
        layer.pool.slab_pages, layer.page_bytes, work.query, work.means,
        q, exact_keys, exact_values, tokens, query_tokens, exact, rows, query_heads, queries, group,
        tiles, scale, (softcap or 0.0) * LOG2E, work.sums, work.state, work.exact,
        work.exact_state, work.exact_splits, *tables(layer), *turns, located.block,
        located.first, layer.sinks, 2.0 ** -(layer.decoder or key).exponent,
        work.start_cost, work.exact_cost,
    )  # fmt: skip
    cuda.attend(
        layer, work.programs, arguments,
        m=m, mean_n=mean_n, cap=softcap is not None, dtype=q.dtype, once=tiles == 1,
        sent=work.sent,
    )  # fmt: skip
    offset, mean = value.operand.offset, value.operand.mean
    arguments = (
        work.sums, work.state, work.exact, work.exact_state, located.folded, work.costs,
        value.matrix, value.gain, value.center,
        offset if offset is not None else none, mean if mean is not None else none,
        sink_logits if sink_logits is not None else none, query_tokens, out,
        rows, work.exact_splits, work.start_cost, work.exact_cost, work.programs,
        cuda.inverse(work.programs), query_heads, queries, group, tiles,
    )  # fmt: skip
    cuda.merge(
        layer, places, arguments, 2.0**-value.exponent,
        m=m, sms=work.sms, sink_logits=sink_logits is not None, dtype=q.dtype,
    )  # fmt: skip
    return out


def tables(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Those that keys are decoded with, or that columns' queries are made with."""
    by, native = layer.decoder, layer.native
    if by is not None:
        return by.heads, by.turns, by.channels
    own = layer.table if native.own is None else native.own  # any, where it is not read
    return own, native.centers, native.about
