"""Layers, shapes and RoPE of small random models of many types."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kvfold
from kvfold.integrations.describe import (
    LayerInfo,
    UnsupportedError,
    decoder,
    describe,
    model_hash,
    rope_error,
)
from kvfold.transforms.rope import Rope

BASE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN["original_max_position_embeddings"] = 64
GPT_OSS = {
    "head_dim": 32,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": YARN,
}


def make(kind, *, auto=AutoModelForCausalLM, **more):
    torch.manual_seed(3)
    config = CONFIG_MAPPING[kind](**{**BASE, **more})
    return auto.from_config(config).eval()


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("kind", "more", "kinds", "shape", "rotary_dim", "pairs"),
    [
        ("llama", {}, {FULL}, (2, 16, 16), 16, "half"),
        ("mistral", {}, {SLIDING}, (2, 16, 16), 16, "half"),
        ("mistral", {"sliding_window": None}, {FULL}, (2, 16, 16), 16, "half"),
        ("qwen2", {}, {FULL}, (2, 16, 16), 16, "half"),
        ("qwen3", {"head_dim": 32}, {FULL}, (2, 32, 32), 32, "half"),
        ("gemma2", {"head_dim": 32}, {SLIDING, FULL}, (2, 32, 32), 32, "half"),
        ("gemma3_text", {"head_dim": 32}, {SLIDING}, (2, 32, 32), 32, "half"),
        ("phi3", {}, {FULL}, (2, 16, 16), 16, "half"),
        ("gpt_neox", {"num_key_value_heads": 4}, {FULL}, (4, 16, 16), 4, "half"),
        ("cohere", {}, {FULL}, (2, 16, 16), 16, "interleaved"),
        ("glm", {"head_dim": 16}, {FULL}, (2, 16, 16), 8, "interleaved"),
        ("gpt_oss", GPT_OSS, {SLIDING, FULL}, (2, 32, 32), 32, "half"),
        ("stablelm", {}, {FULL}, (2, 16, 16), 4, "half"),
        ("phi", {}, {FULL}, (2, 16, 16), 8, "half"),
    ],
)
def test_layers_and_rope(kind, more, kinds, shape, rotary_dim, pairs):
    model = make(kind, **more)
    layers = describe(model)
    assert [info.index for info in layers] == [0, 1, 2, 3]
    assert {info.kind for info in layers} == kinds
    for info in layers:
        assert (info.num_kv_heads, info.key_dim, info.value_dim) == shape
        assert (info.rope.rotary_dim, info.rope.pairs) == (rotary_dim, pairs)
        assert info.module.layer_idx == info.index
    rotations = embeddings_of(model, layers)
    errors = [rope_error(info, *rotations[info.index]) for info in layers]
    assert max(errors) < 1e-5, errors


def embeddings_of(model, layers):
    """cos, sin and positions that each attention module is given, on a left-padded batch."""
    seen, handles = {}, []
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [7, 8, 9, 10, 11, 12]])

    def keep(index):
        def hook(module, args, kwargs):
            cos, sin = kwargs.get("position_embeddings") or args[1]
            seen[index] = (cos, sin, positions)

        return hook

    for info in layers:
        handles.append(info.module.register_forward_pre_hook(keep(info.index), with_kwargs=True))
    with torch.no_grad():
        model(torch.ones(2, 6, dtype=torch.long), position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_gemma3_has_a_rope_for_each_kind():
    types = [SLIDING, FULL, SLIDING, FULL]
    layers = describe(make("gemma3_text", head_dim=32, layer_types=types))
    assert layers[0].rope == layers[2].rope != layers[1].rope == layers[3].rope


def test_yarn_scaling_is_kept():
    layers = describe(make("gpt_oss", **GPT_OSS))
    assert layers[0].rope.scaling == pytest.approx(1.1386, abs=1e-4)


def test_models_without_rope():
    layers = describe(make("gpt2", num_key_value_heads=4))
    assert {info.rope for info in layers} == {Rope(())}
    x = torch.randn(1, 2, 3, 16)
    positions = torch.arange(3)[None]
    assert torch.equal(layers[0].rope.unrotate(layers[0].rope.rotate(x, positions), positions), x)
    # smollm3 leaves it out in every fourth layer, cohere2 in full-attention layers
    assert [bool(i.rope.inv_freq) for i in describe(make("smollm3"))] == [True, True, True, False]
    assert [bool(i.rope.inv_freq) for i in describe(make("cohere2"))] == [True, True, True, False]


def test_length_dependent_rope_holds_up_to_a_limit():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make("llama", rope_parameters=dynamic, max_position_embeddings=48)
    before = describe(model)
    assert {info.rope_limit for info in before} == {48}
    plain = describe(make("llama", max_position_embeddings=48))
    assert {info.rope_limit for info in plain} == {None}
    assert before[0].rope == plain[0].rope
    model(input_ids=torch.arange(60)[None], use_cache=False)  # its frequencies have grown
    if hasattr(model.model.rotary_emb, "None_max_seq_len_cached"):
        pytest.skip("transformers 5.10 never goes back to the frequencies of short sequences")
    assert [info.rope for info in describe(model)] == [info.rope for info in before]
    before[0].check_length(48, kvfold.get("fisher2").keys)
    before[0].check_length(49, kvfold.get("kivi2-g64").keys)
    with pytest.raises(UnsupportedError, match="change beyond 48 tokens"):
        before[0].check_length(49, kvfold.get("fisher2").keys)


def test_longrope_holds_as_long_as_its_short_factors():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    layers = describe(make("phi3", rope_parameters=longrope, **lengths))
    assert {info.rope_limit for info in layers} == {64}
    assert layers[0].rope is not None


def test_hybrid_layers_are_listed_without_heads():
    layers = describe(make("qwen3_next", num_experts=2, num_experts_per_tok=1))
    assert [info.kind for info in layers] == ["linear_attention"] * 3 + [FULL]
    assert layers[0].num_kv_heads == 0
    assert layers[3].num_kv_heads == 2


@pytest.mark.parametrize(
    ("kind", "auto", "message"),
    [
        ("bert", AutoModel, "'bert' is an encoder"),
        ("t5", AutoModel, "'t5' is an encoder-decoder"),
        ("mamba", AutoModelForCausalLM, "'mamba' has no attention layers"),
        ("deepseek_v3", AutoModelForCausalLM, "'deepseek_v3' caches latents"),
    ],
)
def test_unsupported_models_are_named(kind, auto, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        describe(make(kind, auto=auto))
    assert "supported are decoder-only models" in str(caught.value)


def test_no_transformers_model():
    with pytest.raises(UnsupportedError, match="Linear is not a transformers model"):
        describe(torch.nn.Linear(2, 2))


def test_base_models_and_heads_alike():
    model = make("llama")
    assert decoder(model) is model.model
    assert describe(model) == describe(model.model)


def test_rope_error_sees_another_rotation():
    info = describe(make("llama"))[0]
    positions = torch.arange(8)[None]
    cos, sin = (torch.cat((t, t), -1) for t in Rope(info.rope.inv_freq).cos_sin(positions))
    assert rope_error(info, cos, sin, positions) == 0.0
    assert rope_error(info, cos, sin, positions + 1) > 0.5
    assert rope_error(info, cos[..., :-2], sin[..., :-2], positions) == float("inf")
    unknown = LayerInfo(0, FULL, 2, 16, 16, None, info.module)
    assert rope_error(unknown, cos, sin, positions) == float("inf")


def test_model_hash_knows_weights_not_loading():
    model = make("llama").to(torch.bfloat16)
    found = model_hash(model)
    assert len(found) == 16
    model.set_attn_implementation("eager")
    model.config._name_or_path = "elsewhere"
    assert model_hash(model.float()) == found
    assert model_hash(model.model) == found
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight += 0.1
    assert model_hash(model) != found
