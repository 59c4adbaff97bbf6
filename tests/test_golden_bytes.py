"""The bytes of one tiny encoding per preset: they change with a codec's version or `PAGE_FORMAT`.

    python tests/test_golden_bytes.py --write

remakes `golden_bytes.json` after a change of format that was meant. Codecs with a rotation round
their products to codes: another processor may, rarely, move one code.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import kvfold
from kvfold.codec import Preset, Site
from kvfold.transforms.rope import Rope

GOLDEN = Path(__file__).with_name("golden_bytes.json")
HEADS, HEAD_DIM, BLOCK_LEN = 2, 64, 64


def states() -> torch.Tensor:
    """Bell-shaped integers over 2**10, from a multiplicative hash: exact on every machine."""
    index = torch.arange(4 * HEADS * BLOCK_LEN * HEAD_DIM, dtype=torch.int64)
    uniform = (index * 2654435761 % 2**32) >> 16 & 1023
    mixed = (uniform * 40503 + index * 69069) % 65536 >> 6
    total = mixed.view(4, -1).sum(0) - 2 * 1023
    return (total.float() / 1024).view(1, HEADS, BLOCK_LEN, HEAD_DIM)


def digests(preset: Preset) -> dict[str, str]:
    rope = Rope(tuple(1e4 ** (-i / 32) for i in range(32)))
    found = {}
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, HEADS, HEAD_DIM, BLOCK_LEN, rope=rope)
        bound = codec.bind(site, codec.example(site))
        page = bound.layout.join(bound.encode(states(), torch.arange(BLOCK_LEN)[None]))
        digest = hashlib.sha256(page.numpy().tobytes()).hexdigest()
        found[side] = f"v{codec.version}:{digest}"
    return found


@pytest.mark.parametrize("name", kvfold.presets())
def test_bytes_are_those_on_record(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert name in golden, (
        f"{name} is not on record; run `python tests/test_golden_bytes.py --write`"
    )
    found = digests(kvfold.get(name))
    assert found == golden[name], (
        f"the bytes of {name} changed: {found}, on record {golden[name]}. If that was meant, raise "
        "the codec's version and remake the record"
    )


def test_the_record_holds_no_more_than_the_catalogue() -> None:
    extra = set(json.loads(GOLDEN.read_text())) - set(kvfold.presets())
    assert not extra, f"on record, but no preset: {sorted(extra)}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_golden_bytes.py --write")
    record = {name: digests(preset) for name, preset in kvfold.presets().items()}
    GOLDEN.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(record)} presets written to {GOLDEN}")
