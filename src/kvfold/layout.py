"""The bytes of one block: every size that kvfold reports is computed here.

A codec states its bytes as a `Layout` of named `Field`s for one block of `block_len` tokens of one
layer, keys or values, all heads. A page is the key layout followed by the value layout.
Fields start at multiples of `ALIGNMENT` bytes; the padding counts like any other byte.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: version of the page format (this module and `packing`); files that hold pages carry it.
PAGE_FORMAT = 2
#: bytes; a 16-byte vector load of any field of any page is aligned.
ALIGNMENT = 16


@dataclass(frozen=True)
class Field:
    """One named array of a block, without the leading axis of blocks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array, without alignment."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The fields of one block in the order in which they are stored."""

    fields: tuple[Field, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First byte of each field."""
        starts, end = [], 0
        for field in self.fields:
            starts.append(end)
            end = _aligned(end + field.nbytes)
        return tuple(starts)

    @property
    def nbytes(self) -> int:
        """Bytes of one block, padding included."""
        return sum(_aligned(field.nbytes) for field in self.fields)

    def join(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Fields `[blocks, *shape]` to bytes `[blocks, nbytes]` (uint8)."""
        self.check(arrays)
        blocks = next(iter(arrays.values())).shape[0]
        device = next(iter(arrays.values())).device
        page = torch.zeros(blocks, self.nbytes, dtype=torch.uint8, device=device)
        for name, view in self.split(page).items():
            view.copy_(arrays[name])
        return page

    def split(self, page: Tensor) -> dict[str, Tensor]:
        """Bytes `[blocks, nbytes]` (uint8, last axis contiguous) to views `[blocks, *shape]`."""
        views = {}
        for field, start in zip(self.fields, self.offsets, strict=True):
            raw = page[:, start : start + field.nbytes]
            views[field.name] = raw.view(field.dtype).unflatten(1, field.shape)
        return views

    def check(self, arrays: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` unless `arrays` has exactly these fields, shapes and dtypes."""
        found = {name: (tuple(a.shape[1:]), a.dtype) for name, a in arrays.items()}
        stated = {field.name: (field.shape, field.dtype) for field in self.fields}
        if found != stated:
            raise ValueError(f"fields {found} do not match the layout {stated}")


@dataclass(frozen=True)
class PageLayout:
    """One page: `block_len` tokens of one layer, the keys' fields, then the values' fields."""

    keys: Layout
    values: Layout
    elements: int  #: K and V elements of a page: block_len * kv_heads * (key dim + value dim)

    @property
    def nbytes(self) -> int:
        """Bytes of one page, padding included."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits of a full page over its K and V elements."""
        return 8 * self.nbytes / self.elements

    def split(self, pages: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pages `[n, nbytes]` to views of the key fields and of the value fields."""
        cut = self.keys.nbytes
        return self.keys.split(pages[:, :cut]), self.values.split(pages[:, cut:])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
