"""Calibration on a small random model: what is learned, and that it is what helps."""

import pytest
import torch

from kvfold.calibration.artefact import Artefact, CalibrationError
from kvfold.codec import Site, get
from kvfold.codecs.rotatekv import channel_order
from kvfold.integrations.collect import calibrate, visit_states
from kvfold.integrations.describe import describe, model_hash
from kvfold.integrations.streaming import streaming
from kvfold.quantizers.lloyd_max import rayleigh_levels
from tests.evaluation.tiny import TEXT, make_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from kvfold.integrations.models import load

    return load(make_folder(tmp_path_factory.mktemp("fit")))


def states_of(model, ids):
    kept = {}
    visit_states(
        model, ids, lambda info, k, v, at: kept.setdefault(info.index, []).append((k, v, at))
    )
    return kept


def test_collected_states_are_the_models_own(tiny):
    model, _ = tiny
    ids = torch.randint(0, 200, (2, 40))
    progress = []
    seen = states_of(model, ids)
    visit_states(model, ids, lambda *_: None, lambda *p: progress.append(p))
    assert progress == [(1, 2), (2, 2)]
    assert sorted(seen) == [0, 1]
    assert len(seen[0]) == 2
    with torch.no_grad():
        cache = model(ids[1:], use_cache=True).past_key_values
        hidden = model.model.embed_tokens(ids[1:])
        layer = model.model.layers[0]
        before = layer.self_attn.k_proj(layer.input_layernorm(hidden)).view(1, 40, 2, 32)
    for i in (0, 1):
        keys, values, positions = seen[i][1]
        assert torch.equal(keys, cache.layers[i].keys)
        assert torch.equal(values, cache.layers[i].values)
        assert torch.equal(positions, torch.arange(40)[None])
    unrotated = describe(model)[0].rope.unrotate(seen[0][1][0], seen[0][1][2])
    assert (unrotated - before.transpose(1, 2)).abs().max() < 1e-5


def test_rotatekv_learns_the_order_of_its_means(tiny):
    model, tokenizer = tiny
    artefact = calibrate(model, tokenizer, TEXT, "rotatekv3", tokens=600, context=200, sinks=4)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[:600].view(3, 200)
    info = describe(model)[1]
    parts = states_of(model, ids)[1]
    keys = torch.cat([info.rope.unrotate(k, at)[:, :, 4:] for k, _, at in parts])
    means = keys.double().sum((0, 2)).reshape(1, 64)  # two heads side by side
    order = artefact.at(1, "key")["channel_order"]
    assert torch.equal(order, channel_order(means))
    assert artefact.at(1, "value")["channel_order"].shape == (2, 32)
    header = artefact.header
    assert header["model_hash"] == model_hash(model)
    assert header["tokens"] == 600
    assert header["codecs"][0]["codec"] == "rotatekv"
    assert header["preset"] == "rotatekv3"
    # one order serves every width
    assert artefact.serves(get("rotatekv4"))
    assert not artefact.serves(get("polar-r3a3"))


def test_order_lowers_the_error_of_biased_keys():
    torch.manual_seed(3)
    codec = get("rotatekv3").keys
    rope = describe_rope()
    site = Site("key", 2, 32, 128, rope=rope)
    mean = torch.randn(2, 1, 32) * 3
    positions = torch.arange(128)[None]
    train, test = (rope.rotate(torch.randn(1, 2, 128, 32) + mean, positions) for _ in range(2))
    calibrator = codec.calibrator(site)
    calibrator.add(train, positions)
    tables = {f"layers.0.key.{n}": t for n, t in calibrator.tables().items()}
    errors = []
    for artefact in (None, Artefact({}, tables)):
        bound = codec.bind(site, artefact)
        errors.append(
            (bound.decode(bound.encode(test, positions), positions) - test).square().mean()
        )
    assert errors[1] < 0.7 * errors[0], errors


def describe_rope():
    from kvfold.transforms.rope import Rope

    return Rope(tuple(1e4 ** (-i / 16) for i in range(16)))


def test_polar_learns_levels_of_its_radii(tiny):
    model, tokenizer = tiny
    artefact = calibrate(model, tokenizer, TEXT, "polar-r2a4", tokens=900, context=300)
    for layer in (0, 1):
        for side in ("key", "value"):
            levels = artefact.at(layer, side)["radius_levels"]
            assert levels.shape == (4,)
            assert bool((levels.diff() > 0).all())
            # a rotation makes radii nearly Rayleigh, whatever the states are; tails are cut off
            assert (levels / rayleigh_levels(2) - 1).abs().max() < 0.2
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[None, :300]
    with torch.no_grad():
        with streaming(model, "polar-r2a4") as plain:
            without = model(ids).logits
        with streaming(model, "polar-r2a4", artefact=artefact) as fitted:
            assert not torch.equal(model(ids).logits, without)
    assert plain.bits_per_element() == fitted.bits_per_element()


def test_samples_stay_bounded():
    calibrator = get("polar-r3a3").keys.calibrator(Site("key", 2, 32))
    calibrator.LIMIT = 1000
    for _ in range(50):
        calibrator.add(torch.randn(1, 2, 64, 32), torch.arange(64)[None])
        assert len(calibrator.kept) <= 1000
    assert len(calibrator.kept) > 400


def test_refusals(tiny, tmp_path):
    model, tokenizer = tiny
    with pytest.raises(CalibrationError, match="'int8' has nothing to calibrate"):
        calibrate(model, tokenizer, TEXT, "int8", context=100)
    with pytest.raises(CalibrationError, match="the text has 5 tokens"):
        calibrate(model, tokenizer, "short", "rotatekv4", context=100)
    artefact = calibrate(model, tokenizer, TEXT, "rotatekv4", tokens=200, context=200)
    from kvfold.integrations.models import load

    other, _ = load(make_folder(tmp_path, initializer_range=0.1))
    wrong = streaming(other, "rotatekv4", artefact=artefact)
    with pytest.raises(CalibrationError, match="this model has hash"), wrong:
        pass
