"""Artefacts are found by the model's hash: the shipped one makes `fisher2` work out of the box."""

import pytest
import torch

from kvfold.codec import CodecError
from kvfold.integrations import artefacts, models
from kvfold.integrations.transformers import FoldedCache

from .conftest import tiny_llama


def test_the_demo_model_needs_no_calibration():
    model, tokenizer = models.load("smollm2-135m")
    ids = tokenizer("A sequence: " + ", ".join(map(str, range(1, 120))), return_tensors="pt")
    found = {}
    for preset in ("identity", "fisher2", "fisher4-post"):
        cache = FoldedCache(model, preset, strict=True)
        with torch.no_grad():
            model(ids.input_ids[:, :-1], past_key_values=cache)
            found[preset] = model(ids.input_ids[:, -1:], past_key_values=cache).logits[0, -1]
        assert cache.compressed_share() > 0.5
    exact = found.pop("identity").log_softmax(-1)
    for preset, logits in found.items():
        kl = (exact.exp() * (exact - logits.log_softmax(-1))).sum().item()
        assert kl < 0.05, (preset, kl)


def test_other_models_are_told_how(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "cache_dir", lambda: tmp_path)
    with pytest.raises(CodecError, match=r"needs a calibration artefact.*kvfold calibrate"):
        FoldedCache(tiny_llama(), "fisher2")
