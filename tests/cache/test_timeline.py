"""The timeline: which token is a sink, hot or cold, checked against the rule by counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.cache.timeline import CacheError, Timeline


def advance(timeline: Timeline, rows: int, queries: int, valid=None, positions=None):
    step = timeline.plan(rows, queries, valid, positions)
    timeline.commit(step)
    return step


@given(
    st.integers(0, 6),
    st.integers(1, 40),
    st.sampled_from([16, 32]),
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
)
def test_folded_pages_follow_the_rule(sinks, window, block, chunks):
    timeline = Timeline(sinks, window, block)
    for queries in chunks:
        advance(timeline, 1, queries)
        length = timeline.lengths[0]
        # key j >= S is cold for query i exactly if S + B (floor((j - S) / B) + 1) <= i + 1 - W
        cold = sum(
            sinks + block * ((j - sinks) // block + 1) <= length - window
            for j in range(sinks, length)
        )
        assert timeline.folded[0] * block == cold, (length, timeline.folded, cold)
        hot = length - sinks - cold
        assert hot <= window + block - 1, hot


def test_left_padding_gives_each_row_its_own_blocks():
    timeline = Timeline(4, 16, 16)
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[0, :25] = False
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    step = advance(timeline, 2, 60, valid, positions)
    assert step.count == (35, 60)
    assert timeline.folded == [0, 2]
    assert timeline.slots_of(0).tolist() == list(range(25, 60))
    assert timeline.first == [0, 0]
    # without position_ids the model counts slots: the row's token 0 stands at position 25
    timeline = Timeline(4, 16, 16)
    step = advance(timeline, 2, 60, valid)
    assert step.first == (25, 0)


def test_padding_in_the_middle_is_dropped_and_remembered():
    timeline = Timeline(0, 4, 16)
    advance(timeline, 1, 5)
    valid = torch.tensor([[True, False, False, True]])
    advance(timeline, 1, 4, valid, torch.tensor([[5, 0, 0, 6]]))
    assert timeline.lengths == [7]
    assert timeline.slots_of(0).tolist() == [0, 1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("keep", range(0, 200, 7))
def test_crop_keeps_the_first_slots(keep):
    timeline = Timeline(4, 16, 16)
    advance(timeline, 1, 200)
    assert timeline.folded == [11]
    reopened = timeline.crop(keep)
    whole = min(11, max(0, (keep - 4) // 16))
    assert timeline.lengths == [keep]
    assert timeline.folded == [whole]
    cut = whole < 11 and keep > 4 + 16 * whole
    assert reopened == ([(0, whole)] if cut else [])


def test_dropped_pages_are_used_again():
    timeline = Timeline(0, 16, 16, slab_blocks=2)
    for _ in range(20):
        advance(timeline, 1, 80)
        timeline.crop(16)
    assert timeline.num_pages <= 8, timeline.num_pages


def test_errors_name_what_was_asked_and_what_is_possible():
    timeline = Timeline(4, 16, 16, max_tokens=50)
    advance(timeline, 2, 10)
    with pytest.raises(CacheError, match="holds 2 rows and was given 3"):
        timeline.plan(3, 1, None, None)
    with pytest.raises(CacheError, match="continues at position 12, expected 10"):
        timeline.plan(2, 1, None, torch.tensor([[12]]))
    with pytest.raises(CacheError, match="do not rise by one"):
        timeline.plan(2, 3, None, torch.tensor([[10, 11, 11]]))
    with pytest.raises(CacheError, match="a pass of 0 rows and 5 tokens"):
        timeline.plan(0, 5, None, None)
    with pytest.raises(CacheError, match="multi-axis positions"):
        timeline.plan(2, 1, None, torch.zeros(3, 2, 1))
    with pytest.raises(CacheError, match="would reach 60 tokens; this cache holds at most 50"):
        timeline.plan(2, 50, None, None)


def test_compressed_share_counts_pairs():
    timeline = Timeline(4, 16, 16)
    advance(timeline, 1, 100)
    pairs = cold = 0
    for n in range(101, 140):
        advance(timeline, 1, 1)
        pairs += n
        cold += 16 * max(0, (n - 20) // 16)
    assert timeline.compressed_share() == cold / pairs


def test_dropped_blocks_keep_their_place_and_free_their_pages():
    timeline = Timeline(4, 16, 16, slab_blocks=2)
    advance(timeline, 1, 16 * 6 + 4 + 16)
    before = list(timeline.table[0])
    timeline.drop(0, [0, 1, 3])
    assert timeline.folded == [6]
    assert timeline.held == {before[2], before[4], before[5]}
    located = timeline.now().on(torch.device("cpu"), (6,))
    assert located.pages == [[(2, before[2]), (4, before[4]), (5, before[5])]]
    for _ in range(3 * 16):
        step = advance(timeline, 1, 1)
    assert timeline.num_pages == 6, "freed pages are taken before the pool grows"
    assert step.first == (0,)
    assert timeline.table[0][6:] == [before[0], before[1], before[3]]


@pytest.mark.parametrize("slots", [5, 19, 30])
def test_a_crop_through_a_dropped_block_is_refused_and_changes_nothing(slots):
    timeline = Timeline(4, 16, 16)
    advance(timeline, 1, 100)
    timeline.drop(0, [0, 1])
    before = timeline.generation, list(timeline.table[0]), timeline.lengths
    with pytest.raises(CacheError, match=rf"a crop to {slots} slots needs tokens .* dropped"):
        timeline.crop(slots)
    assert before == (timeline.generation, timeline.table[0], timeline.lengths)
    assert timeline.crop(20) == []
    assert timeline.lengths == [20]
