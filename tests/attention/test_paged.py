"""The page walk against the oracle, on the same stored bytes."""

import pytest
import torch

from kvfold.attention.oracle import oracle
from kvfold.attention.paged import attend
from kvfold.cache.timeline import Timeline
from tests.cache.test_store import PRESETS, Written, feed, make_store


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("chunks", [[500, 1], [300, 200, 9], [130] + [1] * 80])
def test_attend_equals_the_oracle(name, chunks):
    torch.manual_seed(3)
    n = sum(chunks)
    keys, values = torch.randn(2, 2, 2, n, 64) * 2
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0, :45] = False
    store = make_store(name, Timeline(4, 64, 128))
    view = feed(store, keys, values, chunks, valid)
    q = torch.randn(2, 8, chunks[-1], 64)
    found = attend(q, view, scaling=0.125)
    wanted = oracle(q, view, scaling=0.125)
    assert max(view.folded) > 0 or chunks[0] == 130
    assert error(found, wanted) < 1e-5, error(found, wanted)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "group"), [(1, 8), (2, 4), (4, 1)])
@pytest.mark.parametrize("name", ["int8", "turboquant3", "rotatekv4", "polar-r3a3"])
def test_head_dims_and_groups(name, dim, heads, group):
    torch.manual_seed(4)
    keys, values = torch.randn(2, 1, heads, 421, dim)
    store = make_store(name, Timeline(4, 64, 128), heads, dim)
    view = feed(store, keys, values, [420, 1])
    q = torch.randn(1, heads * group, 1, dim)
    found, wanted = (f(q, view, scaling=dim**-0.5) for f in (attend, oracle))
    assert error(found, wanted) < 1e-5, error(found, wanted)


def test_softcap_and_sink_logits():
    torch.manual_seed(5)
    keys, values = torch.randn(2, 1, 2, 421, 64) * 3
    view = feed(make_store("int8", Timeline(4, 64, 128)), keys, values, [400, 21])
    q = torch.randn(1, 8, 21, 64)
    more = {"scaling": 0.125, "softcap": 5.0, "sink_logits": torch.randn(8)}
    found, wanted = attend(q, view, **more), oracle(q, view, **more)
    assert error(found, wanted) < 1e-5, error(found, wanted)
    plain = attend(q, view, scaling=0.125)
    assert error(found, plain) > 0.05, "soft-cap and sinks did nothing"


def test_padding_queries_give_zeros():
    keys, values = torch.randn(2, 2, 2, 300, 64)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, 250:260] = False
    store = make_store("int8", Timeline(4, 64, 128))
    view = feed(store, keys, values, [240, 60], valid)
    out = attend(torch.randn(2, 4, 60, 64), view, scaling=0.125)
    assert torch.isfinite(out).all()
    assert out[1, :, 10:20].abs().max() == 0
    assert out[0, :, 10:20].abs().min() > 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_history_is_never_decoded_at_once(name):
    """The largest tensor of a decode step is a page group: at 32k tokens a third of the history."""
    length = 32_000
    keys, values = torch.randn(2, 1, 2, length + 1, 64)
    store = make_store(name, Timeline(4, 64, 128))
    view = feed(store, keys, values, [length, 1])
    counter = Written()
    with counter:
        attend(torch.randn(1, 4, 1, 64), view, scaling=0.125)
    whole = 2 * length * 64 * 4
    assert counter.largest < whole / 3, (counter.largest, whole)


@pytest.mark.parametrize("name", ["identity", "fisher2", "kivi2-g64", "turboquant3"])
def test_dropped_pages_are_read_by_nobody(name):
    """The oracle leaves their tokens out, and so does softmax attention over what is left."""
    torch.manual_seed(6)
    keys, values = torch.randn(2, 2, 2, 700, 64) * 2
    valid = torch.ones(2, 700, dtype=torch.bool)
    valid[0, :45] = False
    store = make_store(name, Timeline(4, 64, 128))
    feed(store, keys, values, [650], valid)
    store.timeline.drop(0, [1, 2])
    store.timeline.drop(1, [0])
    step = store.timeline.plan(2, 50, None, torch.tensor([[605], [650]]) + torch.arange(50))
    view = store.append(keys[:, :, 650:], values[:, :, 650:], step)
    assert view.has_holes
    q = torch.randn(2, 8, 50, 64)
    found, wanted = attend(q, view, scaling=0.125), oracle(q, view, scaling=0.125)
    assert error(found, wanted) < 1e-5, error(found, wanted)
    seen = torch.ones(2, 1, 50, 700, dtype=torch.bool).tril(650)
    seen[0, ..., :45] = False
    seen[0, ..., 45 + 4 + 128 : 45 + 4 + 3 * 128] = False
    seen[1, ..., 4 : 4 + 128] = False
    full = torch.nn.functional.scaled_dot_product_attention(
        q, keys.repeat_interleave(4, 1), values.repeat_interleave(4, 1), seen
    )
    if name == "identity":
        assert error(found, full) < 1e-5, error(found, full)


def test_a_kernel_that_does_not_know_of_holes_is_not_asked(monkeypatch):
    from types import ModuleType

    from kvfold.attention import dispatch

    store = make_store("int8", Timeline(4, 64, 128))
    keys, values = torch.randn(2, 1, 2, 501, 64)
    feed(store, keys, values, [500])
    store.timeline.drop(0, [1])
    view = store.append(keys[:, :, 500:], values[:, :, 500:], store.timeline.plan(1, 1, None, None))
    kernel = ModuleType("kernel")
    kernel.refuses = lambda q, view: None
    kernel.attend = lambda *args, **more: None
    kernel.tables_of = lambda store: None
    monkeypatch.setattr(dispatch, "import_module", lambda name: kernel)
    monkeypatch.setitem(dispatch.KERNELS, "cpu", "kernel")
    q = torch.randn(1, 4, 1, 64)
    assert dispatch.path(q, view) == (None, "kernel reads no rows with dropped pages")
    kernel.HOLES = True
    assert dispatch.path(q, view) == (kernel, "kernel")
