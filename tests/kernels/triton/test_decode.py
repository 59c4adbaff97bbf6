"""The CUDA decode kernels in Triton's interpreter, against the float32 oracle on the same bytes.

The inline assembly is replaced by plain operations there; `tests/gpu/test_decode.py` runs the real
thing.
"""

from dataclasses import replace

import pytest
import torch

import kvfold
from kvfold.attention.oracle import oracle
from kvfold.cache.config import CacheConfig
from kvfold.cache.timeline import Timeline
from tests.cache.test_store import feed, make_store

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreter")

REFUSED = {"identity", "fp8"} | {
    name for name in kvfold.presets() if name.startswith(("polar", "spectral", "rotatekv"))
}
REFUSED |= {"turboquant3", "turboquant3-qjl"}
REFUSED |= {name for name in kvfold.presets() if name.endswith("-pre")}
SERVED = [name for name in kvfold.presets() if name not in REFUSED]


@pytest.fixture
def decode():
    if torch.cuda.is_available():
        pytest.skip("tests/gpu/test_decode.py runs the compiled kernels")
    from kvfold.kernels.triton import decode

    return decode


def make_view(name, n=300, rows=2, heads=2, dim=64, chunks=None, padded=True):
    generator = torch.Generator().manual_seed(11)
    keys, values = torch.randn(2, rows, heads, n, dim, generator=generator)
    valid = None
    if padded:
        valid = torch.ones(rows, n, dtype=torch.bool)
        valid[0, :45] = False
    store = make_store(name, Timeline(4, 64, 128), heads, dim)
    return feed(store, keys, values, chunks or [n - 1, 1], valid)


def query(view, group=2, queries=1):
    generator = torch.Generator().manual_seed(12)
    rows, heads, _, dim = view.keys.shape
    return torch.randn(rows, heads * group, queries, dim, generator=generator)


def worst(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", SERVED)
def test_every_code_equals_the_oracle(decode, name):
    view = make_view(name)
    q = query(view)
    assert decode.refuses(q, view) is None
    found = decode.attend(q, view, scaling=0.125)
    error = worst(found, oracle(q, view, scaling=0.125))
    assert error < 1.5e-3, error


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_read_is_refused_by_name(decode, name):
    view = make_view(name)
    assert decode.refuses(query(view), view)


def test_limits_are_refused(decode):
    view = make_view("int8", dim=64)
    assert "17 query heads" in decode.refuses(query(view, 17), view)
    assert "float64" in decode.refuses(query(view).double(), view)
    assert "9 queries" in decode.refuses(query(view, 2, 9), view)
    store = make_store("int8", Timeline(4, 64, 64))
    keys, values = torch.randn(2, 1, 2, 200, 64)
    small = feed(store, keys, values, [199, 1])
    assert "pages of 64" in decode.refuses(query(small), small)
    assert CacheConfig("int8").block in decode.BLOCKS


@pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 1), (16, 1), (2, 3), (4, 8)])
def test_groups_and_several_queries(decode, group, queries):
    view = make_view("fisher2", n=260, chunks=[260 - queries, queries])
    assert max(view.folded) == 1
    q = query(view, group, queries)
    error = worst(decode.attend(q, view, scaling=0.125), oracle(q, view, scaling=0.125))
    assert error < 1.5e-3, error


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "name", ["int8", "fisher2.5", "turboquant4", "turboquant3-uniform", "kivi4-g32"]
)
def test_head_dims(decode, name, dim):
    if name == "kivi4-g32" and dim == 80:
        pytest.skip("groups of 32 do not divide 80 channels")
    view = make_view(name, n=220, rows=1, heads=1, dim=dim, padded=False)
    q = query(view, 4)
    error = worst(decode.attend(q, view, scaling=dim**-0.5), oracle(q, view, scaling=dim**-0.5))
    assert error < 1.5e-3, error


def test_soft_cap_and_sink_logits(decode):
    view = make_view("fisher2")
    q = query(view) * 4
    more = {"scaling": 0.125, "softcap": 5.0, "sink_logits": torch.randn(4)}
    error = worst(decode.attend(q, view, **more), oracle(q, view, **more))
    assert error < 1.5e-3, error
    plain = worst(decode.attend(q, view, **more), oracle(q, view, scaling=0.125))
    assert plain > 0.05, "soft-cap and sink logits did nothing"


def test_padding_queries_give_zeros_and_unwritten_memory_is_not_read(decode):
    view = make_view("fisher2")
    tokens = view.query_tokens.clone()
    tokens[1] = -1
    view = replace(view, query_tokens=tokens)
    q = query(view)
    decode.attend(q, view, scaling=0.125)
    for work in decode._WORK.values():
        for part in (work.query, work.z, work.scores, work.sums, work.state, work.exact):
            part.fill_(torch.nan)
    found = decode.attend(q, view, scaling=0.125)
    assert torch.isfinite(found).all()
    assert found[1].abs().max() == 0
    assert worst(found, oracle(q, view, scaling=0.125)) < 1.5e-3


def test_a_table_wider_than_the_rows_changes_nothing(decode):
    """Captured steps keep the launches of a larger capacity."""
    view = make_view("fisher2")
    q = query(view)
    wanted = decode.attend(q, view, scaling=0.125)
    located = view.on(q.device)
    wide = torch.zeros(2, located.table.shape[1] + 9, dtype=torch.int32)
    block = wide.clone()
    wide[:, : located.table.shape[1]] = located.table
    block[:, : located.table.shape[1]] = located.block
    found = decode.decode(
        q, decode.lowered(view.store), view.keys, view.values, view.tokens.int(),
        view.query_tokens.int(), replace(located, table=wide, block=block), scaling=0.125,
    )  # fmt: skip
    assert worst(found, wanted) < 1e-5
