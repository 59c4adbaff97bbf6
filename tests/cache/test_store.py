"""One layer's store: the same bytes however blocks arrive, constant cost, honest sizes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvfold
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import CodecError, Site
from kvfold.transforms.rope import Rope

ROPE = Rope(tuple(1e4 ** (-i / 32) for i in range(32)))
PRESETS = list(kvfold.presets())


def make_store(name: str, timeline: Timeline, heads: int = 2, dim: int = 64) -> LayerStore:
    preset = kvfold.get(name)
    sites = (Site(s, heads, dim, timeline.block, rope=ROPE) for s in ("key", "value"))
    key, value = (
        codec.bind(site, codec.example(site) if codec.artefact == "required" else None)
        for codec, site in zip((preset.keys, preset.values), sites, strict=True)
    )
    return LayerStore(key, value, timeline)


def feed(store: LayerStore, keys, values, chunks, valid=None):
    at, view = 0, None
    for n in chunks:
        part = None if valid is None else valid[:, at : at + n]
        positions = None
        if valid is not None:
            positions = (valid.long().cumsum(1) - 1).clamp_min(0)[:, at : at + n]
        step = store.timeline.plan(keys.shape[0], n, part, positions)
        view = store.append(keys[:, :, at : at + n], values[:, :, at : at + n], step)
        store.timeline.commit(step)
        at += n
    return view


def stored_pages(store: LayerStore) -> list[torch.Tensor]:
    return [store.pool.gather(row) for row in store.timeline.table if row]


@pytest.mark.parametrize("name", PRESETS)
def test_bytes_do_not_depend_on_how_tokens_arrive(name):
    torch.manual_seed(7)
    keys, values = torch.randn(2, 2, 2, 530, 64)
    valid = torch.ones(2, 530, dtype=torch.bool)
    valid[1, :71] = False
    found = []
    for chunks in ([530], [100, 300, 130], [400] + [1] * 130):
        store = make_store(name, Timeline(4, 64, 128))
        feed(store, keys, values, chunks, valid)
        assert store.timeline.folded == [3, 3]
        found.append(stored_pages(store))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b), f"{(a != b).float().mean()} of the bytes differ"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["turboquant4", "kivi4-g32"])
def test_a_first_pass_folds_what_single_tokens_do(name, rows):
    """Without padding its blocks lie in a row in the pass, which is a way of its own."""
    keys, values = torch.randn(2, rows, 2, 530, 64, generator=torch.Generator().manual_seed(9))
    found = []
    for chunks in ([530], [70] + [1] * 460):
        store = make_store(name, Timeline(4, 64, 128))
        feed(store, keys, values, chunks)
        assert store.timeline.folded == [3] * rows
        found.append(torch.cat(stored_pages(store)))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", PRESETS)
def test_rows_do_not_see_each_other(name):
    torch.manual_seed(8)
    keys, values = torch.randn(2, 3, 2, 300, 64)
    together = make_store(name, Timeline(4, 64, 128))
    feed(together, keys, values, [300])
    for r in range(3):
        alone = make_store(name, Timeline(4, 64, 128))
        feed(alone, keys[r : r + 1], values[r : r + 1], [300])
        assert torch.equal(stored_pages(together)[r], stored_pages(alone)[0])


class Written(TorchDispatchMode):
    """Bytes of new storages: in all, the largest, and the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = self.live = self.peak = 0

    def _add(self, nbytes):
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                nbytes = t.untyped_storage().nbytes()
                self.total += nbytes
                self.largest = max(self.largest, nbytes)
                self._add(nbytes)
                weakref.finalize(t, self._add, -nbytes)
        return out


def test_appending_copies_the_same_at_any_length():
    """Bytes made by 128 appends (one fold among them) do not grow between 1k and 8k tokens."""
    store = make_store("kivi2-g64", Timeline(4, 64, 128))
    keys, values = torch.randn(2, 1, 2, 1, 64)
    made = {}
    for n in range(8200):
        step = store.timeline.plan(1, 1, None, None)
        if n in (1000, 8000):
            counter = Written()
            counter.__enter__()
        store.append(keys, values, step)
        if n in (1127, 8127):
            counter.__exit__(None, None, None)
            made[n] = counter.total
        store.timeline.commit(step)
    assert made[8127] <= made[1127] * 1.001, made


@pytest.mark.parametrize("name", ["kivi2-g64", "turboquant4", "rotatekv4"])
def test_no_second_copy_of_the_history_lives(name):
    """Folding 32k tokens and reading them: new storages beyond the packed pages stay far below."""
    length = 32_000
    keys, values = torch.randn(2, 1, 2, length + 1, 64)
    whole = keys.nbytes + values.nbytes
    store = make_store(name, Timeline(4, 64, 128))
    step = store.timeline.plan(1, length, None, None)
    with Written() as folding:
        store.append(keys[:, :, :length], values[:, :, :length], step)
    store.timeline.commit(step)
    packed = sum(slab.nbytes for slab in store.pool.slabs)
    assert folding.peak - packed < 0.5 * whole, (folding.peak, packed, whole)
    step = store.timeline.plan(1, 1, None, None)
    view = store.append(keys[:, :, length:], values[:, :, length:], step)
    from kvfold.attention.paged import attend

    with Written() as reading:
        attend(torch.randn(1, 4, 1, 64), view, scaling=0.125)
    assert reading.peak < 0.5 * whole, (reading.peak, whole)


@pytest.mark.parametrize("length", [500, 2000, 8000])
def test_nbytes_is_what_is_held(length):
    store = make_store("turboquant4", Timeline(4, 64, 128))
    keys, values = torch.randn(2, 1, 2, length, 64)
    feed(store, keys, values, [length])
    parts = store.nbytes(len(store.timeline.table[0]))
    held = [*store.pool.slabs, store.pool.addresses, store.exact_keys, store.exact_values]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held)}
    assert sum(parts.values()) == sum(storages.values())
    assert parts["pages"] == (length - 68) // 128 * store.layout.nbytes


def test_states_that_cannot_be_coded_are_refused_by_name():
    store = make_store("kivi4-g32", Timeline(4, 64, 128))
    keys, values = torch.randn(2, 1, 2, 300, 64)
    keys[0, 1, 50, 3] = float("nan")
    with pytest.raises(CodecError, match="layer 0: key_states contain NaN or Inf"):
        feed(store, keys, values, [300])
    keys[0, 1, 50, 3] = 1e6
    with pytest.raises(CodecError, match=r"magnitude of 1e\+06"):
        feed(make_store("kivi4-g32", Timeline(4, 64, 128)), keys, values, [300])
    wrong = torch.randn(1, 2, 9, 96)
    with pytest.raises(CodecError, match=r"key_states have shape \(1, 2, 9, 96\)"):
        feed(make_store("kivi4-g32", Timeline(4, 64, 128)), wrong, wrong, [9])
