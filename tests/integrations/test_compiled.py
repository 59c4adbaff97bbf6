"""`torch.compile(fullgraph=True)` with packed caches: same tokens, no graph a step or a cache."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

import kvfold
from kvfold.cache.timeline import CacheError
from kvfold.integrations import compiled
from kvfold.integrations.transformers import FoldedCache

from .catalogue import folded
from .conftest import tiny_llama
from .test_hybrid_models import EAGER, MIXED, WINDOW, small

NAMES = ("identity", "kivi2-g64", "turboquant4")


class Counted:
    """A backend that counts what it compiles."""

    def __init__(self, name="aot_eager"):
        self.backend, self.graphs = lookup_backend(name), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


@pytest.fixture
def llama():
    torch._dynamo.reset()
    return tiny_llama()


def padded(prompt):
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    return {"input_ids": prompt, "attention_mask": mask}


def generated(model, inputs, cache, tokens=24):
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, past_key_values=cache
        )


def test_two_graphs_serve_every_step_of_every_cache(llama, prompt):
    inputs = padded(prompt)
    wanted = [generated(llama, inputs, folded(llama, name)) for name in NAMES]
    stock = generated(llama, inputs, DynamicCache(config=llama.config))
    backend = Counted()
    llama.forward = torch.compile(llama.forward, fullgraph=True, backend=backend)
    with kvfold.fused(llama):
        caches = [folded(llama, name) for name in NAMES]
        found = [generated(llama, inputs, cache) for cache in caches]
    assert torch.equal(found[0], stock)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(any(cache.timeline.folded) for cache in caches)
    assert backend.graphs == 2  # a prompt, and a token


def test_passes_of_several_tokens_continue_packed_history(llama, prompt):
    """Without positions or a mask from the caller; also by `torch.compile(model)`."""
    eager, cache = folded(llama, "turboquant4"), folded(llama, "turboquant4")
    fast = torch.compile(llama, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), kvfold.fused(llama):
        for part in prompt.split((100, 90, 1, 39), 1):
            wanted = llama(part, past_key_values=eager).logits
            got = fast(part, past_key_values=cache).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == eager.get_seq_length() == 230
    assert cache.timeline.folded == eager.timeline.folded == [1, 1]


def test_eager_and_compiled_passes_take_turns(llama, prompt):
    wanted = generated(llama, padded(prompt), folded(llama, "kivi2-g64"))
    fast = torch.compile(llama, fullgraph=True, backend="aot_eager")
    cache, inputs = folded(llama, "kivi2-g64"), padded(prompt)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), kvfold.fused(llama):
        token = ids
        for i in range(24):
            run = llama if i % 3 == 0 else fast
            out = run(token, attention_mask=mask, position_ids=positions, past_key_values=cache)
            token = out.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat((ids, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
            positions = positions[:, -1:] + 1
    assert torch.equal(ids, wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**small(sliding_window=WINDOW, **EAGER, attn_logit_softcapping=0.1))
        ),
        lambda: GptOssForCausalLM(
            GptOssConfig(
                **small(layer_types=["full_attention"] * 4, **EAGER),
                num_local_experts=2,
                num_experts_per_tok=1,
            )
        ),
    ],
    ids=["soft-cap and folded sliding windows", "sink logits"],
)
def test_what_else_attention_takes(make, prompt):
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = make().eval()
    kind = {"sliding": "folded"} if model.config.model_type == "gemma2" else {}
    prompts = prompt[:, :40] if kind else prompt  # a window is not seen by the first pass's mask
    wanted, got = (folded(model, "turboquant4", window=32, block=32, **kind) for _ in range(2))
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), kvfold.fused(model):
        for part in (prompts, *prompt[:, 40:90].split(1, 1)):
            a = model(part, past_key_values=wanted).logits
            b = fast(part, past_key_values=got).logits
            torch.testing.assert_close(b, a, rtol=0, atol=2e-5)


def test_says_what_a_compiled_pass_needs(llama, prompt):
    fast = torch.compile(llama, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(Exception, match=r"kvfold\.fused\(model\)"):
        fast(prompt, past_key_values=folded(llama, "turboquant4"))


def test_layers_that_keep_lengths_in_python_are_refused(prompt):
    torch._dynamo.reset()
    config = small(sliding_window=WINDOW, layer_types=MIXED, **EAGER)
    model = Gemma2ForCausalLM(Gemma2Config(**config)).eval()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), kvfold.fused(model), pytest.raises(Exception, match="2 of 4"):
        fast(prompt, past_key_values=folded(model, "turboquant4"))


def test_a_pass_that_fails_leaves_the_cache_to_be_reset(llama, prompt):
    cache = folded(llama, "turboquant4")
    fast = torch.compile(llama, fullgraph=True, backend="aot_eager")
    bad = torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad(), kvfold.fused(llama):
        fast(prompt, past_key_values=cache)
        with pytest.raises(CacheError, match=r"shape \(2, 7\)"):
            fast(prompt[:, :1], attention_mask=bad, past_key_values=cache)
        out = fast(prompt[:, :1], past_key_values=cache)  # nothing had been appended
    assert out.logits.isfinite().all()
    assert cache.get_seq_length() == 231


def test_operators_say_that_their_cache_is_gone(llama):
    cache = FoldedCache(llama, "turboquant4")
    key = cache.found_by
    assert compiled.slots(key) == 0
    other = copy.deepcopy(cache)
    assert int(other.found_by) != int(key)
    del cache
    with pytest.raises(CacheError, match="is gone"):
        compiled.slots(torch.tensor([10**9]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_eager_tokens(prompt):
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1)
    inputs = padded(prompt)
    wanted = generated(model, inputs, folded(model, "fisher2"))
    model.forward = torch.compile(model.forward, fullgraph=True)
    with kvfold.fused(model):
        assert torch.equal(generated(model, inputs, folded(model, "fisher2")), wanted)
