"""The artefact file: round trip, damage, and use for something else."""

import json

import pytest
import torch
from safetensors.torch import save_file

from kvfold.calibration.artefact import FORMAT, Artefact, CalibrationError
from kvfold.codec import get
from kvfold.codecs.polar import Polar


@pytest.fixture
def artefact():
    preset = get("polar-r3a3")
    header = {
        "format": FORMAT,
        "preset": preset.name,
        "codecs": [preset.keys.to_json(), preset.values.to_json()],
        "model": "tiny",
        "model_hash": "0123456789abcdef",
        "tokens": 512,
        "data": "words",
        "data_sha256": "00",
    }
    levels = torch.linspace(0.2, 2.5, 8)
    tensors = {
        f"layers.{i}.{s}.radius_levels": levels + i for i in (0, 11) for s in ("key", "value")
    }
    return Artefact(header, tensors)


def test_round_trip(artefact, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    artefact.save(path)
    loaded = Artefact.load(path)
    assert loaded.header == artefact.header
    assert loaded.digest == artefact.digest
    assert set(loaded.at(11, "key")) == {"radius_levels"}
    assert torch.equal(
        loaded.at(11, "key")["radius_levels"], artefact.at(11, "key")["radius_levels"]
    )
    assert loaded.at(1, "key") == {}
    assert loaded.at(5, "value") == {}
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays
    artefact.save(path)  # over an old one
    assert Artefact.load(path).digest == artefact.digest
    assert [a.digest for a in Artefact.find(tmp_path, "0123456789abcdef")] == [artefact.digest]
    assert list(Artefact.find(tmp_path, "ffff")) == []


def test_every_flipped_bit_is_caught(artefact, tmp_path):
    path = tmp_path / "a.safetensors"
    artefact.save(path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(6)
    places = torch.randint(0, len(whole), (300,), generator=generator).tolist()
    for place in [*places, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = Artefact.load(path)
        except CalibrationError:
            continue
        # padding of safetensors' own header carries nothing
        assert found.digest == artefact.digest, f"bit flip at byte {place} was not seen"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files(artefact, tmp_path, share):
    path = tmp_path / "a.safetensors"
    artefact.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CalibrationError, match="not a readable artefact, perhaps truncated"):
        Artefact.load(path)


def test_other_files(tmp_path):
    with pytest.raises(CalibrationError, match="no such artefact"):
        Artefact.load(tmp_path / "absent")
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, plain)
    with pytest.raises(CalibrationError, match="no kvfold artefact"):
        Artefact.load(plain)
    save_file({"layers.0.key.x": torch.zeros(2)}, plain, {"kvfold": "{"})
    with pytest.raises(CalibrationError, match="is damaged"):
        Artefact.load(plain)
    newer = json.dumps({"format": FORMAT + 1, "sha256": ""})
    save_file({"layers.0.key.x": torch.zeros(2)}, plain, {"kvfold": newer})
    with pytest.raises(CalibrationError, match=f"reads format {FORMAT}"):
        Artefact.load(plain)
    with pytest.raises(CalibrationError, match="not of the form"):
        Artefact({}, {"weights": torch.zeros(1)})


def test_use_for_something_else(artefact, monkeypatch):
    preset = get("polar-r3a3")
    artefact.check("0123456789abcdef", preset.keys, preset.values)
    artefact.check("0123456789abcdef", get("int8").keys)  # takes no artefact
    with pytest.raises(CalibrationError, match=r"made for model 'tiny'.*this model has hash 9999"):
        artefact.check("9999", preset.keys)
    with pytest.raises(CalibrationError, match=r"made for codec polar .*not for rotatekv"):
        artefact.check("0123456789abcdef", get("rotatekv4").keys)
    with pytest.raises(CalibrationError, match=r"radius_bits=3.* here has radius_bits=4"):
        artefact.check("0123456789abcdef", get("polar-r4a4").keys)
    assert artefact.serves(preset)
    assert not artefact.serves(get("polar-r4a4"))
    assert not artefact.serves(get("int8"))
    monkeypatch.setattr(Polar, "version", 7)
    with pytest.raises(
        CalibrationError, match="version 1 of codec polar; this kvfold has version 7"
    ):
        artefact.check("0123456789abcdef", Polar(3, 3))
