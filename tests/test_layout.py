"""Layout: offsets, padding and views of pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.layout import ALIGNMENT, Field, Layout, PageLayout

DTYPES = (torch.int16, torch.uint8, torch.float16, torch.float32, torch.float8_e4m3fn)


def layouts() -> st.SearchStrategy[Layout]:
    shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
    one = st.tuples(shapes, st.sampled_from(DTYPES))
    return st.lists(one, min_size=1, max_size=5).map(
        lambda parts: Layout(tuple(Field(f"f{i}", s, d) for i, (s, d) in enumerate(parts)))
    )


@settings(max_examples=50, derandomize=True, deadline=None)
@given(layout=layouts(), blocks=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_join_and_split_are_inverse(layout: Layout, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for field in layout.fields:
        raw = torch.randint(0, 256, (blocks, field.nbytes), generator=generator, dtype=torch.uint8)
        arrays[field.name] = raw.view(field.dtype).unflatten(1, field.shape)
    page = layout.join(arrays)
    assert page.shape == (blocks, layout.nbytes), f"{tuple(page.shape)}, {layout.nbytes} stated"
    used = torch.zeros(layout.nbytes, dtype=torch.bool)
    for field, start in zip(layout.fields, layout.offsets, strict=True):
        assert start % ALIGNMENT == 0, f"{field.name} starts at byte {start}"
        stored = page[:, start : start + field.nbytes]
        original = arrays[field.name].reshape(blocks, -1).view(torch.uint8)
        assert torch.equal(stored, original), f"{field.name} differs"
        assert not used[start : start + field.nbytes].any(), f"{field.name} overlaps"
        used[start : start + field.nbytes] = True
        view = layout.split(page)[field.name]
        assert view.shape[1:] == field.shape, f"{tuple(view.shape)}"
        assert view.untyped_storage().data_ptr() == page.untyped_storage().data_ptr(), "a copy"
    assert not page[:, ~used].any(), "padding holds something"


def test_sizes_of_a_known_layout() -> None:
    layout = Layout((Field("a", (3, 5), torch.int16), Field("b", (2,), torch.float16)))
    assert layout.offsets == (0, 32), f"{layout.offsets}"
    assert layout.nbytes == 48, f"{layout.nbytes}"
    page = PageLayout(layout, layout, elements=96)
    assert page.nbytes == 96, f"{page.nbytes}"
    assert page.bits_per_element == 8.0, f"{page.bits_per_element}"


def test_page_splits_into_keys_then_values() -> None:
    keys = Layout((Field("k", (16,), torch.uint8),))
    values = Layout((Field("v", (32,), torch.uint8),))
    bytes_ = torch.arange(48, dtype=torch.uint8)[None]
    k, v = PageLayout(keys, values, 48).split(bytes_)
    assert k["k"].flatten().tolist() == list(range(16)), f"{k['k']}"
    assert v["v"].flatten().tolist() == list(range(16, 48)), f"{v['v']}"


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"a": torch.zeros(1, 4, dtype=torch.int16)},
        {"a": torch.zeros(1, 3, dtype=torch.uint8)},
        {"a": torch.zeros(1, 3, dtype=torch.int16), "b": torch.zeros(1, 1)},
    ],
    ids=["missing", "shape", "dtype", "too many"],
)
def test_check_refuses_other_fields(arrays: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="do not match the layout"):
        Layout((Field("a", (3,), torch.int16),)).check(arrays)
