"""Small random models of every kind: 64 tokens past the window, exact and with every codec.

`identity` gives the stock cache's tokens; a lossy preset gives in each compressed layer what SDPA
gives on the states that its codes decode to. Which layers are compressed is asserted, and recorded
for `make nightly`.
"""

import copy

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvfold.cache.timeline import CacheError
from kvfold.codec import CodecError
from kvfold.integrations.describe import UnsupportedError
from kvfold.integrations.transformers import FoldedCache

from .catalogue import FIVE, LOSSY, NIGHTLY, Checked, folded

WINDOW = 48
SMALL = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"] * 2
#: stock attention of these drops what they need (soft-caps, sinks) or refuses to
EAGER = {"attn_implementation": "eager"}


def small(**more):
    return {**SMALL, **more}


def without(*names):
    return {name: value for name, value in SMALL.items() if name not in names}


#: name: (model, layers that are compressed)
MODELS = {
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**small(sliding_window=WINDOW, **EAGER))),
        [1, 3],
    ),
    "gemma3": (
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**small(sliding_window=WINDOW, layer_types=MIXED))
        ),
        [1, 3],
    ),
    "gpt-oss": (
        lambda: GptOssForCausalLM(
            GptOssConfig(
                **small(sliding_window=WINDOW, layer_types=MIXED, **EAGER),
                num_local_experts=2,
                num_experts_per_tok=1,
            )
        ),
        [1, 3],
    ),
    "qwen3": (
        lambda: Qwen3ForCausalLM(
            Qwen3Config(**small(sliding_window=WINDOW, use_sliding_window=True, layer_types=MIXED))
        ),
        [1, 3],
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=128, n_layer=2, n_head=2, vocab_size=300, eos_token_id=2)
        ),
        [0, 1],
    ),
    "gpt-neox": (
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                **without("num_key_value_heads", "head_dim", "num_attention_heads"),
                num_attention_heads=2,
                rotary_pct=0.25,
            )
        ),
        [0, 1, 2, 3],
    ),
    "phi3": (
        lambda: Phi3ForCausalLM(
            Phi3Config(
                **small(num_attention_heads=2, num_key_value_heads=2, sliding_window=None),
                original_max_position_embeddings=2048,
            )
        ),
        [0, 1, 2, 3],
    ),
    "cohere": (
        lambda: CohereForCausalLM(
            CohereConfig(**without("head_dim", "num_attention_heads"), num_attention_heads=2)
        ),
        [0, 1, 2, 3],
    ),
    "glm": (lambda: GlmForCausalLM(GlmConfig(**SMALL)), [0, 1, 2, 3]),
}


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(31)
            made[name] = MODELS[name][0]().eval()
        return made[name]

    return get


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 300, (2, 230), generator=torch.Generator().manual_seed(32))


def generate(model, prompt, cache, count):
    mask = torch.ones_like(prompt)
    mask[0, :21] = 0
    knobs = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(prompt, attention_mask=mask, past_key_values=cache, **knobs)


@pytest.mark.parametrize("name", MODELS)
def test_identity_past_the_window(models, prompt, name, record_property):
    model = models(name)
    cache = folded(model, "identity")
    compressed = [layer.info.index for layer in cache.folded_layers]
    assert compressed == MODELS[name][1]
    record_property("model", name)
    record_property("compressed", str(compressed))
    record_property("layers", str(len(cache.layers)))
    ours = generate(model, prompt, cache, 64)
    assert torch.equal(ours, generate(model, prompt, None, 64))
    assert cache.compressed_share() > 0.4


@pytest.mark.parametrize("preset", LOSSY)
@pytest.mark.parametrize("name", MODELS)
def test_codecs_past_the_window(models, prompt, name, preset, monkeypatch, record_property):
    checked = Checked(monkeypatch)
    generate(
        models(name), prompt, folded(models(name), preset), 64 if NIGHTLY and preset in FIVE else 16
    )
    worst = checked.worst()
    record_property("model", name)
    record_property("preset", preset)
    record_property("error", worst)
    assert worst < 1e-5, worst


@pytest.fixture(scope="module")
def mistral():
    torch.manual_seed(31)
    return MistralForCausalLM(MistralConfig(**small(sliding_window=200))).eval()


