"""Keys and values that layers see: as the stock cache holds them, and before their rotation."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    EsmConfig,
    EsmModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
)

import kvfold
from kvfold.integrations.describe import EncoderError, UnsupportedError

from .conftest import tiny_llama

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MORE = {"num_key_value_heads": 1, "vocab_size": 300, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
MODELS = {
    "llama": lambda: tiny_llama(),
    "yarn": lambda: tiny_llama(rope_parameters={**YARN, "original_max_position_embeddings": 512}),
    "interleaved": lambda: CohereForCausalLM(CohereConfig(**SMALL, **MORE)),
    "partial": lambda: GlmForCausalLM(GlmConfig(**SMALL, **MORE, head_dim=32)),
    "sliding": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, **MORE, head_dim=32, sliding_window=20)
    ),
    "none": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=300)),
}


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_stock_cache(name, prompt):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    ids, mask = prompt[:, :60], torch.ones(2, 60, dtype=torch.long)
    mask[0, :13] = 0
    stock = DynamicCache()  # without a config no layer slides, so that nothing is dropped
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=stock)
    found = kvfold.collect_kv(model, ids, mask)
    assert [s.layer for s in found] == list(range(model.config.num_hidden_layers))
    valid = mask.bool()
    for states, layer in zip(found, stock.layers, strict=True):
        for ours, theirs in ((states.keys, layer.keys), (states.values, layer.values)):
            assert torch.equal(ours.mT[valid[:, None, None].expand_as(ours.mT)],
                               theirs.mT[valid[:, None, None].expand_as(theirs.mT)])  # fmt: skip
        assert torch.equal(states.positions, positions)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("name", ["llama", "yarn", "partial", "interleaved", "none"])
def test_keys_before_rope_are_what_the_projection_gave(name, prompt):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    layer = next(m for m in model.modules() if getattr(m, "layer_idx", None) == 1)
    projection = getattr(layer, "k_proj", None)
    projection = layer.c_attn if projection is None else projection
    seen = []
    handle = projection.register_forward_hook(lambda _, __, out: seen.append(out))
    states = kvfold.collect_kv(model, prompt[:, :80], layers=[1])[0]
    handle.remove()
    rows, heads, tokens, dim = states.keys.shape
    wanted = seen[0] if name != "none" else seen[0].chunk(3, -1)[1]
    wanted = wanted.view(rows, tokens, heads, dim).transpose(1, 2)
    error = (states.keys_before_rope - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5, error
    moved = (states.keys - wanted)[:, :, 1:].abs().max() / wanted.abs().max()
    assert (moved > 0.1) == (name != "none")


def test_models_without_keys_are_refused_by_name(prompt):
    encoders = {
        "vit": ViTModel(ViTConfig(**SMALL)),
        "bert": BertModel(BertConfig(**SMALL)),
        "esm": EsmModel(EsmConfig(vocab_size=33, pad_token_id=1, **SMALL)),
    }
    for name, model in encoders.items():
        for call in (
            lambda m=model: kvfold.collect_kv(m, prompt[:, :8] % 30),
            lambda m=model: kvfold.apply(m),
            lambda m=model: kvfold.FoldedCache(m, unsupported="exact"),
        ):
            with pytest.raises(EncoderError, match=f"model type '{name}' is an encoder"):
                call()
    with pytest.raises(UnsupportedError, match=r"layers \[7\] cache no keys"):
        kvfold.collect_kv(tiny_llama(), prompt, layers=[7])
