"""The C++ kernel on layouts, lengths and addresses that nobody chose."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvfold
from kvfold.codec import CodecError
from kvfold.kernels import cpu
from tests.kernels.test_cpu import SETS, check, filled

pytestmark = pytest.mark.skipif(cpu.native() is None, reason="the C++ extension is not built")


def displaced(store, by: int) -> None:
    """The same pages, `by` bytes further on, at the end of their allocation."""
    for i, slab in enumerate(store.pool.slabs):
        memory = torch.empty(slab.numel() + by, dtype=torch.uint8)
        store.pool.slabs[i] = memory[by:].view_as(slab).copy_(slab)


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_random_layers(data) -> None:
    """Any preset, heads, head_dim, page, length, queries, dtype, and any word to start pages at."""
    draw = data.draw
    name = draw(st.sampled_from(sorted(kvfold.presets())), "preset")
    heads, group = draw(st.sampled_from([1, 2, 3]), "heads"), draw(st.integers(1, 8), "group")
    dim = draw(st.sampled_from([64, 80, 96, 128, 256]), "dim")
    block = draw(st.sampled_from([16, 32, 64, 128, 256]), "block")
    chunks = draw(st.integers(140, 700), "tokens"), draw(st.integers(1, 8), "queries")
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), "dtype")
    padded = draw(st.booleans(), "padded")
    try:
        view = filled(name, heads, dim, 2, chunks, padded, dtype, block)
    except (CodecError, pytest.skip.Exception):
        return  # a preset that does not fit the shape says so
    if not any(view.folded) or cpu.unserved(view.store) is not None:
        return
    displaced(view.store, 4 * draw(st.integers(0, 15), "words"))
    check(view, group, draw(st.sampled_from(SETS), "isa"))
