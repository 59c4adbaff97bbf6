"""What happens around a forward pass: other models, threads, interrupts, copies, grad modes."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
)

from kvfold.cache.config import CacheConfig
from kvfold.cache.timeline import CacheError
from kvfold.integrations.describe import UnsupportedError
from kvfold.integrations.transformers import FoldedCache, FoldedWarning

from .conftest import tiny_llama
from .test_folded_cache import left_padded

SMALL = {"hidden_size": 128, "vocab_size": 300, "pad_token_id": 0}


def own_attention(kind):
    torch.manual_seed(5)
    if kind == "gptj":
        small = GPTJConfig(n_embd=128, n_layer=2, n_head=2, rotary_dim=32, vocab_size=300)
        return GPTJForCausalLM(small).eval()
    if kind == "falcon":
        more = {"num_hidden_layers": 2, "num_attention_heads": 2, "alibi": False}
        return FalconForCausalLM(FalconConfig(**SMALL, **more)).eval()
    return BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=2)).eval()


def gemma(**more):
    torch.manual_seed(6)
    knobs = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    knobs |= {"head_dim": 64, "intermediate_size": 128, "sliding_window": 48}
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **knobs, **more)).eval()


@pytest.mark.parametrize(("kind", "decodes"), [("gptj", 1), ("falcon", 0), ("bloom", 1)])
def test_models_with_attention_of_their_own_are_right(kind, decodes, prompt):
    """GPT-J and Bloom multiply matrices and get decoded states; Falcon calls torch's SDPA."""
    model = own_attention(kind)
    cache, stock = FoldedCache(model, "identity"), DynamicCache(config=model.config)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for part in (prompt[:, :150], prompt[:, 150:200], prompt[:, 200:201]):
            ours = model(part, past_key_values=cache).logits
            theirs = model(part, past_key_values=stock).logits
            assert (ours - theirs).abs().max() < 1e-3
    assert sum("touched a FoldedCache handle" in str(w.message) for w in said) == decodes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hybrid_models_past_their_window(attention, prompt):
    if attention == "sdpa" and not Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("transformers 5.20 and newer have no sdpa for models with a soft-cap")
    model = gemma(attn_implementation=attention)
    cache, stock = FoldedCache(model, "identity", strict=True), DynamicCache(config=model.config)
    assert "identity: layers 1, 3" in cache.summary()
    for _ in range(2):
        with torch.no_grad():
            for part in (prompt[:, :150], prompt[:, 150:200], prompt[:, 200:201]):
                ours = model(part, past_key_values=cache).logits
                theirs = model(part, past_key_values=stock).logits
                assert (ours - theirs).abs().max() < 1e-4
        cache.reset()
        stock = DynamicCache(config=model.config)
    with pytest.raises(CacheError, match="layers that keep transformers' own cache"):
        FoldedCache(model, "int8", overrides={0: "identity"})


def test_from_cache_leaves_a_hybrid_source_alone(prompt):
    model = gemma()
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=stock)
        cache = FoldedCache.from_cache(model, stock, "int8")
        before = stock.layers[0].keys.clone()
        model(prompt[:, :1], past_key_values=cache)
    assert torch.equal(stock.layers[0].keys, before)


