"""Streaming evaluation against a loop over queries, with padding, on many kinds of models."""

import math

import pytest
import torch

from kvfold.attention.streaming import (
    align_order,
    cold_count,
    cold_mask,
    compressed_share,
    streaming_attention,
)
from kvfold.codec import CodecError, Site, get
from kvfold.integrations.describe import UnsupportedError
from kvfold.integrations.streaming import streaming
from kvfold.transforms.rope import Rope
from tests.integrations.test_describe import GPT_OSS, make


def bound(name, side, dim=64, layer=0):
    rope = Rope(tuple(1e4 ** (-i / 32) for i in range(32))) if side == "key" else None
    codec = get(name).keys if side == "key" else get(name).values
    return codec.bind(Site(side, 2, dim, 128, layer, rope=rope))


def naive(q, k, v, codecs, first, length, *, sinks, window, block, scaling, softcap, logits):
    """One row, one query at a time, from the definition in the design."""
    key_codec, value_codec = codecs
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1])
    stored = []
    for codec, x in ((key_codec, k), (value_codec, v)):
        pages = []
        for start in range(sinks, length, 128):
            page = x[:, start : min(start + 128, length)]
            fill = page[:, -1:].expand(-1, 128 - page.shape[1], -1)
            page = torch.cat((page, fill), 1)[None]
            at = first + start + torch.arange(128)[None]
            fields = codec.layout.split(codec.layout.join(codec.encode(page, at)))
            pages.append(codec.decode(fields, at)[0])
        stored.append(torch.cat(pages, 1)[:, : length - sinks])
    for i in range(length):
        keys, values = k[:, : i + 1].clone(), v[:, : i + 1].clone()
        for j in range(sinks, i + 1):
            if sinks + block * ((j - sinks) // block + 1) <= i + 1 - window:
                keys[:, j], values[:, j] = stored[0][:, j - sinks], stored[1][:, j - sinks]
        for h in range(q.shape[0]):
            kv = h // (q.shape[0] // k.shape[0])
            scores = keys[kv] @ q[h, i] * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            extra = [] if logits is None else [logits[h : h + 1]]
            weights = torch.cat((scores, *extra)).softmax(0)[: i + 1]
            out[h, i] = weights @ values[kv]
    return out


@pytest.mark.parametrize(
    ("name", "sinks", "window", "block", "softcap", "aux"),
    [
        ("kivi2-g32", 4, 64, 1, None, False),
        ("kivi2-g32", 3, 40, 32, 5.0, False),
        ("turboquant2", 0, 16, 128, None, True),
        ("rotatekv2", 4, 20, 1, None, False),
    ],
)
def test_against_a_loop_over_queries(name, sinks, window, block, softcap, aux):
    generator = torch.Generator().manual_seed(41)
    lengths = torch.tensor([210, 171])
    q, k, v = (torch.randn(2, heads, 210, 64, generator=generator) for heads in (6, 2, 2))
    k[..., 3] += 4
    logits = torch.randn(6, generator=generator) if aux else None
    first = torch.tensor([0, 39])
    codecs = bound(name, "key"), bound(name, "value")
    rule = {"sinks": sinks, "window": window, "block": block, "scaling": 0.125, "softcap": softcap}
    out = streaming_attention(
        q,
        k,
        v,
        *codecs,
        first[:, None] + torch.arange(210),
        lengths,
        **rule,
        sink_logits=logits,
        chunk=48,
    )
    for r in range(2):
        n = int(lengths[r])
        wanted = naive(q[r], k[r], v[r], codecs, int(first[r]), n, **rule, logits=logits)
        error = (out[r, :, :n] - wanted[:, :n]).abs().max()
        assert error < 2e-5, error
        exact = streaming_attention(
            q[r : r + 1], k[r : r + 1], v[r : r + 1], None, None, **rule, sink_logits=logits
        )
        assert (exact[0, :, :n] - wanted[:, :n]).abs().max() > 0.05  # codes really are read


def test_cold_rule_and_share():
    queries, keys = torch.arange(300), torch.arange(300)
    for sinks, window, block in ((4, 64, 1), (0, 1, 16), (5, 30, 128)):
        found = cold_mask(queries, keys, sinks=sinks, window=window, block=block)
        i, j = queries[:, None], keys[None]
        rule = (
            sinks + block * (torch.div(j - sinks, block, rounding_mode="floor") + 1)
            <= i + 1 - window
        )
        assert torch.equal(found, rule & (j >= sinks))
        assert found.sum(1).tolist() == [cold_count(n, sinks, window, block) for n in range(300)]
        share = float(found.sum() / (300 * 301 / 2))
        assert compressed_share(300, sinks, window, block) == pytest.approx(share, abs=1e-6)
    assert round(compressed_share(2048, 4, 64, 1), 3) == 0.935
    assert compressed_share(0, 4, 64) == 0.0
    assert align_order(torch.tensor([[False, True, True]])).tolist() == [[1, 2, 0]]


def test_left_padding_changes_nothing(llama, prompt):
    pads = (0, 57)
    valid = torch.ones(2, 230, dtype=torch.long)
    valid[1, : pads[1]] = 0
    with torch.no_grad(), streaming(llama, "kivi2-g32"):
        together = llama(prompt, attention_mask=valid).logits
        alone = [llama(prompt[r : r + 1, pads[r] :]).logits[0] for r in range(2)]
    for r in range(2):
        error = (together[r, pads[r] :] - alone[r]).abs().max()
        assert error < 1e-5, error


@pytest.mark.parametrize(
    ("kind", "attention", "more"),
    [
        ("llama", "eager", {}),
        ("llama", "sdpa", {}),
        # stock sdpa leaves out soft-caps and sink logits
        ("gemma2", "eager", {"head_dim": 32, "sliding_window": 40, "attn_logit_softcapping": 5.0}),
        ("gpt_oss", "eager", {**GPT_OSS, "sliding_window": 40}),
        ("gpt_neox", "sdpa", {"num_key_value_heads": 4}),
        ("gpt2", "sdpa", {"num_key_value_heads": 4}),
        ("cohere", "sdpa", {}),
        ("stablelm", "sdpa", {}),
        ("qwen3_next", "sdpa", {"num_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_exact_codes_give_the_models_own_logits(kind, attention, more):
    """Scaling, GQA, soft-caps, sink logits and sliding layers are the model's."""
    model = make(kind, **more)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 64, (2, 150), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        reference = model(ids, use_cache=False).logits
        with streaming(model, "identity") as session:
            found = model(ids).logits
            with pytest.raises(RuntimeError, match="already open"), streaming(model, "int8"):
                pass
        with streaming(model, "turboquant2"):
            coded = model(ids).logits
        assert torch.equal(model(ids, use_cache=False).logits, reference)
    assert session.folded
    assert (found - reference).abs().max() < 1e-4
    assert (coded - reference).abs().max() > 1e-4


def test_block_changes_the_mask(llama, prompt):
    logits = {}
    for block in (1, 128):
        with torch.no_grad(), streaming(llama, "kivi2-g32", block=block):
            logits[block] = llama(prompt).logits
    assert torch.equal(logits[1][:, :68], logits[128][:, :68])
    assert not torch.equal(logits[1][:, 150], logits[128][:, 150])


def test_overrides_name_layers(llama, prompt):
    exact = dict.fromkeys(range(3), "identity")
    with torch.no_grad():
        reference = llama(prompt, use_cache=False).logits
        with streaming(llama, "kivi2-g32", overrides=exact) as session:
            assert (llama(prompt).logits - reference).abs().max() < 1e-5
    assert session.bits_per_element() == 32


def test_nothing_is_left_behind(llama, prompt):
    before = llama.config._attn_implementation
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]
    with streaming(llama, "int8"):
        assert llama.config._attn_implementation == before
        with pytest.raises(ValueError, match="use_cache=False"):
            llama(prompt, use_cache=True)
        with pytest.raises(IndexError), torch.no_grad():
            llama(torch.full((1, 4), 10**6))  # fails inside the forward
        assert llama.config._attn_implementation == before
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]


def test_what_cannot_be_evaluated_is_said(llama, prompt):
    bloom = make("bloom", num_key_value_heads=4)
    message = "'bloom' does not call attention"
    with pytest.raises(UnsupportedError, match=message), streaming(bloom, "int8"):
        bloom(prompt % 64)
    sliding = make("mistral")
    message = "no full-attention layer"
    with pytest.raises(UnsupportedError, match=message), streaming(sliding, "int8"):
        pass
    with pytest.raises(CodecError, match="unknown preset 'nope'"), streaming(llama, "nope"):
        pass
    with pytest.raises(CodecError, match="window"), streaming(llama, "kivi2-g64", window=32):
        pass
    gaps = torch.arange(230).repeat(2, 1)
    gaps[:, 100:] += 5
    with pytest.raises(ValueError, match="rise by one"), streaming(llama, "int8"):
        llama(prompt, position_ids=gaps)


def test_scores_use_the_models_scaling(llama, prompt):
    """A wrong scaling would hide behind a tiny model's flat softmax: check one layer directly."""
    q, k, v = torch.randn(3, 1, 2, 50, 16).unbind()
    out = streaming_attention(q, k, v, None, None, scaling=3.0)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=3.0)
    assert (out - wanted).abs().max() < 1e-5
    assert math.isfinite(float(out.sum()))
