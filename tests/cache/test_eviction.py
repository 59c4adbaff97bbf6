"""Budgets of pages, on host integers: what is kept, what goes first, what is never made."""

from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.cache.store import GROUP_ELEMENTS
from kvfold.cache.timeline import DROPPED, Budget, Timeline
from tests.cache.test_store import feed, make_store
from tests.cache.test_timeline import advance


def held(timeline: Timeline) -> list[list[int]]:
    return [timeline.blocks(r) for r in range(timeline.rows)]


def test_trim_keeps_the_newest_pages_and_makes_no_others():
    timeline = Timeline(4, 16, 16, budget=Budget(trim=3))
    step = advance(timeline, 2, 4 + 16 + 16 * 8)
    assert held(timeline) == [[5, 6, 7]] * 2
    assert len(step.pages) == 6, "blocks that would go at once are not coded"
    advance(timeline, 2, 16)
    assert held(timeline) == [[6, 7, 8]] * 2
    assert timeline.lengths == [164, 164]
    assert timeline.now().first == (0, 0)


def test_trim_to_nothing_leaves_sinks_and_window():
    timeline = Timeline(4, 16, 16, budget=Budget(trim=0))
    for _ in range(200):
        advance(timeline, 1, 1)
    assert timeline.held == set()
    assert timeline.num_pages == 0


def decode(timeline: Timeline, worth: list[float], steps: int = 16) -> None:
    for _ in range(steps):
        timeline.commit(timeline.plan(timeline.rows, 1, None, None, lambda: worth))


def test_prune_drops_what_was_looked_at_least_and_spares_a_prompt_and_the_newest():
    timeline = Timeline(4, 16, 16, budget=Budget(prune=3))
    advance(timeline, 1, 4 + 16 + 16 * 5)
    assert held(timeline) == [[0, 1, 2, 3, 4]], "nothing has been observed yet"
    worth = [0.0] * timeline.num_pages
    for block, seen in enumerate((0.5, 0.1, 0.3, 0.2, inf)):
        worth[timeline.table[0][block]] = seen
    decode(timeline, worth)
    assert held(timeline) == [[0, 4, 5]]


def test_prune_on_demand():
    timeline = Timeline(4, 16, 16)
    advance(timeline, 2, 4 + 16 + 16 * 4)
    worth = [0.0] * timeline.num_pages
    for r, best in ((0, 1), (1, 2)):
        worth[timeline.table[r][best]] = 1.0
    timeline.prune(2, worth)
    assert held(timeline) == [[1, 3], [2, 3]], "of equals the older one goes"


@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=10),
    st.integers(1, 3),
    st.integers(3, 12),
    st.integers(1, 4),
)
def test_total_holds_at_every_step(chunks, rows, total, slab):
    timeline = Timeline(4, 16, 16, slab_blocks=slab, budget=Budget(total=total))
    for queries in chunks:
        advance(timeline, rows, queries)
        assert len(timeline.held) <= timeline.num_pages <= total
    assert all(len(row) == timeline.folded_at(sum(chunks)) for row in timeline.table)


def test_rows_that_share_a_page_lose_it_together():
    timeline = Timeline(4, 16, 16, slab_blocks=4, budget=Budget(total=4))
    advance(timeline, 1, 4 + 16 + 16 * 4)
    timeline.select([0, 0])
    assert len(timeline.held) == 4
    advance(timeline, 2, 16)
    assert held(timeline) == [[2, 3, 4]] * 2, "two shared pages, and one of each row"
    assert timeline.table[0][2:4] == timeline.table[1][2:4]
    assert timeline.table[0][4] != timeline.table[1][4]
    assert timeline.table[0][0] == DROPPED


def test_mass_of_pages_is_the_attention_they_got(monkeypatch):
    monkeypatch.setitem(GROUP_ELEMENTS, "cpu", 1)  # a page at a time, under a rising top
    torch.manual_seed(9)
    keys, values = torch.randn(2, 2, 2, 500, 64) * 2
    store = make_store("identity", Timeline(4, 64, 128, budget=Budget(prune=9)))
    feed(store, keys[:, :, :499], values[:, :, :499], [499])
    step = store.timeline.plan(2, 1, None, None)
    view = store.append(keys[:, :, 499:], values[:, :, 499:], step)
    from kvfold.attention.paged import attend

    q = torch.randn(2, 4, 1, 64)
    for _ in range(2):
        attend(q, view, scaling=0.125)
    p = (q @ keys.repeat_interleave(2, 1).mT * 0.125).softmax(-1).mean((1, 2))
    assert store.mass is not None
    for r in range(2):
        for m in range(3):
            found = store.mass[store.timeline.table[r][m]]
            share = p[r, 4 + 128 * m : 4 + 128 * (m + 1)].sum()
            assert found[1] == 2
            assert abs(found[0] / 2 - share) < 1e-5, (r, m, found, share)


@pytest.mark.parametrize("slab", [1, 4])
def test_a_page_that_is_made_anew_has_no_mass(slab):
    store = make_store("int8", Timeline(4, 16, 16, slab, budget=Budget(trim=2, prune=9)))
    keys, values = torch.randn(2, 1, 2, 100, 64)
    feed(store, keys, values, [100])
    assert store.mass is not None
    store.mass.fill_(1.0)
    step = store.timeline.plan(1, 16, None, None)
    store.append(keys[:, :, :16], values[:, :, :16], step)
    assert [store.mass[n].tolist() for _, _, n in step.pages] == [[0.0, 0.0]]
