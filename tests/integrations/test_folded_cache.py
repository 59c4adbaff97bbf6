"""FoldedCache under generate, and every way in which it has to say no."""

import copy
import gc
import threading
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import kvfold
from kvfold.attention.oracle import oracle
from kvfold.cache.timeline import CacheError
from kvfold.codec import CodecError
from kvfold.integrations import handles
from kvfold.integrations.describe import UnsupportedError
from kvfold.integrations.transformers import FoldedCache, FoldedWarning

from .catalogue import folded
from .conftest import tiny_llama

PRESETS = [name for name, preset in kvfold.presets().items() if preset.keys.artefact != "required"]


def generate(model, prompt, cache=None, mask=None, tokens=100, **more):
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(
        prompt,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        **more,
    )


def left_padded(prompt, pads=37):
    mask = torch.ones_like(prompt)
    mask[0, :pads] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_identity_gives_the_stock_tokens(prompt, attention, padded):
    model = tiny_llama(attn_implementation=attention)
    mask = left_padded(prompt) if padded else None
    cache = FoldedCache(model, "identity", strict=True)
    assert torch.equal(generate(model, prompt, cache, mask), generate(model, prompt, None, mask))
    assert cache.compressed_share() > 0.4, cache.compressed_share()
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", PRESETS)
def test_every_layer_attends_to_what_its_pages_hold(llama, prompt, name, monkeypatch):
    """Each decode step of each layer gives what softmax over the decoded pages gives."""
    worst = []

    def both(q, view, say, **more):
        out = attend(q, view, say=say, **more)
        wanted = oracle(q, view, **more)
        worst.append(((out - wanted).norm() / wanted.norm()).item())
        return out

    attend = handles.attend
    monkeypatch.setattr(handles, "attend", both)
    generate(llama, prompt, FoldedCache(llama, name, strict=True), left_padded(prompt), tokens=40)
    assert len(worst) == 3 * 39
    assert max(worst) < 1e-5, max(worst)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(prompt, dtype):
    model = tiny_llama().to(dtype)
    cache = FoldedCache(model, "kivi4-g32", strict=True)
    generate(model, prompt, cache, tokens=20)
    assert cache.layers[0].store.ring_keys.dtype == dtype
    assert cache.layers[0].store.layout.bits_per_element == 5.0


def test_chunked_prefill_and_second_turn(llama, prompt):
    cache, stock = FoldedCache(llama, "identity", strict=True), DynamicCache(config=llama.config)
    with torch.no_grad():
        for part in (*prompt.split(70, 1), prompt[:, :1], prompt[:, 3:150]):
            ours = llama(part, past_key_values=cache).logits
            theirs = llama(part, past_key_values=stock).logits
            assert (ours - theirs).abs().max() < 1e-4
    assert cache.get_seq_length() == stock.get_seq_length()


@pytest.mark.parametrize("keep", [1, 4, 60, 140, 150, 226, 230])
def test_crop_goes_back_exactly(llama, prompt, keep):
    cache, stock = FoldedCache(llama, "identity", strict=True), DynamicCache(config=llama.config)
    with torch.no_grad():
        for c in (cache, stock):
            llama(prompt, past_key_values=c)
        cache.crop(keep)
        if keep < 230:
            stock.crop(-(230 - keep))
        for part in (prompt[:, :3], prompt[:, 5:6]):
            ours = llama(part, past_key_values=cache).logits
            theirs = llama(part, past_key_values=stock).logits
            assert (ours - theirs).abs().max() < 1e-4


def test_beam_search_and_assisted_tokens(llama, prompt):
    # 5.10 cannot look prompts up without an end token
    for more in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": 299}):
        rows = prompt[:1] if "prompt_lookup_num_tokens" in more else prompt
        ours = generate(llama, rows, FoldedCache(llama, "identity", strict=True), **more)
        assert torch.equal(ours, generate(llama, rows, **more)), more


def test_batch_operations_share_pages(llama, prompt):
    cache = FoldedCache(llama, "turboquant4", strict=True)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        before = cache.nbytes()["pages"]
        cache.batch_repeat_interleave(3)
        assert cache.nbytes()["pages"] == before
        six = llama(prompt[:, :1].repeat_interleave(3, 0), past_key_values=cache).logits
        cache.batch_select_indices(torch.tensor([0, 5]))
        two = llama(prompt[:, :1], past_key_values=cache).logits
    assert torch.equal(six[0], six[2])
    assert two.shape[0] == 2


