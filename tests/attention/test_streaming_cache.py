"""Streaming semantics proven: the packed cache fed token by token is the parallel evaluation."""

import pytest
import torch

from kvfold.attention.paged import attend
from kvfold.attention.streaming import align, streaming_attention
from kvfold.cache.timeline import Timeline
from tests.cache.test_store import PRESETS, feed, make_store

TOKENS, PADS, SINKS, WINDOW, BLOCK = 280, 33, 4, 64, 64


@pytest.mark.parametrize("name", PRESETS)
def test_cache_fed_token_by_token_is_the_parallel_evaluation(name):
    """Within 1e-5 at every query of every row, one of them left-padded, on the same bytes."""
    torch.manual_seed(21)
    keys, values = torch.randn(2, 2, 2, TOKENS, 64)
    keys[..., 5] += 6  # an offset channel, as real keys have
    q = torch.randn(2, 6, TOKENS, 64)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[0, :PADS] = False
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    store = make_store(name, Timeline(SINKS, WINDOW, BLOCK))

    # the parallel evaluation takes rows with their tokens first
    order = torch.stack([torch.arange(TOKENS).roll(-PADS), torch.arange(TOKENS)])
    lengths = valid.sum(1)
    parallel = streaming_attention(
        align(q, order),
        align(keys, order),
        align(values, order),
        store.key,
        store.value,
        positions.gather(1, order),
        lengths,
        sinks=SINKS,
        window=WINDOW,
        block=BLOCK,
        scaling=0.125,
    )
    start = 170
    feed(store, keys[:, :, :start], values[:, :, :start], [start], valid[:, :start])
    worst = 0.0
    for t in range(start, TOKENS):
        step = store.timeline.plan(2, 1, None, positions[:, t : t + 1])
        view = store.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], step)
        store.timeline.commit(step)
        assert view.folded == tuple(max(0, (n - 68) // 64) for n in (t + 1 - PADS, t + 1))
        out = attend(q[:, :, t : t + 1], view, scaling=0.125)
        for r, n in ((0, t - PADS), (1, t)):
            wanted = parallel[r, :, n]
            worst = max(worst, ((out[r, :, 0] - wanted).norm() / wanted.norm()).item())
    assert store.timeline.folded == [2, 3]
    assert worst < 1e-5, worst


def test_the_comparison_sees_a_wrong_rule():
    """A window that is one token off is far beyond the bound: the test above can fail."""
    torch.manual_seed(22)
    keys, values, q = torch.randn(3, 1, 2, 300, 64)
    store = make_store("turboquant2", Timeline(SINKS, WINDOW, BLOCK))
    more = {"sinks": SINKS, "block": BLOCK, "scaling": 0.125}
    a, b = (
        streaming_attention(q, keys, values, store.key, store.value, window=w, **more)
        for w in (WINDOW, WINDOW + 1)
    )
    changed = ((a - b).norm(dim=-1) / b.norm(dim=-1)).amax((0, 1))
    assert changed[131] > 1e-2, changed[131]
