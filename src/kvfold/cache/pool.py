"""Append-only pages in slabs of fixed size and fixed address."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.timeline import upload


class Pool:
    """Pages of one layer, numbered; page `i` is row `i % slab_pages` of slab `i // slab_pages`.

    It grows by whole slabs and never moves a page, so that memory is never held twice and device
    addresses stay valid.

    Args:
        page_bytes: bytes of a page.
        slab_pages: pages of a slab.
        device: where pages are read.
        offload: keep them in pinned CPU memory and bring them when they are read; on the CPU itself
            that is where they are anyway.
    """

    def __init__(
        self, page_bytes: int, slab_pages: int, device: torch.device, offload: bool = False
    ) -> None:
        self.page_bytes, self.slab_pages, self.device = page_bytes, slab_pages, device
        self.is_offloaded = offload and device.type != "cpu"
        self.home = torch.device("cpu") if self.is_offloaded else device
        self.slabs: list[Tensor] = []
        #: `[at least slabs]` int64 device address of each slab, for kernels; it is filled in place,
        #: and made anew (twice as long) only where it is full.
        self.addresses = torch.zeros(0, dtype=torch.int64, device=device)

    def reserve(self, pages: int) -> None:
        """Grow until page numbers below `pages` exist."""
        new = -(-pages // self.slab_pages) - len(self.slabs)
        if new <= 0:
            return
        shape = (new, self.slab_pages, self.page_bytes)
        with torch.inference_mode(False):
            made = torch.zeros(
                shape, dtype=torch.uint8, device=self.home, pin_memory=self.is_offloaded
            )
            self.slabs += made.unbind()  # side by side: `write` copies what lies in a row at once
            self._note_addresses()

    def _note_addresses(self) -> None:
        found = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64)
        if len(found) > len(self.addresses):
            self.addresses = found.new_zeros(max(16, 2 * len(found)), device=self.device)
        self.addresses[: len(found)].copy_(upload(found, self.device), non_blocking=True)

    def write(self, numbers: Sequence[int], pages: Tensor) -> None:
        """Store `pages` `[n, page_bytes]` under their numbers."""
        if len(numbers) > 1 and (places := self._in_a_row(numbers)) is not None:
            places.copy_(pages)
            return
        for slab, rows, at in self._by_slab(numbers):
            self.slabs[slab][_index(rows, self.home)] = pages[at].to(self.home)

    def _in_a_row(self, numbers: Sequence[int]) -> Tensor | None:
        """The places of consecutive numbers where slabs that were made together hold them."""
        if list(numbers) != list(range(numbers[0], numbers[0] + len(numbers))):
            return None
        slab, row = divmod(numbers[0], self.slab_pages)
        slabs = self.slabs[slab : numbers[-1] // self.slab_pages + 1]
        size = self.slab_pages * self.page_bytes
        begin = slabs[0].storage_offset()
        for i, other in enumerate(slabs):
            same = other.untyped_storage().data_ptr() == slabs[0].untyped_storage().data_ptr()
            if not same or other.storage_offset() != begin + i * size:
                return None
        offset = begin + row * self.page_bytes
        return slabs[0].as_strided((len(numbers), self.page_bytes), (self.page_bytes, 1), offset)

    def gather(self, numbers: Sequence[int]) -> Tensor:
        """Pages `[n, page_bytes]` in the order of their numbers: a view where they lie in a row."""
        if self.is_offloaded:
            return self._brought(numbers)
        parts = [
            self.slabs[slab][_index(rows, self.home)] for slab, rows, _ in self._by_slab(numbers)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stream(self, groups: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """`gather` of one group after another; offloaded, the next is on its way meanwhile."""
        if not self.is_offloaded:
            yield from map(self.gather, groups)
            return
        side, here = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)

        def start(numbers: Sequence[int]) -> tuple[Tensor, Any]:
            with torch.cuda.stream(side):
                return self._brought(numbers), side.record_event()

        coming = start(groups[0]) if groups else None
        for i in range(len(groups)):
            assert coming is not None
            pages, arrived = coming
            here.wait_event(arrived)
            pages.record_stream(here)  # made on the side stream, used on this one
            coming = start(groups[i + 1]) if i + 1 < len(groups) else None
            yield pages

    def _brought(self, numbers: Sequence[int]) -> Tensor:
        """Pages copied from pinned memory to the device, asynchronously where they lie in a row."""
        pages = torch.empty(len(numbers), self.page_bytes, dtype=torch.uint8, device=self.device)
        for slab, rows, at in self._by_slab(numbers):
            pages[at].copy_(self.slabs[slab][_index(rows, self.home)], non_blocking=True)
        return pages

    def copied(self) -> "Pool":
        """The same pages in storage of their own."""
        new = copy.copy(self)
        new.slabs, new.addresses = [], self.addresses.new_zeros(0)
        Pool.reserve(new, len(self.slabs) * self.slab_pages)
        for to, slab in zip(new.slabs, self.slabs, strict=True):
            to.copy_(slab)
        return new

    def used(self, held: int) -> int:
        """Pages in use, where rows hold `held` numbers."""
        return held

    def _by_slab(self, numbers: Sequence[int]) -> list[tuple[int, list[int], slice]]:
        """Runs of numbers in the same slab: slab, rows in it, and their places in `numbers`."""
        runs: list[tuple[int, list[int], slice]] = []
        for place, number in enumerate(numbers):
            slab, row = divmod(number, self.slab_pages)
            if runs and runs[-1][0] == slab:
                runs[-1][1].append(row)
                runs[-1] = (slab, runs[-1][1], slice(runs[-1][2].start, place + 1))
            else:
                runs.append((slab, [row], slice(place, place + 1)))
        return runs


class WindowPool(Pool):
    """Pages of a layer that reads only the last ones: a number has a place while it is kept.

    Numbers are those of all layers, so most of them name no page here; the places of pages that
    were let go of are used again, and the pool stays as large as the window.
    """

    def __init__(
        self, page_bytes: int, slab_pages: int, device: torch.device, offload: bool = False
    ) -> None:
        super().__init__(page_bytes, slab_pages, device, offload)
        self.places: dict[int, int] = {}
        self.free: list[int] = []

    def reserve(self, pages: int) -> None:
        """Nothing: it grows when a page is written."""

    def write(self, numbers: Sequence[int], pages: Tensor) -> None:
        """Store `pages` under their numbers, in free places."""
        for number in numbers:
            if number not in self.places:
                if not self.free:
                    held = len(self.slabs) * self.slab_pages
                    super().reserve(held + 1)
                    self.free = list(range(held, len(self.slabs) * self.slab_pages))
                self.places[number] = self.free.pop(0)
        super().write([self.places[n] for n in numbers], pages)

    def gather(self, numbers: Sequence[int]) -> Tensor:
        """Pages in the order of their numbers."""
        return super().gather([self.places[n] for n in numbers])

    def keep(self, numbers: set[int]) -> None:
        """Let go of all pages but these."""
        for number in [n for n in self.places if n not in numbers]:
            self.free.append(self.places.pop(number))

    def copied(self) -> "WindowPool":
        """The same pages in storage of their own."""
        new = super().copied()
        assert isinstance(new, WindowPool)
        new.places, new.free = dict(self.places), list(self.free)
        return new

    def used(self, held: int) -> int:
        """Pages in use."""
        return len(self.places)


def _index(rows: list[int], device: torch.device) -> Tensor | slice:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return upload(torch.tensor(rows), device)
