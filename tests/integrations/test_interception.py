"""Attention calls beside transformers' interface: what a handle reads from codes by itself."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, FalconConfig, FalconForCausalLM

from kvfold.integrations import handles
from kvfold.integrations.transformers import FoldedCache, FoldedWarning

from .conftest import tiny_llama


def falcon(**more):
    torch.manual_seed(5)
    small = {"hidden_size": 128, "vocab_size": 300, "pad_token_id": 0, "num_hidden_layers": 2}
    return FalconForCausalLM(FalconConfig(**small, num_attention_heads=2, **more)).eval()


@pytest.fixture
def reads(monkeypatch):
    """Shapes of the queries that were read from codes."""
    found, read = [], handles._read

    def noted(query, *more):
        found.append(tuple(query.shape))
        return read(query, *more)

    monkeypatch.setattr(handles, "_read", noted)
    return found


MODELS = {
    "llama": lambda: tiny_llama(),  # repeat_kv, or from 5.20 pack_gqa for one token
    "one query head a group": lambda: tiny_llama(num_key_value_heads=4),
    "multi-query": lambda: falcon(alibi=False, multi_query=True),
    "multi-head": lambda: falcon(alibi=False, multi_query=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_call_of_sdpa_reads_codes(name, prompt, reads):
    model = MODELS[name]()
    cache, stock = FoldedCache(model, "identity", strict=True), DynamicCache(config=model.config)
    cache._hooks.reads_codes = False  # as if the model knew no attention interface
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, :37] = 0
    at = 0
    with torch.no_grad():
        for n in (150, 30, 1, 1):
            part, seen = prompt[:, at : at + n], mask[:, : at + n]
            ours = model(part, attention_mask=seen, past_key_values=cache).logits
            theirs = model(part, attention_mask=seen, past_key_values=stock).logits
            assert (ours - theirs)[:, -1].abs().max() < 1e-4
            at += n
    layers = model.config.num_hidden_layers
    assert len(reads) == 3 * layers, reads
    assert {shape[2] for shape in reads} == {30, 1}


@pytest.fixture
def handle_pair(llama, prompt):
    cache = FoldedCache(llama, "int8")
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        yield cache, cache.layers[0].store


def pair_of(cache, store, queries):
    step = cache.timeline.plan(2, queries, None, None)
    states = torch.randn(2, 2, 2, queries, 64, generator=torch.Generator().manual_seed(1))
    return handles.FoldedStates.pair(store.append(*states, step), cache.notices)


def attend(q, k, v, **more):
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, **more)


@pytest.mark.parametrize(
    ("queries", "more"),
    [
        (1, {"is_causal": True}),  # aligned with the first key, which no model means
        (3, {}),  # bidirectional
        (1, {"dropout_p": 0.5}),
        (1, {"attn_mask": "bias"}),
        (3, {"attn_mask": "tree"}),
        (1, {"attn_mask": "hole"}),
    ],
)
def test_what_is_not_plain_causal_attention_is_decoded(handle_pair, queries, more, reads):
    """It must be what torch gives on the decoded states, with a warning that says so."""
    cache, store = handle_pair
    k, v = pair_of(cache, store, queries)
    slots = k.shape[2]
    if more.get("attn_mask") == "bias":
        more = {"attn_mask": torch.linspace(-3, 0, slots).expand(1, 1, 1, -1)}
    if more.get("attn_mask") in ("tree", "hole"):
        mask = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)
        mask[-1, 40] = False
        more = {"attn_mask": mask[None, None].expand(2, 1, -1, -1)}
    q = torch.randn(2, 4, queries, 64)
    torch.manual_seed(3)
    with pytest.warns(FoldedWarning, match="touched a FoldedCache handle"):
        ours = attend(q, k, v, **more)
    torch.manual_seed(3)
    theirs = attend(q, k.decoded(), v.decoded(), **more)
    assert torch.equal(ours, theirs)
    assert not reads


def test_additive_masks_and_keyword_calls_read_codes(handle_pair, reads):
    cache, store = handle_pair
    k, v = pair_of(cache, store, 3)
    slots = k.shape[2]
    seen = torch.ones(3, slots, dtype=torch.bool).tril(slots - 3)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
    q = torch.randn(2, 4, 3, 64)
    ours = F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    theirs = attend(q, k.decoded(), v.decoded(), attn_mask=seen, scale=0.3)
    assert reads == [(2, 4, 3, 64)]
    assert (ours - theirs).abs().max() < 1e-5


def test_shapes_of_repeat_kv_decode_to_what_torch_gives(handle_pair):
    cache, store = handle_pair
    k, _ = pair_of(cache, store, 1)
    rows, heads, slots, dim = k.shape
    grown = k[:, :, None, :, :].expand(rows, heads, 3, slots, dim)
    plain = k.decoded()
    wanted = plain[:, :, None].expand(rows, heads, 3, slots, dim)
    assert torch.equal(grown.decoded(), wanted)
    flat = grown.reshape(rows, heads * 3, slots, dim)
    assert type(flat) is handles.FoldedStates
    assert torch.equal(flat.decoded(), plain.repeat_interleave(3, 1))
    with pytest.warns(FoldedWarning):
        part = k[:, :, 5:9]
    assert torch.equal(part, plain[:, :, 5:9])  # one warning a cache
    assert torch.equal(grown.reshape(rows, -1), wanted.reshape(rows, -1))
    assert torch.equal(k.repeat_interleave(2, dim=2), plain.repeat_interleave(2, dim=2))
