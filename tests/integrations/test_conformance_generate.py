"""Everything that generation does to a cache, for every preset.

`identity` gives the tokens or logits of the stock cache. A lossy preset gives in each layer what
torch's SDPA gives on the states that the same codes decode to (1e-5 in float32); that pages hold
what they should after any operation is shown in test_stateful.py.
"""

import copy
import json
import pickle
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import DynamicCache

import kvfold
from kvfold.cache.config import CacheConfig
from kvfold.cache.timeline import CacheError

from .catalogue import FIVE, LOSSY, PRESETS, Checked, folded
from .conftest import tiny_llama

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
#: tokens at which the second page of a row has just been folded: sinks, window, two blocks
FOLDS = 4 + 64 + 2 * 128


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2, eos_token_id=2)


@pytest.fixture(scope="module")
def assistant():
    return tiny_llama(num_hidden_layers=1, eos_token_id=2, initializer_range=0.03)


@pytest.fixture
def checked(monkeypatch):
    return Checked(monkeypatch)


def tokens(rows, count, seed=21):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (rows, count), generator=generator)


def left_padding(rows, count):
    """A mask that pads the rows by 0, 29, 58, ... tokens."""
    mask = torch.ones(rows, count, dtype=torch.long)
    for r in range(rows):
        mask[r, : 29 * r] = 0
    return mask


def generate(model, ids, cache=None, mask=None, count=24, **more):
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    knobs = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, **more}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **knobs)


def looked_up(rows):
    """A prompt that repeats itself, so that prompt lookup finds something."""
    return tokens(rows, 60).repeat(1, 5)[:, :290]


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "assisted": {"assistant_model": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "chunked prefill": {"prefill_chunk_size": 70},
}
ONE_ROW = ("assisted", "prompt lookup")


def mode_of(name, assistant):
    more = dict(MODES[name])
    if "assistant_model" in more:
        more["assistant_model"] = assistant
    return more


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_identity_gives_the_stock_tokens(model, assistant, mode, padded):
    rows = 1 if mode in ONE_ROW else 2
    ids = looked_up(rows)
    mask = left_padding(rows + 1, 290)[1:] if padded else None
    more = mode_of(mode, assistant)
    cache = folded(model, "identity")
    ours = generate(model, ids, cache, mask, **more)
    assert torch.equal(ours, generate(model, ids, None, mask, **more))
    assert cache.compressed_share() > 0.1


@pytest.mark.parametrize("rows", range(1, 6))
def test_identity_in_batches_with_left_padding(model, rows):
    ids, mask = tokens(rows, 330), left_padding(rows, 330)
    ours = generate(model, ids, folded(model, "identity"), mask)
    assert torch.equal(ours, generate(model, ids, None, mask))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_presets_read_their_codes_in_every_mode(model, assistant, checked, name, mode):
    rows = 1 if mode in ONE_ROW else 2
    cache = folded(model, name)
    generate(model, looked_up(rows), cache, **mode_of(mode, assistant), count=12)
    assert cache.compressed_share() > 0.25
    assert (worst := checked.worst()) < 1e-5, worst


@pytest.mark.parametrize("rows", range(1, 6))
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_presets_in_batches_with_left_padding(model, checked, name, rows):
    generate(model, tokens(rows, 330), folded(model, name), left_padding(rows, 330), count=6)
    assert (worst := checked.worst()) < 1e-5, worst


# --- crop ------------------------------------------------------------------------------------