def test_two_caches_of_two_threads_leave_the_model_as_it_was(prompt):
    model = tiny_llama()
    caches = [FoldedCache(model, "int8", strict=True) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(prompt, past_key_values=cache)
    turns = threading.Barrier(2, timeout=60)

    def run(cache, late):
        with torch.no_grad():
            for _ in range(5):
                turns.wait()
                if late:
                    torch.zeros(10_000).sum()
                model(prompt[:, :1], past_key_values=cache)

    threads = [threading.Thread(target=run, args=(c, i)) for i, c in enumerate(caches)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert model.config._attn_implementation == "sdpa"
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 235


def test_ctrl_c_leaves_the_model_as_it_was(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8")

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(prompt, past_key_values=cache)
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt[:, :1], past_key_values=cache)
        handle.remove()
        with pytest.raises(CacheError, match="failed half-way; reset"):
            model(prompt[:, :1], past_key_values=cache)
        assert model.config._attn_implementation == "sdpa"
        cache.reset()
        model(prompt, past_key_values=cache)
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt[:, :1], past_key_values=cache)
        handle.remove()
        del cache
    assert model.config._attn_implementation == "sdpa"


def test_masks_over_cached_tokens_are_refused(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8")
    mask = torch.ones(2, 231, dtype=torch.long)
    mask[0, :20] = 0
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        with pytest.raises(CacheError, match="cached tokens cannot be masked later"):
            model(prompt[:, :1], attention_mask=mask, past_key_values=cache)
        padded = FoldedCache(model, "int8")
        model(prompt, attention_mask=mask[:, :230], past_key_values=padded)
        moved = torch.ones(2, 235, dtype=torch.long)
        moved[0, 30:50] = 0
        with pytest.raises(CacheError, match="or others than when they were cached"):
            model(prompt[:, :5], attention_mask=moved, past_key_values=padded)


def test_gradients_are_not_dropped_in_silence(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8")
    model(prompt, past_key_values=cache)
    with pytest.warns(FoldedWarning, match="keeps no gradients"):
        model(prompt[:, :1], past_key_values=cache)
    strict = FoldedCache(model, "int8", strict=True)
    model(prompt, past_key_values=strict)
    with pytest.raises(UnsupportedError, match="keeps no gradients"):
        model(prompt[:, :1], past_key_values=strict)


def test_stale_handles_are_refused(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8")
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        keys = cache.layers[0].keys
        cache.crop(100)
        with pytest.warns(FoldedWarning), pytest.raises(CacheError, match="handle is stale"):
            _ = keys + 0


@pytest.mark.parametrize("name", ["turboquant4", "kivi2-g32"])
def test_autocast_changes_no_stored_byte(prompt, name):
    model = tiny_llama()
    found = []
    for enabled in (False, True):
        cache = FoldedCache(model, name, strict=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(prompt, past_key_values=cache)
            model(prompt[:, :1], past_key_values=cache)
        store = cache.layers[0].store
        x = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(store.encoded(store.key, x, torch.arange(128)[None]))
    assert torch.equal(*found)


def test_inference_mode_and_no_grad_mix(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "turboquant4", strict=True)
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
    with torch.no_grad():
        model(prompt[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 231


@pytest.mark.parametrize("make", [tiny_llama, gemma])
def test_deepcopy_is_a_cache_of_its_own(make, prompt):
    model = make()
    cache = FoldedCache(model, "kivi4-g32", strict=True)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        twin = copy.deepcopy(cache)
        first = model(prompt[:, :1], past_key_values=cache).logits
        second = model(prompt[:, :1], past_key_values=twin).logits
        third = model(prompt[:, 3:4], past_key_values=cache).logits
    assert torch.equal(first, second)
    assert twin.get_seq_length() == 231
    assert cache.get_seq_length() == 232
    assert not torch.equal(first, third)
    with pytest.raises(CacheError, match="cannot be pickled; pickle its config"):
        pickle.dumps(cache)
    assert pickle.loads(pickle.dumps(CacheConfig("int8"))) == CacheConfig("int8")


def test_a_model_with_a_living_cache_can_be_copied(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8")
    twin = copy.deepcopy(model)
    pickle.dumps(model)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        twin(prompt)


def test_a_first_pass_that_fails_leaves_no_trace(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8")
    with torch.no_grad():
        with pytest.raises(IndexError):
            model(torch.full((2, 10), 5000), past_key_values=cache)
        model(prompt.repeat(2, 1), past_key_values=cache)
        model(prompt.repeat(2, 1)[:, :1], past_key_values=cache)
    assert cache.timeline.lengths == [231] * 4


def test_row_operations_under_bypass_and_on_empty_caches(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8", bypass=True)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape[0] == 4
    assert cache.bits_per_element() == 32
    empty = FoldedCache(model, "int8")
    empty.batch_repeat_interleave(2)
    empty.reorder_cache(torch.tensor([0]))
    assert empty.get_seq_length() == 0
    with torch.no_grad():
        model(prompt, past_key_values=empty)
    with pytest.raises(CacheError, match=r"no rows \[7\]; the cache holds rows 0 to 1"):
        empty.reorder_cache(torch.tensor([0, 7]))


def test_options_beside_a_config_are_refused():
    with pytest.raises(CacheError, match="window, strict given beside a CacheConfig"):
        FoldedCache(tiny_llama(), CacheConfig("int8"), window=99, strict=True)


def test_long_second_turns_go_in_chunks_of_queries(prompt, monkeypatch):
    from kvfold.attention import paged

    model = tiny_llama()
    found = []
    for budget in (1 << 24, 1 << 14):
        monkeypatch.setitem(paged.SCORE_ELEMENTS, "cpu", budget)
        cache = FoldedCache(model, "turboquant4", strict=True)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            found.append(model(prompt[:, :90], past_key_values=cache).logits)
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_decode_steps_make_no_mask():
    """Padding is not stored, so a token sees all that is cached; a mask would be read back."""
    model = tiny_llama()
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["position_ids"].shape[1], kwargs["attention_mask"])
        ),
        with_kwargs=True,
    )
    prompt = torch.randint(3, 300, (2, 260), generator=torch.Generator().manual_seed(9))
    mask = left_padded(prompt)
    cache = FoldedCache(model, "int8")
    more = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    model.generate(prompt, past_key_values=cache, **more)
    assert [queries for queries, _ in seen] == [260, 1, 1, 1]
    assert seen[0][1] is not None
    assert all(made is None for _, made in seen[1:])
