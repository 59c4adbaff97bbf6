"""Top-k sparse attention on cold pages: a coarse score of every page chooses those that are read.

Page bounds as in Quest (arXiv:2406.10774) are blind here: over the 128 tokens of a page the fast
RoPE channels go round, and on the demo model they found half of the pairs where token scores found
all. So pages are ranked by token scores from the leading digit columns of their keys. Only the page
table of the view becomes shorter; what then attends need not know.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvfold.attention.paged import page_scores
from kvfold.cache.store import View
from kvfold.cache.timeline import Located
from kvfold.codec import BoundCodec, exact_math
from kvfold.packing import SECTIONS


def chosen(q: Tensor, view: View, scaling: float) -> View:
    """The view with at most `top_k` pages a row, for one query a row; others are left as they are.

    Args:
        q: post-RoPE queries `[rows, query_heads, queries, key_dim]`.
        view: what they may see.
        scaling: factor on the scores.
    """
    count = view.store.timeline.budget.top_k
    if count is None or q.shape[2] != 1 or not any(view.folded):
        return view
    located = view.on(q.device)
    if located.table.shape[1] <= count:
        return view
    best = weights(q, view, scaling).topk(count, 1).indices.sort(1).values
    # a row of fewer pages than others keeps its first entries: pages it lacks weigh nothing
    kept = Located(
        located.length,
        located.folded.clamp_max(count),
        located.first,
        located.table.gather(1, best),
        located.block.gather(1, best),
    )
    return replace(view, chosen=kept)


@exact_math
def weights(q: Tensor, view: View, scaling: float) -> Tensor:
    """`[rows, pages]`: estimated share of the cold attention, summed over query heads; -1 for none.

    Every head has a say of 1: one that looks at a single page is heard over those that look at all.
    """
    store = view.store
    rows, query_heads, _, dim = q.shape
    heads = store.key.site.num_kv_heads
    q = q.float().reshape(rows, heads, query_heads // heads, dim) * scaling
    skipped = trailing(store.key)
    shared = None if store.key.page_query else store.key.query(q, {}, view.tokens[:0])
    parts = []
    for pages in store.pages(view, store.group_blocks(rows)):
        coarse = {name: field for name, field in pages.keys.items() if name not in skipped}
        s = page_scores(q, shared, store.key, replace(pages, keys=coarse)).logsumexp(-1)
        parts.append(s.masked_fill(~pages.valid[:, :, None, None], -torch.inf))
    total = torch.cat(parts, 1)  # [rows, pages, heads, group]
    share = total.softmax(1).nan_to_num(0.0).sum((2, 3))
    return share.masked_fill(total[..., 0, 0] == -torch.inf, -1.0)


def trailing(key: BoundCodec) -> set[str]:
    """Names of the digit sections behind the first one; none where the code is not of digits."""
    if key.stored is None or key.stored.levels is not None:
        return set()
    names = {field.name for field in key.layout.fields}
    return set([f"digits{w}" for w in SECTIONS if f"digits{w}" in names][1:])