def go_on(model, cache, mask=None):
    """Logits of two passes: one token, then five."""
    held, out = cache.get_seq_length(), []
    with torch.no_grad():
        for part in tokens(1 if mask is None else len(mask), 6, seed=33).split([1, 5], 1):
            more = {}
            held += part.shape[1]
            if mask is not None:
                full = torch.ones(len(mask), held, dtype=torch.long)
                full[:, : mask.shape[1]] = mask[:, :held]
                more = {"attention_mask": full}
            out.append(model(part, past_key_values=cache, **more).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_crop_at_every_offset(model, checked, name, padded):
    """From right after a fold back by 1 to 200 tokens, each from a fork of the same cache."""
    rows = 3 if padded else 1
    mask = left_padding(rows, FOLDS) if padded else None
    ids, cache, stock = tokens(rows, FOLDS), folded(model, name), DynamicCache(config=model.config)
    with torch.no_grad():
        for c in (cache, stock):
            model(ids, attention_mask=mask, past_key_values=c)
    assert cache.timeline.folded[0] == 2
    stride = 11 if padded else 1 if name in FIVE else 5
    for offset in range(1, 201, stride):
        fork = cache.fork()
        fork.crop(-offset)
        assert fork.get_seq_length() == FOLDS - offset
        ours = go_on(model, fork, mask)
        if name == "identity":
            other = copy.deepcopy(stock)
            other.crop(-offset)
            theirs = go_on(model, other, mask)
            assert (ours - theirs).abs().max() < 1e-4, offset
        assert (worst := checked.worst()) < 1e-5, (offset, worst)
    assert cache.get_seq_length() == FOLDS


@pytest.mark.parametrize("given", [100, -(FOLDS - 100), FOLDS, FOLDS + 50, 0, torch.tensor(100)])
def test_crop_takes_the_signs_of_every_version(model, given):
    """Positive: the length to keep; negative: tokens to drop; 0 keeps all."""
    cache = folded(model, "identity")
    with torch.no_grad():
        model(tokens(1, FOLDS), past_key_values=cache)
    cache.crop(given)
    assert cache.get_seq_length() == (100 if abs(int(given)) in (100, FOLDS - 100) else FOLDS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_page_that_a_crop_opens_is_folded_again(model, checked, name):
    """A decode step folds, is taken back and done again: the same page, then other tokens."""
    cache, ids = folded(model, name), tokens(2, FOLDS + 4)
    with torch.no_grad():
        model(ids[:, : FOLDS - 1], past_key_values=cache)
        first = model(ids[:, FOLDS - 1 : FOLDS], past_key_values=cache).logits
        pages = [cache.layers[1].store.pool.gather(row).clone() for row in cache.timeline.table]
        cache.crop(-1)
        assert torch.equal(model(ids[:, FOLDS - 1 : FOLDS], past_key_values=cache).logits, first)
        for row, before in zip(cache.timeline.table, pages, strict=True):
            assert torch.equal(cache.layers[1].store.pool.gather(row), before)
        cache.crop(-70)  # into the last page: decoded, then coded again with what follows
        model(tokens(2, 90, seed=4), past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert (worst := checked.worst()) < 1e-5, worst


# --- rows ------------------------------------------------------------------------------------


ROWS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("operation", ROWS)
@pytest.mark.parametrize("name", PRESETS)
def test_operations_on_rows(model, checked, name, operation):
    ids, mask = tokens(3, 330), left_padding(3, 330)
    cache, stock = folded(model, name), DynamicCache(config=model.config)
    rows = torch.arange(3)
    with torch.no_grad():
        for c in (cache, stock):
            model(ids, attention_mask=mask, past_key_values=c)
            ROWS[operation](c)
    if operation == "reorder":
        rows = torch.tensor([2, 0, 0])
    elif operation == "repeat":
        rows = rows.repeat_interleave(2)
    else:
        rows = torch.tensor([2, 1]) if operation == "select" else torch.tensor([0, 2])
    logits = []
    for c in (cache, stock):
        held, out = 330, []
        with torch.no_grad():
            for part in tokens(len(rows), 7, seed=9).split([1, 5, 1], 1):
                held += part.shape[1]
                full = torch.ones(len(rows), held, dtype=torch.long)
                full[:, :330] = mask[rows]
                out.append(model(part, attention_mask=full, past_key_values=c).logits)
        logits.append(torch.cat(out, 1))
    if name == "identity":
        assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (worst := checked.worst()) < 1e-5, worst


@pytest.mark.parametrize("name", PRESETS)
def test_a_fork_shares_pages_and_writes_its_own(model, checked, name):
    """A prompt of one row serves five that go on differently, and can itself go on."""
    cache = folded(model, name)
    with torch.no_grad():
        model(tokens(1, 330), past_key_values=cache)
    store = cache.layers[0].store
    slabs, before = len(store.pool.slabs), store.pool.gather(cache.timeline.table[0]).clone()
    fork = cache.fork(5)
    assert fork.layers[0].store.pool is store.pool
    assert fork.timeline.table == cache.timeline.table * 5
    assert len(store.pool.slabs) == slabs
    more = tokens(5, 200, seed=8)
    with torch.no_grad():
        cache.crop(-250)  # lets go of pages that the fork still reads
        model(tokens(1, 300, seed=6), past_key_values=cache)
        model(more, past_key_values=fork)
        forked = go_on(model, fork.fork(), torch.ones(5, 530))
        alone = folded(model, name)
        model(tokens(1, 330).expand(5, -1), past_key_values=alone)
        model(more, past_key_values=alone)
        assert torch.equal(go_on(model, alone, torch.ones(5, 530)), forked)
    held = [n for c in (cache, fork) for row in c.timeline.table for n in row]
    assert torch.equal(store.pool.gather(fork.timeline.table[3][:2]), before)
    own = {n for row in cache.timeline.table for n in row}
    assert own.isdisjoint(set(held) - own)
    checked.worst()
    with pytest.raises(CacheError, match=r"fork\(0\); at least 1 row"):
        cache.fork(0)


def test_forked_generation_gives_the_stock_tokens(model):
    """`generate` goes on from forks of one prefix as from copies of the stock cache."""
    prefix, ends = tokens(1, 330), tokens(4, 9, seed=3)
    cache, stock = folded(model, "identity"), DynamicCache(config=model.config)
    with torch.no_grad():
        for c in (cache, stock):
            model(prefix, past_key_values=c)
    stock.batch_repeat_interleave(4)
    ids = torch.cat((prefix.expand(4, -1), ends), 1)
    assert torch.equal(generate(model, ids, cache.fork(4)), generate(model, ids, stock))
    assert cache.get_seq_length() == 330


# --- the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_many_turns(model, checked, name):
    cache, stock = folded(model, name), DynamicCache(config=model.config)
    ids = theirs = tokens(2, 150)
    for turn in range(4):
        ids = torch.cat((generate(model, ids, cache, count=20), tokens(2, 45, seed=turn)), 1)
        if name == "identity":
            theirs = torch.cat(
                (generate(model, theirs, stock, count=20), tokens(2, 45, seed=turn)), 1
            )
            assert torch.equal(ids, theirs)
    assert (worst := checked.worst()) < 1e-5, worst


@contextmanager
def in_turn(cache):
    """Offload and prefetch every layer around what happens, as offloading generation does."""
    for layer in cache.layers:
        layer.offload()
    for layer in cache.layers:
        layer.prefetch()
    yield


@pytest.mark.parametrize("name", PRESETS)
def test_offload_prefetch_reset_and_copies(model, checked, name):
    cache, ids = folded(model, name), tokens(2, 330)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        with in_turn(cache):
            ours = go_on(model, cache, torch.ones(2, 330))
        assert torch.equal(go_on(model, twin, torch.ones(2, 330)), ours)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert sum(cache.nbytes().values()) == 0
        model(ids, past_key_values=cache)
        assert torch.equal(go_on(model, cache, torch.ones(2, 330)), ours)
    assert (worst := checked.worst()) < 1e-5, worst


def test_only_the_config_is_pickled(model):
    config = CacheConfig("kivi2-g64", overrides={1: "int8"}, window=96, unsupported="exact")
    assert pickle.loads(pickle.dumps(config)) == config
    own = kvfold.Preset("mine", kvfold.get("int8").keys, kvfold.get("kivi4-g32").values)
    for sent in (config, CacheConfig(own), CacheConfig(kvfold.get("int8"), keys="kivi2-g64")):
        back = CacheConfig.from_json(json.loads(json.dumps(sent.to_json())))
        assert back.to_json() == sent.to_json()
        for layer in (None, 1):
            ours, theirs = back.preset_of(layer), sent.preset_of(layer)
            assert (ours.keys, ours.values) == (theirs.keys, theirs.values)
    assert replace(config, keys="turboquant3") != config
    with pytest.raises(CacheError, match=r"cannot be pickled; pickle its config"):
        pickle.dumps(folded(model, "int8"))
