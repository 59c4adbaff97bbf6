"""Routes into a packed cache, and out of them without trace."""

import copy
import gc
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

import kvfold
from kvfold.codec import CodecError
from kvfold.integrations import hooks
from kvfold.integrations.describe import UnsupportedError
from kvfold.integrations.routes import RouteError
from kvfold.integrations.transformers import FoldedCache
from tests.evaluation.tiny import make_folder

from .conftest import tiny_llama


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_folder(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def state_of(model):
    """Everything that a route could have left behind."""
    return (
        {k: v for k, v in vars(model).items() if k == "generate"},
        [dict(m._forward_pre_hooks) for m in model.modules()],
        [dict(m._forward_hooks) for m in model.modules()],
        model.config._attn_implementation,
    )


@pytest.fixture
def made(monkeypatch):
    """Caches that routes made."""
    from kvfold.integrations import routes

    found = []

    def make(*args, **kwargs):
        found.append(FoldedCache(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(routes, "FoldedCache", make)
    return found


def run(model, prompt, **more):
    knobs = {"max_new_tokens": 40, "do_sample": False, **more}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **knobs)


def test_enable_gives_each_call_a_fresh_cache_and_disable_leaves_no_trace(prompt, made):
    model = tiny_llama()
    before, stock = state_of(model), run(model, prompt)
    kvfold.enable(model, "identity", window=32, strict=True)
    made.clear()
    assert torch.equal(run(model, prompt), stock)
    assert torch.equal(run(model, prompt), stock)
    assert len(made) == 2
    assert made[0] is not made[1]
    assert [c.config.window for c in made] == [32, 32]
    assert all(c.compressed_share() > 0.4 for c in made)
    own = DynamicCache(config=model.config)
    run(model, prompt, past_key_values=own)
    run(model, prompt, use_cache=False)
    run(model, prompt, cache_implementation="static", max_new_tokens=4)
    assert len(made) == 2
    assert own.get_seq_length() == 269
    kvfold.disable(model)
    made.clear()
    gc.collect()
    assert state_of(model) == before
    assert torch.equal(run(model, prompt), stock)
    with pytest.raises(RouteError, match="not enabled on this LlamaForCausalLM"):
        kvfold.disable(model)


def test_enable_keeps_what_was_patched_before(prompt):
    model = tiny_llama()
    seen = []

    def patched(*args, **kwargs):
        seen.append(type(kwargs.get("past_key_values")).__name__)
        return type(model).generate(model, *args, **kwargs)

    model.generate = patched
    kvfold.enable(model, "int8")
    kvfold.enable(model, "kivi2-g32")  # replaces, so that one disable() undoes both
    run(model, prompt)
    assert seen == ["FoldedCache"]
    kvfold.disable(model)
    assert model.generate is patched


def test_enable_says_at_once_what_does_not_fit():
    model = tiny_llama()
    with pytest.raises(CodecError, match="unknown preset 'kivi3'"):
        kvfold.enable(model, "kivi3")
    assert "generate" not in vars(model)
    with pytest.raises(RouteError, match="LlamaModel has no generate"):
        kvfold.enable(model.model)


def test_copies_of_an_enabled_model_stand_on_their_own(prompt, made):
    model = tiny_llama()
    kvfold.enable(model, "identity")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        made.clear()
        assert not run(twin, prompt)[:, 230:].any()  # of zeros, not of the first model's weights
        assert len(made) == 1
        kvfold.disable(twin)
    assert "generate" in vars(model)


def test_calls_of_two_threads_have_caches_of_their_own(prompt, made):
    model = tiny_llama()
    stock = [run(model, prompt[i : i + 1]) for i in range(2)]
    kvfold.enable(model, "identity")
    made.clear()
    found = [None, None]

    def call(i):
        found[i] = run(model, prompt[i : i + 1])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(found, stock, strict=True))
    assert len(made) == 2
    assert model.config._attn_implementation == "sdpa"


def test_apply_serves_loops_written_by_hand(prompt, made):
    model = tiny_llama()
    before, stock = state_of(model), run(model, prompt)
    kvfold.apply(model, "identity", strict=True)
    made.clear()
    assert torch.equal(run(model, prompt), stock)
    assert len(made) == 1
    with torch.no_grad():
        out = model(prompt)
        tokens = [out.logits[:, -1:].argmax(-1)]
        while len(tokens) < 40:
            out = model(tokens[-1], past_key_values=out.past_key_values)
            tokens.append(out.logits[:, -1:].argmax(-1))
        assert type(out.past_key_values) is FoldedCache
        assert out.past_key_values.get_seq_length() == 269
        assert torch.equal(torch.cat(tokens, 1), stock[:, 230:])
        assert model(prompt, use_cache=False).past_key_values is None
        model.train()
        model(prompt)
        model.eval()
    assert len(made) == 2
    del out
    made.clear()
    kvfold.remove(model)
    gc.collect()
    assert state_of(model) == before
    with pytest.raises(RouteError, match="not applied"):
        kvfold.remove(model)


def test_fused_names_the_attention_once(prompt, monkeypatch):
    model = tiny_llama(attn_implementation="eager")
    stock = run(model, prompt)
    named = set()
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: named.add(model.config._attn_implementation)
    )
    with kvfold.fused(model):
        assert model.config._attn_implementation == "kvfold"
        assert torch.equal(run(model, prompt), stock)  # ordinary states: the user's choice
        cache = FoldedCache(model, "identity", strict=True)
        assert torch.equal(run(model, prompt, past_key_values=cache), stock)
        with pytest.raises(ZeroDivisionError), kvfold.fused(model):
            _ = 1 / 0
        assert model.config._attn_implementation == "kvfold"
    assert model.config._attn_implementation == "eager"
    assert named == {"kvfold"}
    gptj = GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=30)
    with pytest.raises(UnsupportedError, match="'gptj' does not call attention through"):
        kvfold.fused(GPTJForCausalLM(gptj)).__enter__()


