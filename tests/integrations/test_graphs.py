"""Replayed decode steps: the numbers on the device are the host's, and nothing stays behind.

Without a GPU a capture keeps its pass and runs it at each replay; what a graph reads is the same.
"""

import gc
from dataclasses import replace

import pytest
import torch

import kvfold
from kvfold.cache.timeline import CacheError
from kvfold.integrations import graphs
from tests.integrations.conftest import tiny_llama
from tests.integrations.test_folded_cache import left_padded


@pytest.fixture
def emulated(monkeypatch):
    """Captures that run their pass again in place of a graph."""

    def replay(self, tokens):
        self.input_ids.copy_(tokens)
        cache = self.cache()
        self.numbers.located = replace(self.numbers.located)  # the page walk keeps a host's copy
        with graphs._static(cache, self.numbers, cache.graphs.configs):
            self.run()
        return self.output.logits

    monkeypatch.setattr(graphs, "capturable", lambda device: True)
    monkeypatch.setattr(graphs.Capture, "record", graphs.Capture.run)
    monkeypatch.setattr(graphs.Capture, "replay", replay)


def generate(model, prompt, cache, mask=None, **more):
    mask = torch.ones_like(prompt) if mask is None else mask
    more = {"max_new_tokens": 100, "do_sample": False, "attention_mask": mask, **more}
    return model.generate(prompt, past_key_values=cache, **more)


@pytest.mark.parametrize(
    ("name", "padded"), [("identity", True), ("kivi4-g32", False), ("fisher2", True)]
)
def test_replayed_steps_give_the_eager_tokens(emulated, name, padded) -> None:
    """100 tokens: a block is folded on the way, and the ring goes round."""
    model = tiny_llama()
    prompt = torch.randint(3, 300, (2, 260), generator=torch.Generator().manual_seed(5))
    mask = left_padded(prompt) if padded else None
    artefact = None
    if name == "fisher2":
        text = " ".join(map(str, prompt.flatten().tolist()))
        artefact = kvfold.FoldedCache.calibrate(model, Numbered(), text, name, tokens=400)
    made = []
    for on in (False, True):
        cache = kvfold.FoldedCache(model, name, graphs=on, artefact=artefact, strict=True)
        made.append((generate(model, prompt, cache, mask), cache))
    (eager, first), (replayed, second) = made
    assert torch.equal(eager, replayed)
    assert second.graphs.replays > 90
    assert second.graphs.captures <= 2, second.graphs.captures
    assert first.timeline.lengths == second.timeline.lengths
    for a, b in zip(first.folded_layers, second.folded_layers, strict=True):
        for x, y in zip(a.store.pool.slabs, b.store.pool.slabs, strict=True):
            assert torch.equal(x, y)
    assert first.compressed_share() == second.compressed_share()
    assert "steps replayed" in second.summary()


class Numbered:
    """A tokenizer for texts of numbers."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_beams_move_rows_under_a_capture(emulated) -> None:
    model = tiny_llama()
    prompt = torch.randint(3, 300, (1, 260), generator=torch.Generator().manual_seed(6))
    more = {"num_beams": 3, "max_new_tokens": 20}
    eager = generate(model, prompt, kvfold.FoldedCache(model, "kivi4-g32", graphs=False), **more)
    cache = kvfold.FoldedCache(model, "kivi4-g32", graphs=True)
    assert torch.equal(generate(model, prompt, cache, **more), eager)
    assert cache.graphs.captures == 1, cache.graphs.captures


def test_a_wrong_mask_is_found_one_step_late(emulated) -> None:
    model = tiny_llama()
    prompt = torch.randint(3, 300, (1, 260), generator=torch.Generator().manual_seed(7))
    cache = kvfold.FoldedCache(model, "kivi4-g32", graphs=True)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)
        mask = torch.ones(1, 261, dtype=torch.long)
        mask[0, 40] = 0
        model(input_ids=prompt[:, :1], attention_mask=mask, past_key_values=cache)
        with pytest.raises(CacheError, match="did not mark the tokens"):
            model(input_ids=prompt[:, :1], past_key_values=cache)
        with pytest.raises(CacheError, match="failed half-way"):
            model(input_ids=prompt[:, :1], past_key_values=cache)
        cache.reset()
        model(input_ids=prompt, past_key_values=cache)


def test_a_pass_that_cannot_be_recorded_runs_eagerly(emulated, monkeypatch) -> None:
    """As where a model reads a value back: CUDA refuses while recording."""

    def record(self):
        self.run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs.Capture, "record", record)
    model = tiny_llama()
    prompt = torch.randint(3, 300, (2, 260), generator=torch.Generator().manual_seed(12))
    eager = generate(model, prompt, kvfold.FoldedCache(model, "int8", graphs=False))
    cache = kvfold.FoldedCache(model, "int8", graphs=True)
    with pytest.warns(kvfold.FoldedWarning, match="cannot be recorded: operation not permitted"):
        tokens = generate(model, prompt, cache)
    assert torch.equal(tokens, eager)
    assert "cannot be recorded" in cache.summary()
    assert cache.graphs.replays == 0


def test_forward_is_the_models_own_again() -> None:
    model = tiny_llama()
    caches = [kvfold.FoldedCache(model, "int8", graphs=True) for _ in range(2)]
    assert "forward" in vars(model)
    del caches[0]
    gc.collect()
    assert "forward" in vars(model)
    del caches
    gc.collect()
    assert "forward" not in vars(model)


def test_says_why_it_does_not_replay() -> None:
    model = tiny_llama()
    prompt = torch.randint(3, 300, (1, 260), generator=torch.Generator().manual_seed(8))
    cache = kvfold.FoldedCache(model, "int8", graphs=True)
    with pytest.warns(kvfold.FoldedWarning, match="the model is on cpu"):
        generate(model, prompt, cache, max_new_tokens=4)
    assert "graphs are CUDA's" in cache.summary()
    cache = kvfold.FoldedCache(model, "int8", graphs=True, strict=True)
    with pytest.raises(kvfold.UnsupportedError, match="the model is on cpu"):
        generate(model, prompt, cache, max_new_tokens=4)
    assert kvfold.FoldedCache(model, "int8").graphs is None
