"""Long passes over decoded ranges of pages against the oracle, on torch's CPU flash attention."""

import pytest
import torch

from kvfold.attention import paged, workspace
from kvfold.attention.oracle import oracle
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from tests.attention.test_paged import error
from tests.cache.test_store import feed, make_store


@pytest.fixture
def read(monkeypatch):
    """Pages decoded for a workspace, while long passes go this way on the CPU, too."""
    found = []
    pages = LayerStore.pages

    def counted(self, view, count, low=0, high=None):
        for group in pages(self, view, count, low, high):
            found.append((low, low + group.valid.shape[1]))
            low = found[-1][1]
            yield group

    monkeypatch.setattr(workspace, "DEVICES", {"cpu"})
    monkeypatch.setattr(LayerStore, "pages", counted)
    monkeypatch.setattr(LayerStore, "group_blocks", lambda self, rows: 2)
    return found


@pytest.mark.parametrize("name", ["int8", "kivi4-g32", "turboquant3", "fisher2"])
@pytest.mark.parametrize("padded", [0, 45, 300])
def test_a_long_pass_equals_the_oracle(read, name, padded):
    """Rows of different page counts: what only one has is walked as ever."""
    torch.manual_seed(13)
    keys, values = torch.randn(2, 2, 2, 900, 64) * 2
    valid = torch.ones(2, 900, dtype=torch.bool)
    valid[0, :padded] = False
    valid[1, 880:885] = False
    store = make_store(name, Timeline(4, 64, 128))
    view = feed(store, keys, values, [800, 100], valid)
    assert workspace.serves(torch.randn(2, 8, 100, 64), view, None, paged.LONG)
    q = torch.randn(2, 8, 100, 64)
    more = {"scaling": 0.125, "sink_logits": torch.randn(8)}
    found, wanted = paged.attend(q, view, **more), oracle(q, view, **more)
    assert error(found, wanted) < 1e-5, error(found, wanted)
    assert found[1, :, 80:85].abs().max() == 0


def test_each_page_is_decoded_once(read, monkeypatch):
    """However many chunks of queries the exact part takes."""
    monkeypatch.setitem(paged.SCORE_ELEMENTS, "cpu", 1 << 15)
    keys, values = torch.randn(2, 1, 2, 900, 64)
    store = make_store("int8", Timeline(4, 64, 128))
    view = feed(store, keys, values, [800, 100])
    q = torch.randn(1, 4, 100, 64)
    read.clear()
    found, wanted = paged.attend(q, view, scaling=0.125), oracle(q, view, scaling=0.125)
    assert error(found, wanted) < 1e-5, error(found, wanted)
    assert read == [(0, 2), (2, 4), (4, 5)]


def test_who_does_not_go_this_way(read):
    keys, values = torch.randn(2, 1, 2, 900, 64)
    view = feed(make_store("int8", Timeline(4, 64, 128)), keys, values, [800, 100])
    q = torch.randn(1, 4, 100, 64)
    assert workspace.serves(q, view, None, 16)
    assert not workspace.serves(q, view, 30.0, 16)
    assert not workspace.serves(q[:, :, :8], view, None, 16)
    view.store.mass = torch.zeros(1)
    assert not workspace.serves(q, view, None, 16)
