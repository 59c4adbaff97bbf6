"""Metrics against numbers worked out by hand."""

import math

import pytest
import torch

from kvfold.evaluation import metrics
from kvfold.evaluation.metrics import perplexity_delta, quantile, token_scores


def test_scores_of_known_distributions():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    # logits are free up to a constant
    scores = token_scores(p.log() + 7, q.log() - 3, torch.tensor([0, 1]))
    wanted = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert scores.kl.tolist() == pytest.approx([wanted, 0.0], abs=1e-6)
    assert scores.agree.tolist() == [False, True]
    assert scores.nll.tolist() == pytest.approx([-math.log(0.25), -math.log(0.8)], abs=1e-6)
    assert scores.nll_reference.tolist() == pytest.approx([math.log(2), -math.log(0.8)], abs=1e-6)


def test_kl_is_of_the_reference_against_the_compressed(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    z, other = torch.randn(2, 50, 33, generator=generator).unbind()
    targets = torch.randint(0, 33, (50,), generator=generator)
    whole = token_scores(z, other, targets)
    wanted = torch.nn.functional.kl_div(
        other.log_softmax(-1), z.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert (whole.kl - wanted).abs().max() < 1e-5
    monkeypatch.setitem(metrics.CHUNK_ELEMENTS, "cpu", 33 * 7)
    parts = token_scores(z, other, targets)
    assert torch.equal(whole.kl, parts.kl)
    assert torch.equal(whole.nll, parts.nll)


def test_quantile_counts_tokens():
    x = torch.arange(1, 101).float()[torch.randperm(100, generator=torch.Generator())]
    assert quantile(x, 0.99) == 99
    assert quantile(x, 1.0) == 100
    assert quantile(x[:1], 0.99) == float(x[0])


def test_perplexity_delta_is_paired():
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ppl, delta, error, over = perplexity_delta(base + 0.1, base)
    assert ppl == pytest.approx(math.exp(2.6))
    assert delta == pytest.approx(math.exp(0.1) - 1)
    assert error == pytest.approx(0.0, abs=1e-6)  # the base's own spread cancels
    assert over == "windows"
    _, delta, error, _ = perplexity_delta(base + torch.tensor([[0.0], [0.2]]), base)
    # differences of 0 and 0.2: standard deviation 0.1414, over sqrt(2)
    assert error == pytest.approx(math.exp(0.1) * 0.1, rel=1e-5)
    assert perplexity_delta(base[:1] + 0.1, base[:1])[3] == "tokens"


def test_the_catalogue_says_which_presets_do_not_fit_a_shape():
    from kvfold.evaluation.report import catalogue

    entries = {e["preset"]: e for e in catalogue(head_dim=80, num_kv_heads=2)}
    assert entries["kivi2-g32"]["bits_per_element"] is None
    assert "head_dim (80) must be a multiple" in entries["kivi2-g32"]["misfit"]
    assert entries["turboquant4"]["bits_per_element"] == 4 + 16 / 80
