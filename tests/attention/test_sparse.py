"""Top-k pages: which are chosen, and that what attends reads only those."""

import pytest
import torch

import kvfold
from kvfold.attention import sparse
from kvfold.attention.dispatch import attend
from kvfold.attention.oracle import oracle
from kvfold.attention.paged import attend as walk
from kvfold.cache.timeline import Budget, Timeline
from tests.attention.test_paged import error
from tests.cache.test_store import PRESETS, feed, make_store


def one_step(name, budget, length=900, pad=0):
    torch.manual_seed(21)
    keys, values = torch.randn(2, 2, 2, length, 64)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :pad] = False
    store = make_store(name, Timeline(4, 64, 128, budget=budget))
    return keys, feed(store, keys, values, [length - 1, 1], valid)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_chosen_is_what_is_read(name):
    _, view = one_step(name, Budget(top_k=2), pad=500)
    q = torch.randn(2, 8, 1, 64)
    few = sparse.chosen(q, view, 0.125)
    assert few.has_holes
    assert [len(row) for row in few.on(q.device).pages] == [2, 2]
    found = attend(q, view, scaling=0.125)
    walked = walk(q, few, scaling=0.125)
    assert error(found, walked) < 1e-5, error(found, walked)
    wanted = oracle(q, few, scaling=0.125)
    assert error(found, wanted) < 1e-5, error(found, wanted)
    assert error(found, oracle(q, view, scaling=0.125)) > 1e-3, "everything was read"


@pytest.mark.parametrize("name", ["identity", "kivi4-g64", "turboquant3", "fisher3"])
def test_the_page_that_matters_is_found(name):
    _, view = one_step(name, Budget(top_k=1))
    # a key of page 2 in row 0, of page 5 in row 1, is asked for
    at = torch.tensor([4 + 2 * 128 + 7, 4 + 5 * 128 + 100])
    decoded, _ = view.store.decoded(view, torch.float32)
    q = torch.stack([decoded[r, :, a] for r, a in enumerate(at)])[:, :, None].repeat(1, 2, 1, 1) * 4
    few = sparse.chosen(q, view, 0.125)
    assert [[m for m, _ in row] for row in few.on(q.device).pages] == [[2], [5]]


def test_short_rows_keep_what_they_have_and_long_passes_read_everything():
    _, view = one_step("int8", Budget(top_k=3), pad=600)
    few = sparse.chosen(torch.randn(2, 4, 1, 64), view, 0.125)
    blocks = [[m for m, _ in row] for row in few.on(torch.device("cpu")).pages]
    assert blocks[0] == [0], blocks
    assert len(blocks[1]) == 3
    assert sparse.chosen(torch.randn(2, 4, 2, 64), view, 0.125) is view
    _, whole = one_step("int8", Budget())
    assert sparse.chosen(torch.randn(2, 4, 1, 64), whole, 0.125) is whole


@pytest.mark.parametrize("name", list(kvfold.presets()))
def test_coarse_weights_are_near_the_exact_ones(name):
    """Leading digits alone weigh pages nearly as all do; codes of one section do so exactly."""
    _, view = one_step(name, Budget(top_k=1))
    q = torch.randn(2, 8, 1, 64) * 4
    coarse = sparse.weights(q, view, 0.125)
    skipped = sparse.trailing(view.store.key)
    decoded, _ = view.store.decoded(view, torch.float32)
    s = (q.unflatten(1, (2, 4)) @ decoded[:, :, None].mT * 0.125)[..., 4 : 4 + 6 * 128]
    exact = s.unflatten(-1, (6, 128)).logsumexp(-1).softmax(-1).sum((1, 2, 3))
    worst = (coarse - exact).abs().max().item()
    assert worst < (2.0 if skipped else 1e-3), (worst, skipped)
    assert abs(coarse.sum().item() - 2 * 8) < 1e-3