def test_one_call(loaded, made):
    model, tokenizer = loaded
    prompt = "the cache of a model holds keys and values " * 6
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    stock = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    wanted = tokenizer.decode(stock[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    knobs = {"max_new_tokens": 30, "do_sample": False}
    assert kvfold.generate(model, tokenizer, prompt, "identity", **knobs) == wanted
    both = kvfold.generate(model, tokenizer, [prompt, "a model"], "identity", **knobs)
    assert len(both) == 2
    assert both[0] == wanted
    cache = FoldedCache(model, "int8")
    kvfold.generate(model, tokenizer, prompt, cache=cache, **knobs)
    assert cache.compressed_share() > 0.3
    for bad in ("", []):
        with pytest.raises(RouteError, match="the prompt is empty"):
            kvfold.generate(model, tokenizer, bad)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "the cache"}]
    asked = kvfold.generate(model, tokenizer, "user: the cache\n", "identity", **knobs)
    assert kvfold.generate(model, tokenizer, chat, "identity", **knobs) == asked
    tokenizer.pad_token = None
    with pytest.raises(RouteError, match="no padding token"):
        kvfold.generate(model, tokenizer, ["a", "b b"])


def test_pipelines_and_streamers_work(loaded, made):
    model, tokenizer = loaded
    prompt = "for every token that it has read so far " * 8
    stock = pipeline("text-generation", model=model, tokenizer=tokenizer)
    knobs = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    wanted = [stock(prompt, return_full_text=False, **knobs) for _ in range(2)]
    kvfold.enable(model, "identity")
    made.clear()
    assert [stock(prompt, return_full_text=False, **knobs) for _ in range(2)] == wanted
    assert len(made) == 2
    assert made[1].compressed_share() > 0.3
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    thread = threading.Thread(
        target=model.generate,
        kwargs={
            **inputs,
            "streamer": streamer,
            "max_new_tokens": 20,
            "min_new_tokens": 20,
            "do_sample": False,
        },
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    kvfold.disable(model)
    assert text == wanted[0][0]["generated_text"]


def test_hooks_are_inert_for_other_caches(prompt):
    model = tiny_llama()
    cache = FoldedCache(model, "int8")
    assert hooks.reads_codes(model.model)
    run(model, prompt)
    assert cache.get_seq_length() == 0


def test_caches_made_and_dropped_by_threads_leave_one_pair_of_hooks(prompt, monkeypatch):
    model = tiny_llama()
    base, alive = model.model, FoldedCache(model, "int8")
    together = threading.Barrier(8)
    register = base.register_forward_pre_hook

    def slowly(*args, **kwargs):  # other threads come between the question and the answer
        time.sleep(0.05)
        return register(*args, **kwargs)

    def many(_):
        together.wait()
        return [FoldedCache(model, "int8") for _ in range(5)][-1]

    del alive
    gc.collect()
    assert not base._forward_pre_hooks
    monkeypatch.setattr(base, "register_forward_pre_hook", slowly)
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(many, range(8)))
    gc.collect()
    alive = FoldedCache(model, "int8")
    assert len(base._forward_pre_hooks) == len(base._forward_hooks) == 1
    with torch.no_grad():
        model(prompt, past_key_values=alive)
        model(prompt, past_key_values=kept[3])
    assert alive.get_seq_length() == kept[3].get_seq_length() == prompt.shape[1]
    del alive, kept
    gc.collect()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