def test_from_cache_continues_like_a_cache_that_was_there_from_the_start(llama, prompt):
    mask = left_padded(prompt)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    stock, ours = DynamicCache(config=llama.config), FoldedCache(llama, "kivi2-g32")
    with torch.no_grad():
        for cache in (stock, ours):
            llama(prompt, attention_mask=mask, position_ids=positions, past_key_values=cache)
        legacy = tuple((layer.keys, layer.values) for layer in stock.layers)
        for source in (stock, legacy):
            folded = FoldedCache.from_cache(llama, source, "kivi2-g32", attention_mask=mask)
            assert folded.timeline.lengths == ours.timeline.lengths == [193, 230]
            for a, b in zip(folded.layers, ours.layers, strict=True):
                numbers = folded.timeline.table[1]
                assert torch.equal(a.store.pool.gather(numbers), b.store.pool.gather(numbers))
    with pytest.raises(CacheError, match="has 2 layers, the model 3"):
        FoldedCache.from_cache(llama, legacy[:2], "kivi2-g32")


def test_overrides_and_separate_sides(llama, prompt):
    cache = FoldedCache(llama, keys="kivi4-g32", values="turboquant2", overrides={1: "identity"})
    assert "kivi4-g32+turboquant2: layers 0, 2" in cache.summary()
    assert "identity: layers 1" in cache.summary()
    generate(llama, prompt, cache, tokens=5)
    with pytest.raises(
        CacheError, match=r"overrides name layers \[7\]; the model has layers 0 to 2"
    ):
        FoldedCache(llama, overrides={7: "int8"})


def test_bypass_is_the_stock_cache_and_switches_while_empty(llama, prompt):
    cache = FoldedCache(llama, "kivi2-g32", bypass=True)
    assert torch.equal(generate(llama, prompt, cache), generate(llama, prompt))
    assert cache.nbytes()["pages"] == 0
    assert cache.nbytes()["exact_layers"] > 0
    with pytest.raises(CacheError, match="while the cache is empty"):
        cache.bypass = False
    cache.reset()
    cache = FoldedCache(llama, "kivi2-g32", bypass=True)
    cache.bypass = False
    generate(llama, prompt, cache)
    assert cache.nbytes()["pages"] > 0