def test_mistral_with_a_sliding_window(mistral, prompt):
    """Each of its layers slides: nothing is compressed unless that is asked for."""
    with pytest.raises(UnsupportedError, match=r"\['sliding_attention'\].*sliding='folded'"):
        FoldedCache(mistral)
    cache = FoldedCache(mistral, unsupported="exact")
    assert torch.equal(generate(mistral, prompt, cache, 64), generate(mistral, prompt, None, 64))


# --- sliding layers folded -------------------------------------------------------------------

SLIDING = ("mistral", "gemma2", "gemma3", "gpt-oss", "qwen3")


@pytest.mark.parametrize("name", SLIDING)
def test_folded_sliding_layers_give_the_stock_tokens(models, mistral, prompt, name):
    model = mistral if name == "mistral" else models(name)
    cache = folded(model, "identity", window=16, block=32, sliding="folded")
    assert len(cache.folded_layers) == 4
    ours = generate(model, prompt, cache, 64)
    assert torch.equal(ours, generate(model, prompt, None, 64))
    assert cache.compressed_share() > 0.4


@pytest.mark.parametrize("preset", LOSSY)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt-oss"])
def test_folded_sliding_layers_read_their_codes(models, mistral, prompt, name, preset, monkeypatch):
    checked = Checked(monkeypatch)
    model = mistral if name == "mistral" else models(name)
    cache = folded(model, preset, window=64, block=64, sliding="folded")
    generate(model, prompt, cache, 40)
    with torch.no_grad():  # a turn of several tokens, and what a crop of less than a block leaves
        mask = torch.ones(2, cache.get_seq_length() + 30, dtype=torch.long)
        mask[0, :21] = 0
        for part in (prompt[:, :30], prompt[:, :1]):
            mask = mask[:, : cache.get_seq_length() + part.shape[1]]
            at = (mask.cumsum(1) - 1)[:, -part.shape[1] :]
            model(part, attention_mask=mask, position_ids=at, past_key_values=cache)
            cache.crop(-25)
    worst = checked.worst()
    assert worst < 1e-5, worst


def test_pages_behind_the_window_are_let_go_of(mistral, tmp_path):
    """The pool of a sliding layer stays as large as its window, at any length."""
    cache = folded(mistral, "int8", window=16, block=16, sliding="folded", slab_blocks=1)
    ids = torch.randint(3, 300, (1, 1500), generator=torch.Generator().manual_seed(3))
    held = []
    with torch.no_grad():
        for part in (ids[:, :700], *ids[:, 700:760].split(1, 1), *ids[:, 760:].split(70, 1)):
            mistral(part, past_key_values=cache)
            held.append(len(cache.layers[0].store.pool.places))
        assert max(held) <= (200 + 16) // 16 + 6, max(held)
        bytes_held = sum(cache.nbytes().values())
        stock = mistral(ids[:, :1490], use_cache=False).logits[:, -1]
        # back by a block is always possible, behind the window is not
        with pytest.raises(CacheError, match="whose older pages are let go of; 16 tokens back"):
            cache.crop(900)
        cache.crop(1489)
        ours = mistral(ids[:, 1489:1490], past_key_values=cache).logits[:, -1]
        with pytest.raises(CacheError, match="sliding='folded' cannot be saved"):
            cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(CodecError, match="exclude each other"):
        FoldedCache(mistral, sliding="folded", trim=256)
    assert cache.get_seq_length() == 1490
    assert (ours - stock).abs().max() < 0.1
    assert bytes_held == sum(cache.nbytes().values())


def test_forks_of_folded_sliding_layers_keep_what_each_needs(mistral):
    cache = folded(mistral, "identity", window=16, block=16, sliding="folded")
    stock = DynamicCache(config=mistral.config)
    ids = torch.randint(3, 300, (1, 900), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for c in (cache, stock):
            mistral(ids[:, :300], past_key_values=c)
        fork = cache.fork(2)
        twin = copy.deepcopy(cache)
        mistral(ids[:, 300:700], past_key_values=cache)  # lets go of what the fork still reads
        stock.batch_repeat_interleave(2)
        ours = mistral(ids[:, 700:703].expand(2, -1), past_key_values=fork).logits
        theirs = mistral(ids[:, 700:703].expand(2, -1), past_key_values=stock).logits
        assert (ours - theirs).abs().max() < 1e-4
        third = mistral(ids[:, 700:703], past_key_values=twin).logits
        assert (third - theirs[:1]).abs().max() < 1e-4
