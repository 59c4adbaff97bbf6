"""Key-value retrieval on the demo model: it can do it, and what a cache loses shows."""

import torch
from transformers import DynamicCache

import kvfold
from kvfold.evaluation.retrieval import ask, pairs
from kvfold.integrations.models import load


def test_the_demo_model_finds_pairs_and_a_cache_without_them_does_not():
    model, tokenizer = load("smollm2-135m")
    asked = pairs(tokenizer, 400, questions=3, seed=1)
    assert 350 < asked.prompt.shape[1] <= 400
    for question, answer in zip(asked.questions, asked.answers, strict=True):
        line = tokenizer.decode(torch.cat((question, answer)))
        assert line in tokenizer.decode(asked.prompt[0])
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(asked.prompt, past_key_values=stock)

    def folded(**more):
        knobs = {"window": 16, "block": 16}
        return kvfold.FoldedCache.from_cache(model, stock, "identity", **knobs, **more)

    caches = folded(), folded(trim=0)
    reference = ask(model, stock, asked)
    assert reference.digits >= 0.8, reference.digits
    exact, blind = (ask(model, cache, asked, reference) for cache in caches)
    assert exact.digits == reference.digits
    assert exact.kl < 1e-5, exact.kl
    assert blind.digits < 0.6 * reference.digits, (blind.digits, reference.digits)
    assert blind.kl > 0.5, blind.kl


def test_filler_keeps_pairs_apart():
    _, tokenizer = load("smollm2-135m")
    plain, filled = (pairs(tokenizer, 900, 2, filler=n) for n in (0, 3))
    lines = [tokenizer.decode(p.prompt[0]).split("\n") for p in (plain, filled)]
    assert all(" = " in line for line in lines[0][:-1])
    assert sum(" = " in line for line in lines[1]) < len(lines[0]) / 4
    assert 700 < filled.prompt.shape[1] <= 900