def test_reset_forgets_and_frees(llama, prompt):
    cache = FoldedCache(llama, "kivi2-g32")
    first = generate(llama, prompt, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert sum(cache.nbytes().values()) == 0
    assert torch.equal(generate(llama, prompt, cache), first)


def held_tensors(thing, found, seen):
    """Storages reachable from a cache: an independent walk over the object graph."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return
    if isinstance(thing, (torch.nn.Module, type, str, bytes)) or callable(thing):
        return
    for inside in gc.get_referents(thing):
        held_tensors(inside, found, seen)


@pytest.mark.parametrize("name", ["turboquant4", "kivi2-g64", "int8", "rotatekv3", "polar-r4a4"])
def test_nbytes_is_every_tensor_held(llama, name):
    cache = FoldedCache(llama, name)
    tokens = torch.randint(3, 300, (1, 700))
    with torch.no_grad():
        llama(tokens, past_key_values=cache)
        llama(tokens[:, :1], past_key_values=cache)
    found = {}
    for layer in cache.layers:
        for part in (layer.store.pool.slabs, vars(layer.store), layer.store.key, layer.store.value):
            held_tensors(part, found, set())
    assert sum(cache.nbytes().values()) == sum(found.values()), cache.nbytes()


def test_other_attention_gets_decoded_states_with_one_warning(llama, prompt):
    cache = FoldedCache(llama, "int8")
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        keys = cache.layers[1].keys
        assert keys.shape == (2, 2, 230, 64)
        with pytest.warns(FoldedWarning, match="touched a FoldedCache handle"):
            decoded = keys + 0
        _ = keys * 2  # a second warning would be an error
        stock = DynamicCache(config=llama.config)
        llama(prompt, past_key_values=stock)
    exact = stock.layers[1].keys
    assert (decoded - exact).norm() / exact.norm() < 0.01
    strict = FoldedCache(llama, "int8", strict=True)
    with torch.no_grad():
        llama(prompt, past_key_values=strict)
    with pytest.raises(UnsupportedError, match="strict=True"):
        _ = strict.layers[1].keys + 0


def test_nothing_of_the_model_stays_changed(prompt):
    model = tiny_llama()
    stock = generate(model, prompt)
    before = {k: copy.copy(v) for k, v in vars(model.model).items() if "hook" in k}
    cache = FoldedCache(model, "kivi2-g32")
    generate(model, prompt, cache)
    assert torch.equal(generate(model, prompt), stock)
    del cache
    gc.collect()
    assert {k: v for k, v in vars(model.model).items() if "hook" in k} == before
    assert model.config._attn_implementation == "sdpa"


def test_a_failed_pass_restores_the_model_and_says_so(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "kivi2-g32")
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(prompt[:, :1], past_key_values=cache)
        handle.remove()
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(CacheError, match="failed half-way; reset"):
            model(prompt[:, :1], past_key_values=cache)
        cache.reset()
        model(prompt, past_key_values=cache)


def test_two_threads_are_told(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "kivi2-g32")
    inside, leave = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        leave.wait(20)

    handle = model.model.layers[0].register_forward_pre_hook(wait)
    with torch.no_grad():
        thread = threading.Thread(target=lambda: model(prompt, past_key_values=cache))
        thread.start()
        assert inside.wait(20)
        with pytest.raises(CacheError, match="one generation at a time"):
            model(prompt, past_key_values=cache)
        leave.set()
        thread.join()
        handle.remove()
        model(prompt[:, :1], past_key_values=cache)


def test_bad_input_is_refused_by_name(llama, prompt):
    with pytest.raises(CodecError, match=r"unknown preset 'kivi3'.*known presets: .*kivi2-g32"):
        FoldedCache(llama, "kivi3")
    with pytest.raises(CodecError, match=r"window .8. is shorter than the groups of 32 tokens"):
        FoldedCache(llama, "kivi2-g32", window=8)
    with pytest.raises(CodecError, match=r"head_dim .80. must be a multiple of group_size .32."):
        FoldedCache(tiny_llama(head_dim=80), "kivi2-g32")
    with pytest.raises(CacheError, match="would reach 230 tokens; this cache holds at most 100"):
        llama(prompt, past_key_values=FoldedCache(llama, max_tokens=100))
    model = tiny_llama(max_position_embeddings=200)
    with pytest.raises(CacheError, match="at most 200"):
        model(prompt, past_key_values=FoldedCache(model))
    with pytest.raises(CacheError, match="takes a 2-D mask"):
        llama(prompt, attention_mask=torch.ones(2, 1, 230, 230), past_key_values=FoldedCache(llama))
    cache = FoldedCache(llama)
    with pytest.raises(CacheError, match="outside a forward pass"):
        cache.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        with pytest.raises(CacheError, match="holds 2 rows and was given 1"):
            llama(prompt[:1], past_key_values=cache)
        llama(prompt[:, :1], past_key_values=cache)  # a refused pass changes nothing


def test_a_model_without_full_attention_is_refused():
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        sliding_window=32,
    )
    with pytest.raises(UnsupportedError, match="no layer of this model can be compressed"):
        FoldedCache(MistralForCausalLM(config))


def test_masks_must_cover_what_is_cached(llama, prompt):
    cache, mask = FoldedCache(llama, "int8"), left_padded(prompt)
    with torch.no_grad():
        llama(prompt, attention_mask=mask, past_key_values=cache)
        with pytest.raises(
            CacheError, match="holds padded rows and this pass has no attention_mask"
        ):
            llama(prompt[:, :1], past_key_values=cache)
        with pytest.raises(CacheError, match=r"attention_mask has shape \(2, 5\)"):
            llama(prompt[:, :1], attention_mask=torch.ones(2, 5), past_key_values=cache)
        with pytest.raises(CacheError, match="cached tokens cannot be masked later"):
            llama(prompt[:, :1], attention_mask=torch.ones(2, 231), past_key_values=cache)


def test_caches_of_a_model_share_what_their_codecs_bind(llama, prompt):
    """Matrices are inverted once; another artefact or preset gets its own."""
    first, second, other = (folded(llama, name) for name in ("fisher2", "fisher2", "kivi2-g64"))
    shared = replace(first.config)
    again = FoldedCache(llama, shared)
    with torch.no_grad():
        for cache in (first, again, second, other):
            llama(prompt, past_key_values=cache)
    kept = [cache.folded_layers[0].store.key for cache in (first, again, second, other)]
    assert kept[0] is kept[1]
    assert kept[2] is not kept[0]  # tables that were made up anew
    assert kept[3] is not kept[2]
    assert first.folded_layers[1].store.key is not kept[0]
