"""What a FoldedCache leaves out: against attention with an explicit mask, in bytes, in errors."""

import copy

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from kvfold import CacheConfig, CacheError, CodecError, FoldedCache, UnsupportedError
from kvfold.integrations import handles
from tests.integrations.conftest import tiny_llama
from tests.integrations.test_folded_cache import generate, left_padded

SMALL = {"window": 16, "block": 16, "slab_blocks": 1}


def run(model, ids, cache, parts, mask=None):
    """Logits of the passes after the first."""
    out, at = [], 0
    with torch.no_grad():
        for n in parts:
            more = {}
            if mask is not None:
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, at : at + n]
                more = {"attention_mask": mask[:, : at + n], "position_ids": positions}
            out.append(model(ids[:, at : at + n], past_key_values=cache, **more).logits)
            at += n
    return torch.cat(out[1:], 1)


def masked(model, ids, prompt, dropped):
    """Logits behind `prompt` where query i does not see the tokens `dropped(i)` (from, to)."""
    n = ids.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    for i in range(prompt, n):
        low, high = dropped(i)
        seen[i, low:high] = False
    with torch.no_grad():
        return model(ids, attention_mask=seen[None, None].expand(len(ids), -1, -1, -1)).logits[
            :, prompt:
        ]


@pytest.mark.parametrize("trim", [0, 40])
def test_trim_is_attention_to_sinks_and_recent_tokens_at_absolute_positions(llama, prompt, trim):
    """StreamingLLM by pages: sinks, what is hot, and the newest trim // block pages are seen."""
    ids, prompt_len = prompt[:1], 150
    cache = FoldedCache(llama, "identity", trim=trim, strict=True, **SMALL)
    found = run(llama, ids, cache, [prompt_len] + [1] * 80)

    def dropped(i):
        folded = max(0, (i + 1 - 16 - 4) // 16)
        return 4, 4 + 16 * max(0, folded - trim // 16)

    wanted = masked(llama, ids, prompt_len, dropped)
    assert (found - wanted).abs().max() < 1e-4, (found - wanted).abs().max()
    assert cache.get_seq_length() == 230
    assert cache.timeline.first == [0]


def test_trim_by_hand_and_a_longer_pass_after_it(llama, prompt):
    cache = FoldedCache(llama, "identity", strict=True, **SMALL)
    with torch.no_grad():
        llama(prompt[:1, :150], past_key_values=cache)
        cache.trim(32)
        assert cache.timeline.blocks(0) == [6, 7]
        found = llama(prompt[:1, 150:], past_key_values=cache).logits
    wanted = masked(llama, prompt[:1], 150, lambda i: (4, 4 + 16 * 6))
    assert (found - wanted).abs().max() < 1e-4, (found - wanted).abs().max()


def test_the_oracle_agrees_with_every_budget_in_a_padded_batch(llama, prompt, monkeypatch):
    from kvfold.attention.oracle import oracle

    worst = []

    def both(q, view, say, **more):
        out = attend(q, view, say=say, **more)
        if view.store.timeline.budget.top_k is None:
            wanted = oracle(q, view, **more)
            worst.append(((out - wanted).norm() / wanted.norm()).item())
        return out

    attend = handles.attend
    monkeypatch.setattr(handles, "attend", both)
    for more in ({"trim": 32}, {"prune": 32}, {"top_k": 32}, {"max_bytes": 700_000}):
        cache = FoldedCache(llama, "kivi4-g32", **more, window=32, block=32, strict=True)
        out = generate(llama, prompt, cache, left_padded(prompt), tokens=40)
        assert out.shape == (2, 270)
    assert len(worst) == 3 * 3 * 39
    assert max(worst) < 1e-5, max(worst)


def test_max_bytes_holds_all_the_way_and_says_when_it_cannot(prompt):
    model = tiny_llama()
    need = FoldedCache(model, "int8", **SMALL)
    run(model, prompt, need, [229, 1])
    parts = need.nbytes()
    limit = sum(parts.values()) - int(0.6 * parts["pages"])
    cache = FoldedCache(model, "int8", max_bytes=limit, **SMALL)
    with torch.no_grad():
        for part in (prompt, prompt[:, :40], *prompt[:, :60].split(1, 1)):
            model(part, past_key_values=cache)
            assert sum(cache.nbytes().values()) <= limit
    assert sum(cache.nbytes().values()) > 0.8 * limit, "room was left unused"
    assert cache.timeline.blocks(0)[-1] == len(cache.timeline.table[0]) - 1
    tight = FoldedCache(model, "int8", max_bytes=10_000, **SMALL)
    with pytest.raises(CacheError, match=r"too small for 2 rows: .* at least [\d,]+ are needed"):
        model(prompt, past_key_values=tight)
    assert not tight.timeline.rows


def test_prune_keeps_what_attention_looks_at(llama, prompt):
    cache = FoldedCache(llama, "identity", prune=10_000, strict=True, **SMALL)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        llama(prompt[:, :5], past_key_values=cache)
    worth = cache._worth()
    best = [
        sorted(
            sorted(cache.timeline.blocks(r), key=lambda m: -worth[cache.timeline.table[r][m]])[:3]
        )
        for r in range(2)
    ]
    cache.prune(48)
    assert [cache.timeline.blocks(r) for r in range(2)] == best
    pages = cache.nbytes()["pages"]
    cache.prune(nbytes=pages // 3)
    assert cache.nbytes()["pages"] == pages // 3
    with pytest.raises(CacheError, match="tokens or in nbytes"):
        cache.prune()
    with pytest.raises(CacheError, match="does not observe attention"):
        FoldedCache(llama, "identity").prune(48)


def test_prune_keeps_what_one_layer_needs(llama, prompt):
    """A page that one layer looks at stays before one that all look at a little."""
    cache = FoldedCache(llama, "identity", prune=10**6, strict=True, **SMALL)
    run(llama, prompt[:1], cache, [150, 2])
    share = torch.zeros(3, len(cache.timeline.table[0]))
    share[:, 2] = 0.3
    share[1, 5] = 0.6
    for layer, mass in zip(cache.layers, share, strict=True):
        for number, got in zip(cache.timeline.table[0], mass, strict=True):
            layer.store.mass[number] = torch.tensor((2 * got, 2.0))
    cache.prune(16)
    assert cache.timeline.blocks(0) == [5]


def test_top_k_of_everything_is_everything(llama, prompt):
    parts = [200] + [1] * 30
    plain = run(llama, prompt, FoldedCache(llama, "turboquant4", **SMALL), parts)
    all_of_it = run(llama, prompt, FoldedCache(llama, "turboquant4", top_k=256, **SMALL), parts)
    few = run(llama, prompt, FoldedCache(llama, "turboquant4", top_k=16, **SMALL), parts)
    assert torch.equal(plain, all_of_it)
    assert not torch.equal(plain, few)


def test_copies_and_forks_keep_their_budgets(llama, prompt):
    cache = FoldedCache(llama, "turboquant4", trim=32, **SMALL)
    with torch.no_grad():
        llama(prompt[:1], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        other = copy.deepcopy(cache)
        for part in prompt[:, :20].split(1, 1):
            a = llama(part[:1].expand(3, -1), past_key_values=cache).logits
            b = llama(part[:1].expand(3, -1), past_key_values=other).logits
    assert torch.equal(a, b)
    assert torch.equal(a[0], a[2])
    assert [len(cache.timeline.blocks(r)) for r in range(3)] == [2, 2, 2]


def test_what_cannot_be_left_out_is_said(llama, prompt):
    with pytest.raises(CodecError, match=r"top_k \(100\) must be at least 128"):
        CacheConfig("int8", top_k=100)
    with pytest.raises(CodecError, match=r"trim \(-1\) must be at least 0"):
        CacheConfig("int8", trim=-1)
    torch.manual_seed(1)
    gptj = GPTJForCausalLM(
        GPTJConfig(vocab_size=300, n_embd=128, n_layer=1, n_head=2, rotary_dim=32, n_positions=512)
    )
    with pytest.raises(UnsupportedError, match="GPTJForCausalLM does not call attention through"):
        FoldedCache(gptj, "identity", trim=128)
    cache = FoldedCache(llama, "identity", trim=32, **SMALL)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="pages were dropped"):
        cache.layers[0].keys.decoded()
    with pytest.raises(CacheError, match="needs tokens 36 to 39 of row 0, which were dropped"):
        cache.crop(40)
    assert "trim=32" in repr(cache)


def test_offload_on_the_cpu_changes_nothing_and_says_so(llama, prompt):
    parts = [200] + [1] * 30
    cache = FoldedCache(llama, "turboquant4", offload=True, strict=True, **SMALL)
    found = run(llama, prompt, cache, parts)
    assert torch.equal(found, run(llama, prompt, FoldedCache(llama, "turboquant4", **SMALL), parts))
    assert "offload: nothing to move (no GPU)" in cache.summary()
