"""Long passes over packed history: pages are decoded once, range by range, for flash attention.

A pass of many queries (chunked prefill, the next turn of a chat) reads every page so often that
decoding it pays: a range of pages becomes keys and values in the model's dtype, torch's flash
attention reads them, and the ranges are merged by their log-sum-exp. Extra memory is one range.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.store import View

#: device types whose long passes go this way; elsewhere reading codes is as good.
DEVICES = {"cuda"}
#: what flash attention on CUDA takes.
DTYPES = {torch.float16, torch.bfloat16}
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Cold:
    """Attention of all queries on the first pages of each row, before the exact tokens.

    Args:
        pages: pages of each row that it covers.
        out: float32 `[rows, heads, group, queries, value_dim]`, its weights summing to one.
        lse: float32 `[rows, heads, group, queries, 1]` log of the sum of weights.
    """

    pages: int
    out: Tensor
    lse: Tensor

    def of(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of some queries, groups and queries in one axis."""
        part = slice(start, stop)
        return self.out[:, :, :, part].flatten(2, 3), self.lse[:, :, :, part].flatten(2, 3)


def serves(q: Tensor, view: View, softcap: float | None, least: int) -> bool:
    """Whether a pass goes this way: long, on CUDA, with nothing that flash attention lacks."""
    store = view.store
    dims = {store.key.site.head_dim, store.value.site.head_dim}
    return (
        q.device.type in DEVICES
        and (q.device.type != "cuda" or q.dtype in DTYPES)
        and q.shape[2] > least
        and softcap is None
        and store.mass is None
        and store.sliding_window is None
        and len(dims) == 1
        and max(dims) <= MAX_HEAD_DIM
        and covered(view, q.device) > 0
    )


def covered(view: View, device: torch.device) -> int:
    """Pages that every row has: the ranges that all rows read together."""
    return min(map(len, view.on(device).pages)) if any(view.folded) else 0


def attend(q: Tensor, view: View, scaling: float) -> Cold:
    """Attention of `q` `[rows, query_heads, queries, key_dim]` on the pages that all rows have."""
    store = view.store
    rows, query_heads, queries, dim = q.shape
    heads = store.key.site.num_kv_heads
    pages = covered(view, q.device)
    # every query sees every page: the query heads of a group are so many more queries
    q = q.reshape(rows, heads, query_heads // heads * queries, dim)
    step = store.group_blocks(rows)
    out = lse = None
    for group in store.pages(view, step, high=pages):
        keys, values = (
            bound.decode(fields, group.positions)
            .to(q.dtype)
            .unflatten(0, (rows, -1))
            .transpose(1, 2)
            .flatten(2, 3)
            .contiguous()  # some codes decode to transposed tensors
            for bound, fields in ((store.key, group.keys), (store.value, group.values))
        )
        found, weight = _flash(q, keys, values, scaling)
        if out is None or lse is None:
            out, lse = found, weight
        else:
            both = torch.logaddexp(lse, weight)
            out = out * (lse - both).exp() + found * (weight - both).exp()
            lse = both
    assert out is not None
    assert lse is not None
    shape = (query_heads // heads, queries)
    return Cold(pages, out.unflatten(2, shape), lse.unflatten(2, shape))


def _flash(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention without a mask, and its log-sum-exp `[rows, heads, queries, 1]`; both float32."""
    ops: Any = torch.ops.aten
    if q.device.type == "cuda":
        found = ops._scaled_dot_product_flash_attention(q, keys, values, scale=scaling)
    else:
        found = ops._scaled_dot_product_flash_attention_for_cpu(q, keys, values, scale=scaling)
    return found[0].float(), found[1].float()[..., : q.shape[2], None]
