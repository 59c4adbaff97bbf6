"""Models without a layer to compress: refused by name, or kept exact where that was asked for."""

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MllamaForCausalLM,
    MllamaTextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import kvfold
from kvfold.attention import dispatch
from kvfold.codec import CodecError
from kvfold.integrations.describe import UnsupportedError
from kvfold.integrations.transformers import FoldedCache, FoldedWarning
from kvfold.kernels import cpu

from .conftest import tiny_llama

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}


def latent():
    """Multi-head latent attention."""
    knobs = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    knobs |= {"n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": None, "v_head_dim": 16}
    knobs |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "moe_intermediate_size": 16}
    knobs |= {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**SMALL, **knobs))


def crossed():
    config = T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=300)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


MODELS = {
    "deepseek_v2": (latent, "latents"),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL)), "no attention layers"),
    "t5": (crossed, "encoder-decoder"),
}


@pytest.mark.parametrize("name", MODELS)
def test_refused_by_name_or_kept_exact(name, prompt):
    torch.manual_seed(4)
    model = MODELS[name][0]().eval()
    with pytest.raises(UnsupportedError) as caught:
        FoldedCache(model, "int8")
    message = str(caught.value)
    assert f"model type '{name}' " in message
    assert MODELS[name][1] in message
    assert "unsupported='exact' keeps such a model uncompressed" in message

    cache = FoldedCache(model, "int8", unsupported="exact")
    assert cache.bypass
    assert f"nothing is compressed: model type '{name}'" in cache.summary()
    with pytest.raises(UnsupportedError, match=name):
        cache.bypass = False
    knobs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    stock = model.generate(prompt[:, :20], **knobs)
    given = "cache_params" if name == "mamba" else "past_key_values"
    passed = cache
    if name == "t5":  # the cache serves the decoder's own attention, the crossed one is another
        passed = EncoderDecoderCache(cache, DynamicCache(config=model.config))
    assert torch.equal(model.generate(prompt[:, :20], **knobs, **{given: passed}), stock)
    assert cache.nbytes()["pages"] == 0
    assert cache.nbytes()["exact_layers"] > 0


def test_layers_of_cross_attention_stay_exact(prompt):
    """Mllama's layers that look at an image are not compressed, the others are."""
    torch.manual_seed(7)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    config = MllamaTextConfig(**SMALL | heads | {"num_hidden_layers": 3}, pad_token_id=0)
    config.cross_attention_layers = [1]
    model = MllamaForCausalLM(config).eval()
    cache, stock = FoldedCache(model, "identity", strict=True), DynamicCache(config=config)
    assert "identity: layers 0, 2\n" in cache.summary()
    image = {"cross_attention_states": torch.randn(2, 9, 32)}
    with torch.no_grad():
        for part in (prompt[:, :150], prompt[:, 150:190], prompt[:, 200:201]):
            ours = model(part, past_key_values=cache, **image).logits
            theirs = model(part, past_key_values=stock, **image).logits
            assert (ours - theirs).abs().max() < 1e-4
            image = {}  # its states are cached by now


def test_cross_attention_inside_each_layer_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, add_cross_attention=True))
    with pytest.raises(UnsupportedError, match="model type 'gpt2' has cross-attention"):
        FoldedCache(model)


def test_enable_keeps_the_choice(prompt):
    model = latent().eval()
    kvfold.enable(model, "int8", unsupported="exact")
    model.generate(prompt[:, :10], max_new_tokens=3)
    kvfold.disable(model)


def test_the_choice_has_two_names():
    with pytest.raises(CodecError, match="unsupported is 'skip'; possible: 'refuse', 'exact'"):
        FoldedCache(tiny_llama(), unsupported="skip")


def test_without_the_extension_pages_are_walked_and_one_warning_says_so(llama, prompt, monkeypatch):
    monkeypatch.setitem(dispatch.KERNELS, "cpu", "kvfold.kernels.cpu")
    monkeypatch.setattr(cpu, "native", lambda: None)
    missing = r"installed without its C\+\+ extension"
    cache = FoldedCache(llama, "int8", window=64)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        with pytest.warns(FoldedWarning, match=missing):
            llama(prompt[:, :1], past_key_values=cache)
        llama(prompt[:, :1], past_key_values=cache)  # said once: another would be an error
    assert cache.compressed_share() > 0
    strict = FoldedCache(llama, "int8", window=64, strict=True)
    with torch.no_grad():
        llama(prompt, past_key_values=strict)
        with pytest.raises(UnsupportedError, match=missing):
            llama(prompt[:, :1], past_key_values=strict)
